"""The checkpoints of a training run: saved asynchronously, kept by policy, restored exactly."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ll3m.core import checkpoint as folders
from ll3m.core import flags
from ll3m.core.checkpoint import BytesRestore, BytesSave, flatten, nest


@dataclasses.dataclass(frozen=True)
class CheckpointerConfig:
  """`--checkpointer.*`."""

  save_optimizer_state: bool = flags.option(
    True, "Save what resuming needs; False saves the parameters alone."
  )
  max_to_keep: int = flags.option(
    2, "How many of the latest checkpoints are kept, beside the milestones."
  )

  def __post_init__(self):
    if self.max_to_keep < 1:
      raise ValueError(f"checkpointer.max_to_keep must be at least 1, got {self.max_to_keep}")


class Position(NamedTuple):
  """Where a run stands, as saved.

  Attributes:
    step: optimizer steps done.
    params: Haiku parameters.
    opt_state: of the optimizer; None if it was not asked for.
    meta: what was saved beside them.
  """

  step: int
  params: Any
  opt_state: Any
  meta: Mapping[str, Any]


class RunCheckpoints:
  """Saves and restores the steps of one output_dir; use as a context manager."""

  def __init__(
    self, output_dir: epath.PathLike, config: CheckpointerConfig, *, milestone_steps: int = 0
  ):
    """Opens, and creates, output_dir/checkpoints.

    Args:
      output_dir: of the run.
      config: `--checkpointer.*`.
      milestone_steps: checkpoints at multiples of this are never deleted; 0 for none.
    """
    self._config = config
    policies = [ocp.checkpoint_managers.LatestN(config.max_to_keep)]
    if milestone_steps:
      policies.append(ocp.checkpoint_managers.EveryNSteps(milestone_steps))
    self._manager = ocp.CheckpointManager(
      folders.absolute(output_dir) / folders.STEPS,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      ),
      item_handlers={
        folders.PARAMS: ocp.PyTreeCheckpointHandler(),
        folders.OPTIMIZER: ocp.PyTreeCheckpointHandler(),
        folders.META: ocp.JsonCheckpointHandler(),
        folders.DATASET: folders.BytesHandler(),
      },
    )

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, kind: Any, *exception: Any) -> None:
    if kind is None:
      self._manager.wait_until_finished()
    self._manager.close()

  def save(
    self,
    step: int,
    *,
    params: Any,
    opt_state: Any,
    meta: Mapping[str, Any],
    dataset: Mapping[str, bytes],
  ) -> None:
    """Starts saving a step; returns once the arrays are copied out.

    Raises:
      Exception: what went wrong in the save before, which ran in the background.
    """
    self._manager.check_for_errors()
    items = {
      folders.PARAMS: ocp.args.PyTreeSave(nest(params)),
      folders.META: ocp.args.JsonSave(dict(meta)),
    }
    if self._config.save_optimizer_state:
      items[folders.OPTIMIZER] = ocp.args.PyTreeSave(_leaves(opt_state))
      items[folders.DATASET] = BytesSave(dict(dataset))
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def restore(self, step: int, *, params: Any, opt_state: Any) -> Position:
    """Restores a step of this output_dir to go on from; see `restore_step`.

    Later steps, which are there only if they are damaged (`open_checkpoint`), are deleted: they
    will be made again, and Orbax saves no step twice.
    """
    path = self._manager.directory / str(step)
    position = restore_step(path, params=params, opt_state=opt_state)
    for later in self._manager.all_steps():
      if later > step:
        self._manager.delete(later)
    return position


def restore_step(path: epath.Path, *, params: Any, opt_state: Any) -> Position:
  """Reads one step folder to resume from it.

  Args:
    path: the step folder.
    params: `jax.ShapeDtypeStruct`s with shardings, as the run wants the parameters.
    opt_state: the same for the optimizer's state.

  Raises:
    ValueError: the step was saved without what resuming needs or for another model or optimizer,
      or its arrays are damaged.
  """
  opened = folders.open_checkpoint(path)
  path = opened.path
  require_resumable(path)
  reader = ocp.PyTreeCheckpointHandler()
  _same_shapes(path / folders.PARAMS, reader, nest(params), "parameters")
  _same_shapes(path / folders.OPTIMIZER, reader, _leaves(opt_state), "optimizer's state")
  restored_params = _restore(reader, path / folders.PARAMS, nest(params))
  restored_state = _restore(reader, path / folders.OPTIMIZER, _leaves(opt_state))
  return Position(
    step=int(opened.meta["step"]),
    params=flatten(restored_params),
    opt_state=jax.tree.unflatten(jax.tree.structure(opt_state), restored_state.values()),
    meta=opened.meta,
  )


def require_resumable(path: epath.Path) -> None:
  """Demands that a step folder holds more than the parameters.

  Raises:
    ValueError: it does not.
  """
  if not (path / folders.OPTIMIZER).is_dir():
    raise ValueError(
      f"cannot resume from {path}: it was saved without the optimizer's state "
      f"(checkpointer.save_optimizer_state=False); start a new run with "
      f"--load_checkpoint=params::{path}"
    )


def restore_dataset_state(path: epath.PathLike) -> dict[str, bytes]:
  """Reads only the position in the data, from a step folder or a run's output_dir.

  Raises:
    ValueError: it was not saved there.
  """
  path = folders.open_checkpoint(path).path / folders.DATASET
  if not path.is_dir():
    raise ValueError(f"no data position was saved at {path.parent}")
  return folders.BytesHandler().restore(path, BytesRestore())


def _leaves(tree: Any) -> dict[str, Any]:
  """Names the optimizer's arrays by their path: what a restore can compare and explain."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {f"{i:03d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _restore(reader: ocp.PyTreeCheckpointHandler, path: epath.Path, like: Any) -> Any:
  arguments = jax.tree.map(
    lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding, global_shape=x.shape), like
  )
  with folders.reading(path):
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _array(shape: tuple[int, ...], dtype: str) -> str:
  return f"{dtype}{list(shape)}"


def _same_shapes(
  path: epath.Path, reader: ocp.PyTreeCheckpointHandler, like: Any, what: str
) -> None:
  """Demands that the arrays on disk are those that the run has, and lists what differs."""

  def shapes(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {
      name: (tuple(x.shape), jnp.dtype(x.dtype).name)
      for name, (_, x) in zip(names, leaves, strict=True)
    }

  with folders.reading(path):
    saved = shapes(reader.metadata(path).tree)
  wanted = shapes(like)
  if saved == wanted:
    return
  lines = [f"{n} is not in the run" for n in sorted(saved.keys() - wanted.keys())]
  lines += [f"{n} was not saved" for n in sorted(wanted.keys() - saved.keys())]
  lines += [
    f"{n} is {_array(*saved[n])}, expected {_array(*wanted[n])}"
    for n in sorted(saved.keys() & wanted.keys())
    if saved[n] != wanted[n]
  ]
  shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
  raise ValueError(f"cannot resume from {path.parent}: its {what} differ from this run's: {shown}")
