"""The checkpoints of a training run: saved asynchronously and retained by policy."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ll3m.core import checkpoint as folders
from ll3m.core import checksums, options
from ll3m.core.checkpoint_items import BytesHandler, BytesSave, nest
from ll3m.core.object_store import is_remote

_TIMES = "_CHECKPOINT_METADATA"  # Orbax rewrites this file after all others
DAMAGED = "damaged"  # folder, beside `checkpoints/`, of steps that cannot be resumed from


@dataclasses.dataclass(frozen=True)
class CheckpointerConfig:
  """Options of checkpointing."""

  save_optimizer_state: bool = options.option(
    True, "Save everything that resuming needs. False saves only the parameters."
  )
  max_to_keep: int = options.option(
    2, "Number of latest checkpoints to keep, in addition to the milestones."
  )

  def __post_init__(self):
    if self.max_to_keep < 1:
      raise ValueError(f"`max_to_keep` must be at least 1, got {self.max_to_keep}")


class RunCheckpoints:
  """The checkpoints of one output_dir, saved in the background; use as a context manager."""

  def __init__(
    self,
    output_dir: epath.PathLike,
    config: CheckpointerConfig,
    *,
    milestone_steps: int = 0,
    unfinished: Sequence[int] = (),
  ):
    """Opens output_dir/checkpoints and creates it if necessary.

    Args:
      output_dir: The folder of the run.
      config: The options of checkpointing.
      milestone_steps: Interval in steps; checkpoints at its multiples are never deleted. 0 for
        none.
      unfinished: The steps that an earlier job did not finish saving, as found by `list_steps`.
    """
    self._config = config
    self._saving = 0  # the step of the current or latest save
    steps = folders.absolute(output_dir) / folders.STEPS
    if is_remote(steps):
      _clear_unfinished(steps, unfinished)
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
        folders.DATASET: BytesHandler(),
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
    """Raises if a save in the background has failed; does not wait for one that is running.

    Raises:
      OSError: A save has failed.
    """
    # If Orbax's own thread does not see the error, it deletes older steps as if the save had
    # succeeded. `check_for_errors` could clear the error first; `wait_until_finished` does not.
    if not self._manager.is_saving_in_progress():
      with self._explaining():
        self._manager.wait_until_finished()

  def save(
    self,
    step: int,
    *,
    params: Any,
    opt_state: Any,
    meta: Mapping[str, Any],
    dataset: Mapping[str, bytes],
  ) -> None:
    """Starts saving a step; returns once its arrays have been copied.

    Raises:
      OSError: The step cannot be saved, or the previous save failed in the background.
    """
    items = {
      folders.PARAMS: ocp.args.PyTreeSave(nest(params)),
      folders.META: ocp.args.JsonSave(dict(meta)),
    }
    if self._config.save_optimizer_state:
      items[folders.OPTIMIZER] = ocp.args.PyTreeSave(folders.name_leaves(opt_state))
      items[folders.DATASET] = BytesSave(dict(dataset))
    with self._explaining():
      self._manager.wait_until_finished()  # so that errors of the previous save name that step
    self._saving = step
    with self._explaining():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  @contextlib.contextmanager
  def _explaining(self) -> Iterator[None]:
    """Converts any error to an `OSError` that names the step.

    Raises:
      OSError: Saving failed, for whatever reason.
    """
    try:
      yield
    except Exception as error:
      said = str(error).strip().partition("\n")[0].partition(" [")[0]
      # The message of a disk error is enough; other errors need their type.
      kind = "" if said and isinstance(error, OSError | ValueError) else type(error).__name__
      reason = ": ".join(part for part in (kind, said) if part)
      raise OSError(
        f"step {self._saving} could not be saved in {self._manager.directory}: {reason}; earlier "
        f"steps are unaffected"
      ) from error

  def _seal(self) -> None:
    """Writes the digests of the step's files; Orbax calls this before it completes the step."""
    if jax.process_index():
      return
    step = self._manager.directory / str(self._saving)
    # A local step still has its temporary name; in an object store, it already has its final one.
    for folder in (step, step.with_name(f"{step.name}{ocp.utils.TMP_DIR_SUFFIX}")):
      if folder.exists():
        checksums.write(folder, leave_out=[_TIMES])

  def set_aside_after(self, step: int) -> None:
    """Moves the later steps, which cannot be resumed from, to output_dir/damaged.

    The run will reach these steps again, and Orbax does not overwrite steps.

    Raises:
      FileExistsError: One of these steps is good: another job has just saved it.
    """
    later = [found for found in self._manager.all_steps() if found > step]
    for damaged in later:
      with contextlib.suppress(ValueError):
        folders.open_checkpoint(self._manager.directory / str(damaged))
        raise FileExistsError(
          f"step {damaged} was saved by another job after this job listed the steps; rerun this job"
        )
    if later:
      _meet("all processes have checked the damaged steps")
      if not jax.process_index():
        for damaged in later:
          self._set_aside(damaged)
      _meet("damaged steps have been moved")
      self._manager.reload()

  def _set_aside(self, step: int) -> None:
    home = self._manager.directory.parent / DAMAGED
    home.mkdir(exist_ok=True)
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
    place = next(home / name for name in names if not (home / name).exists())
    (self._manager.directory / str(step)).rename(place)
    logging.warning("moved the damaged step %d to %s", step, place)


def _clear_unfinished(steps: epath.Path, unfinished: Sequence[int]) -> None:
  """Deletes the steps in an object store whose save did not finish.

  Orbax's own cleanup is disabled, because it would also delete unrelated folders. A step that
  another job has finished since the listing is kept. An unfinished step begun since then also
  stays; Orbax replaces it when this run saves it.
  """
  if jax.process_index() == 0:
    for folder in (steps / str(step) for step in unfinished):
      if folder.exists() and not ocp.utils.is_checkpoint_finalized(folder):
        folder.rmtree()
  _meet("unfinished steps have been deleted")


def _meet(where: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)
