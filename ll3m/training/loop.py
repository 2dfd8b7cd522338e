"""The training loop: step, log, evaluate, save and stop."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from ll3m.core.checkpoint_manager import RunCheckpoints
from ll3m.data.batch import Batch
from ll3m.models.transformer import Params
from ll3m.training.config import LoopOptions
from ll3m.training.logger import Logger, duration
from ll3m.training.memory import divide
from ll3m.training.nonfinite import NonFiniteWatch
from ll3m.training.preemption import Stopped, StopRequest
from ll3m.training.profiling import Profiler
from ll3m.training.save_schedule import SaveSchedule
from ll3m.training.sharded_batches import stack_micro_steps, to_devices
from ll3m.training.step import StepMetrics, TrainState


@runtime_checkable
class Batches(Protocol):
  """Iterator over this process's batches [b, T]; its position can be saved."""

  def __iter__(self) -> Iterator[Batch]: ...
  def __next__(self) -> Batch: ...
  def state(self) -> Mapping[str, bytes]:
    """Returns the position, which is saved with the parameters."""
    ...


@dataclasses.dataclass(frozen=True)
class Loop:
  """The training loop and all that it uses.

  Attributes:
    options: Number of steps, and how often to log, save and evaluate.
    step: Compiled training step: (state, batch [A, B, T]) -> (state, metrics).
    batches: This process's rows of the training data.
    accumulate: A, number of micro-batches per step.
    parts: Number of parts into which each micro-batch is divided, to fit into memory.
    mesh: Mesh of devices.
    held_out: Evaluation (parameters -> record), or None.
    summarise: Function from metrics of consecutive steps, and `seconds`, to a log record.
    meta: Metadata to save with every step, in addition to its number and RNG state.
    watch: Handler of steps with a non-finite loss or gradient.
    checkpoints: Manager of the saved steps.
    logger: Writer of the records.
    profiler: Tracer of selected steps.
    stop: Listener for requests to stop.
  """

  options: LoopOptions
  step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
  batches: Batches
  accumulate: int
  mesh: Mesh
  held_out: Callable[[Params], dict[str, float]] | None
  summarise: Callable[..., dict[str, float]]
  meta: Mapping[str, Any]
  watch: NonFiniteWatch
  checkpoints: RunCheckpoints
  logger: Logger
  profiler: Profiler
  stop: StopRequest
  parts: int = 1

  def run(self, state: TrainState) -> tuple[TrainState, bool]:
    """Trains from the state's step to the last step, or until a stop is requested.

    A stop saves the current step. If it is requested at the last step, that step's evaluation is
    skipped.

    Returns:
      The final state, and whether it has reached the last step.

    Raises:
      FloatingPointError: Too many consecutive steps had a non-finite loss or gradient.
      OSError: A step could not be saved.
    """
    options, step = self.options, int(state.step)
    rng = np.asarray(state.rng).tolist()
    saving = SaveSchedule(
      options.total_steps,
      every_steps=options.save_model_freq,
      every_minutes=options.save_model_minutes,
    )
    under_way: tuple[int, StepMetrics, Batch] | None = None
    pending: list[StepMetrics] = []
    since = time.perf_counter()

    start = _Start(self.logger, step, options)

    def due(freq: int) -> bool:
      return step == options.total_steps or bool(freq and step % freq == 0)

    def finish(made: int, made_metrics: StepMetrics, rows: Batch) -> None:
      self.watch.look(made, made_metrics, rows)  # waits for the step
      self.logger.advance(made)
      start.finish(made, made_metrics)

    def log() -> None:
      nonlocal pending, since
      made = jax.device_get(pending)  # waits for the last step, whose time counts too
      self.logger.log(step, self.summarise(made, seconds=time.perf_counter() - since))
      self.logger.advance(step)
      pending, since = [], time.perf_counter()

    def save() -> None:
      self.logger.flush()
      saving.restart()
      self.checkpoints.save(
        step,
        params=state.params,
        opt_state=state.opt_state,
        meta=dict(self.meta) | {"step": step, "rng": rng},
        dataset=self.batches.state(),
      )

    # A stop request may have prevented the evaluation of the step that the run resumes from.
    evaluates_first = step == 0 or due(options.eval_freq)
    if self.held_out and evaluates_first and not self.logger.has(step, "eval_loss"):
      self.logger.log(step, self.held_out(state.params))
    self.stop.defer()
    while step < options.total_steps:
      with self.profiler.step(step + 1):
        batch = divide(stack_micro_steps(self.batches, self.accumulate), self.parts)
        state, step_metrics = self.step(state, to_devices(batch, self.mesh))
        if under_way:  # waits only now: devices run while the host reads the next batch
          finish(*under_way)
      step += 1
      self.profiler.finish(step, step_metrics)
      under_way = (step, step_metrics, batch)
      pending.append(step_metrics)
      self.checkpoints.check()
      try:
        self.stop.check(step)
        if due(options.log_freq):
          log()
        pause = time.perf_counter()
        if self.held_out and due(options.eval_freq):
          self.logger.log(step, self.held_out(state.params))
        if saving.due(step):
          save()
        since += time.perf_counter() - pause  # tokens/s excludes evaluation and saving
      except Stopped:
        if pending:
          log()
        save()
        if self.held_out and step == options.total_steps:
          self.logger.say("stop requested: skipped the last evaluation; ll3m.evaluate can run it")
        break
    if under_way:
      finish(*under_way)
    return state, step >= options.total_steps


class _Start:
  """Lines about the first steps of a run, before the first record: the first loss and the pace."""

  def __init__(self, logger: Logger, first_step: int, options: LoopOptions):
    self._logger, self._first, self._options = logger, first_step, options
    self._finished = 0.0

  def finish(self, step: int, metrics: StepMetrics) -> None:
    """Reports a step that has been computed, unless a record of it follows at once."""
    total, made, now = self._options.total_steps, step - self._first, time.perf_counter()
    if made == 1 < total and self._options.log_freq > 1 and metrics.sums.weight:
      loss = float(metrics.sums.loss / metrics.sums.weight)
      self._logger.say(f"step {step}/{total}  loss {loss:.4f}")
    elif made == 3 and self._options.log_freq > 3 and step < total:
      seconds = now - self._finished
      left = duration(seconds * (total - step))
      self._logger.say(f"about {seconds:.2g} s per step, {left} for the rest")
    self._finished = now
