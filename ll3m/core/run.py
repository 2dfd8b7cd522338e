"""The checkpoints of a training run: saved asynchronously, kept by policy, restored exactly."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ll3m.core import checkpoint as folders
from ll3m.core import digests, options
from ll3m.core.checkpoint import BytesRestore, BytesSave, flatten, nest
from ll3m.core.storage import is_remote

_TIMES = "_CHECKPOINT_METADATA"  # Orbax's, which it writes once more when all else is done
DAMAGED = "damaged"  # where steps go that cannot be gone on from, beside `checkpoints/`


@dataclasses.dataclass(frozen=True)
class CheckpointerConfig:
  """The options of checkpointing."""

  save_optimizer_state: bool = options.option(
    True, "Save what resuming needs; False saves the parameters alone."
  )
  max_to_keep: int = options.option(
    2, "How many of the latest checkpoints are kept, beside the milestones."
  )

  def __post_init__(self):
    if self.max_to_keep < 1:
      raise ValueError(f"`max_to_keep` must be at least 1, got {self.max_to_keep}")


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
      config: The options of checkpointing.
      milestone_steps: checkpoints at multiples of this are never deleted; 0 for none.
    """
    self._config = config
    self._saving = 0  # the step that is, or was last, being saved
    steps = folders.absolute(output_dir) / folders.STEPS
    if is_remote(steps):
      _clear_unfinished(steps)
    policies = [ocp.checkpoint_managers.LatestN(config.max_to_keep)]
    if milestone_steps:
      policies.append(ocp.checkpoint_managers.EveryNSteps(milestone_steps))
    self._manager = ocp.CheckpointManager(
      steps,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=not is_remote(steps),
        async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
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
      with self._explaining():
        self._manager.wait_until_finished()
    self._manager.close()

  def check(self) -> None:
    """Demands that what is saved in the background goes well so far.

    Raises:
      OSError: it does not.
    """
    with self._explaining():
      self._manager.check_for_errors()

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
      OSError: it cannot be saved, or the save before, which ran in the background, went wrong.
    """
    items = {
      folders.PARAMS: ocp.args.PyTreeSave(nest(params)),
      folders.META: ocp.args.JsonSave(dict(meta)),
    }
    if self._config.save_optimizer_state:
      items[folders.OPTIMIZER] = ocp.args.PyTreeSave(_leaves(opt_state))
      items[folders.DATASET] = BytesSave(dict(dataset))
    with self._explaining():
      self._manager.wait_until_finished()  # with the save before, so that its error is its own
    self._saving = step
    with self._explaining():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  @contextlib.contextmanager
  def _explaining(self) -> Iterator[None]:
    """Says of an error which step it cost.

    Raises:
      OSError: instead of whatever was raised.
    """
    try:
      yield
    except Exception as error:
      said = str(error).strip().partition("\n")[0].partition(" [")[0]
      # What a disk says is enough; a mistake of ours is only understood with its kind.
      kind = "" if said and isinstance(error, OSError | ValueError) else type(error).__name__
      reason = ": ".join(part for part in (kind, said) if part)
      raise OSError(
        f"step {self._saving} could not be saved in {self._manager.directory}: {reason}; the steps "
        f"before it are untouched"
      ) from error

  def _seal(self) -> None:
    """Adds the digests to the step that was saved; Orbax calls this before the step counts."""
    if jax.process_index():
      return
    step = self._manager.directory / str(self._saving)
    # Object stores cannot rename: there, a step has its own name from the beginning.
    for folder in (step, step.with_name(f"{step.name}{ocp.utils.TMP_DIR_SUFFIX}")):
      if folder.exists():
        digests.write(folder, leave_out=[_TIMES])

  def restore(self, step: int, *, params: Any, opt_state: Any) -> Position:
    """Restores a step of this output_dir to go on from; see `restore_step`."""
    return restore_step(self._manager.directory / str(step), params=params, opt_state=opt_state)

  def set_aside_after(self, step: int) -> None:
    """Moves the steps after this one, from which a run does not go on, to output_dir/damaged.

    They will be made again, and Orbax saves no step twice.

    Raises:
      FileExistsError: one of them is good: another job has just saved it.
    """
    later = [found for found in self._manager.all_steps() if found > step]
    for damaged in later:
      with contextlib.suppress(ValueError):
        folders.open_checkpoint(self._manager.directory / str(damaged))
        raise FileExistsError(
          f"step {damaged} was saved by another job after this one had looked for it; start again"
        )
    if later:
      _meet("all processes have looked at the damaged steps")
      if not jax.process_index():
        for damaged in later:
          self._set_aside(damaged)
      _meet("damaged steps are set aside")
    self._manager.reload()

  def _set_aside(self, step: int) -> None:
    home = self._manager.directory.parent / DAMAGED
    home.mkdir(exist_ok=True)
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
    place = next(home / name for name in names if not (home / name).exists())
    (self._manager.directory / str(step)).rename(place)
    logging.warning("the damaged step %d was moved to %s", step, place)


def _clear_unfinished(steps: epath.Path) -> None:
  """Deletes the steps in an object store that were not saved to their end.

  They have their own name from the beginning, and Orbax takes every folder for one of them that it
  did not finish: a foreign one too.
  """
  if jax.process_index() == 0 and steps.is_dir():
    finished = folders.finished_steps(steps.parent)
    for folder in steps.iterdir():
      if folder.name.isdigit() and int(folder.name) not in finished:
        folder.rmtree()
  _meet("unfinished steps are cleared")


def _meet(where: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


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
  opened = folders.open_checkpoint(path, verify=False)  # whoever chose the step has done so
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
      f"(`checkpointer.save_optimizer_state`=False); start a new run with "
      f"`load_checkpoint`=params::{path}"
    )


def restore_dataset_state(path: epath.PathLike, *, verify: bool = True) -> dict[str, bytes]:
  """Reads only the position in the data, from a step folder or a run's output_dir.

  Raises:
    ValueError: it was not saved there, or the step is damaged.
  """
  path = folders.open_checkpoint(path, verify=verify).path / folders.DATASET
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
