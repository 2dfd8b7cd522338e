"""LL3M: convert, train, evaluate, generate with and export open language models in JAX.

Everything below is loaded when it is first used, so that importing this package takes no time:

* `load`, `init` and `Model`: a language model in one object.
* `data.jsonl`, `data.huggingface` and `data.mixture`: streams of batches; `Batch` is one.
* `make_train_step`, `init_state`, `TrainState` and `evaluate`: training with any optax optimizer.
* `Trainer`: the whole loop, with evaluation, checkpoints, logging and resuming.
* `make_mesh`: the devices to split a model over.

docs/python.md leads through them. The modules `ll3m.train`, `ll3m.convert`, ... are commands.
"""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

_HOMES = {
  "Batch": "ll3m.data.batch",
  "Model": "ll3m.api.model",
  "TrainState": "ll3m.training.step",
  "Trainer": "ll3m.api.trainer",
  "init": "ll3m.api.loading",
  "init_state": "ll3m.api.training",
  "load": "ll3m.api.loading",
  "make_mesh": "ll3m.core.sharding",
  "make_train_step": "ll3m.api.training",
}

__all__ = ["data", "evaluate", *_HOMES]


def __getattr__(name: str) -> Any:
  if name == "data":
    return importlib.import_module("ll3m.data")
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])


class _Package(types.ModuleType):
  """Lets `ll3m.evaluate` be the function, also after the command of that name was imported."""

  @property
  def evaluate(self) -> Callable[..., dict[str, float]]:
    return importlib.import_module("ll3m.api.training").evaluate

  @evaluate.setter
  def evaluate(self, command: types.ModuleType) -> None:
    del command  # `importlib.import_module("ll3m.evaluate")` returns it


sys.modules[__name__].__class__ = _Package
