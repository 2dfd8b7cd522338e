"""Checks that a checkpoint holds exactly the tensors that its model needs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ll3m.core.dtypes import DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.families.family import Family
from ll3m.families.tensor_rules import (
  TensorSpec,
  expected_tensors,
  parameter_shapes,
  shared_tensors,
)
from ll3m.hf.lazy_tensor import LazyTensor, rows_of

_LISTED = 20  # names in one message
_COMPARED_BYTES = 64 * 2**20


class Match(NamedTuple):
  """The result of a check that passed.

  Attributes:
    specs: The specification of each tensor, or part of one, by its name in the checkpoint.
    tensors: Exactly the tensors, or parts, that the model needs.
    ignored: Names of known buffers and of a head that repeats the embedding.
  """

  specs: dict[str, TensorSpec]
  tensors: dict[str, LazyTensor]
  ignored: tuple[str, ...]


def match_tensors(
  family: Family,
  config: ModelConfig,
  tensors: Mapping[str, LazyTensor],
  origin: str,
  problems: Sequence[str] = (),
) -> Match:
  """Pairs every parameter with its tensor.

  Args:
    family: The family, with its rules and the buffers that may be ignored.
    config: The architecture according to the checkpoint's config.
    tensors: The tensors of the checkpoint.
    origin: The name of the checkpoint in messages.
    problems: Problems found earlier, to report with the others.

  Raises:
    ValueError: Tensors are missing, extra, or have a wrong shape or dtype. The message lists them
      all.
  """
  specs = expected_tensors(family.rules, config)
  tensors, torn = _split_shared(tensors, specs)
  problems = [*problems, *torn]
  names = {rule.ours: rule.hf for rule in family.rules}
  head, embedding = names["head/w"], names["embed/embedding"]
  if missing := [name for name in specs if name not in tensors]:
    tied = " (with tie_word_embeddings=true it is the embedding)" if missing == [head] else ""
    problems.append(f"missing {listing(missing)}{tied}")
  extra = [name for name in tensors if name not in specs]
  buffers = [n for n in extra if any(re.fullmatch(p, n) for p in family.ignored_buffers)]
  ignored = list(buffers)
  if config.tie_embeddings and head in extra and embedding in tensors:
    if not _identical(tensors[head], tensors[embedding]):
      problems.append(f"{head} differs from {embedding}, but the config ties them")
    ignored.append(head)
  if unknown := [name for name in extra if name not in ignored]:
    problems.append(f"unexpected {listing(unknown)}")
  wrong = []
  for name in specs:
    if name in tensors and tensors[name].shape != specs[name].shape:
      wrong.append(f"{name} (expected {specs[name].shape}, got {tensors[name].shape})")
    elif name in tensors and tensors[name].dtype not in DTYPES.values():
      wrong.append(f"{name} (expected a floating-point dtype, got {tensors[name].dtype})")
  if wrong:
    problems.append(f"wrong shape or dtype {listing(wrong)}")
  if problems:
    raise ValueError(
      f"{origin} does not match its {family.name} config of {config.num_layers} layers: "
      + "; ".join(problems)
    )
  return Match(specs, {name: tensors[name] for name in specs}, tuple(ignored))


def _split_shared(
  tensors: Mapping[str, LazyTensor], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, LazyTensor], list[str]]:
  """Splits tensors that several parameters share into the parameters' rows.

  Returns:
    The tensors, and descriptions of tensors of the wrong shape.
  """
  split, problems = dict(tensors), []
  for name, parts in shared_tensors(specs).items():
    if name not in split:
      continue
    whole = split.pop(name)
    rows = sum(specs[part].shape[0] for part in parts)
    expected = (rows, *specs[parts[0]].shape[1:])
    if whole.shape != expected:
      problems.append(f"wrong shape (1): {name} (expected {expected}, got {whole.shape})")
    for part in parts:
      spec = specs[part]
      split[part] = rows_of(whole, spec.first_row, spec.shape)
  return split, problems


def check_parameters(
  family: Family, config: ModelConfig, arrays: Mapping[str, Any], origin: str
) -> None:
  """Checks that LL3M parameters match their config.

  Args:
    family: The family, with its rules.
    config: The architecture according to the checkpoint's config.
    arrays: The checkpoint's parameters, or their descriptions, by "module/name".
    origin: The name of the checkpoint in messages.

  Raises:
    ValueError: Parameters are missing, extra, or have a wrong shape. The message lists them all.
  """
  wanted = parameter_shapes(family.rules, config)
  found = {path: tuple(array.shape) for path, array in arrays.items()}
  wrong = [
    f"{path} (expected {wanted.get(path, 'none')}, got {found.get(path, 'none')})"
    for path in sorted(wanted.keys() | found.keys())
    if wanted.get(path) != found.get(path)
  ]
  if wrong:
    raise ValueError(f"{origin} does not match its config {listing(wrong)}")


def listing(names: Sequence[str]) -> str:
  """Returns the number of names and the first few of them, for a message."""
  more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
  return f"({len(names)}): {', '.join(names[:_LISTED])}{more}"


def _identical(a: LazyTensor, b: LazyTensor) -> bool:
  """Compares two matrices bit by bit."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  rows = max(1, _COMPARED_BYTES * a.shape[0] // max(1, a.nbytes))
  for start in range(0, a.shape[0], rows):
    index = (slice(start, start + rows), slice(None))
    bits = [np.ascontiguousarray(t.read(index)).view(np.uint8) for t in (a, b)]
    if not np.array_equal(*bits):
      return False
  return True
