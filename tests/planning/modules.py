"""Modules written as text and read by XLA's own parser."""

from jaxlib import _hlo

from ll3m.planning import hlo


def module_of(text: str) -> hlo.Module:
  return hlo.parse(_hlo.hlo_module_from_text(text).as_serialized_hlo_module_proto())
