"""LL3M: convert, train, evaluate, run and export open language models in JAX.

Names are imported on first use, so that importing this package is fast:

* `load`, `init` and `Model`: a language model as one object.
* `data.jsonl`, `data.huggingface` and `data.mixture`: streams of batches of type `Batch`.
* `make_train_step`, `init_state`, `TrainState` and `evaluate`: training with any optax optimizer.
* `Trainer`: the whole training loop, with evaluation, checkpoints, logging and resuming.
* `make_mesh`: the devices over which a model is sharded.

docs/python.md is a tutorial. The modules `ll3m.train`, `ll3m.convert`, ... are commands.
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
  """Module type whose `evaluate` stays the function when the command `ll3m.evaluate` is imported.

  Without it, Python would set the attribute to the imported module.
  """

  @property
  def evaluate(self) -> Callable[..., dict[str, float]]:
    return importlib.import_module("ll3m.api.training").evaluate

  @evaluate.setter
  def evaluate(self, command: types.ModuleType) -> None:
    del command  # `importlib.import_module("ll3m.evaluate")` still returns the module


sys.modules[__name__].__class__ = _Package
