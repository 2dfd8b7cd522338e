"""`ll3m.Trainer`: the training loop of ll3m.train for a `Model` and any optax optimizer."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from ll3m.api.model import Model
from ll3m.core import checkpoint, sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig, RunCheckpoints
from ll3m.core.model_folder import write_files
from ll3m.core.options import to_dict
from ll3m.core.output_lock import claim
from ll3m.data.batch import Batch
from ll3m.data.skipped_examples import Skipped
from ll3m.training import metrics, step
from ll3m.training.config import LoopOptions
from ll3m.training.evaluation import evaluate
from ll3m.training.logger import Logger, LoggerConfig, say
from ll3m.training.loop import Loop
from ll3m.training.nonfinite import NonFiniteWatch
from ll3m.training.preemption import EXIT_CODE, StopRequest
from ll3m.training.profiling import Profiler
from ll3m.training.program import jit_step
from ll3m.training.sharded_batches import batch_shapes
from ll3m.training.step import StepMetrics, TrainState
from ll3m.training.train_state import StatePlan, plan_state


class Trainer:
  """Training loop with the logging, evaluation, checkpoints and resuming of ll3m.train.

  ```
  trainer = ll3m.Trainer(model, optax.adamw(2e-5), batches, output_dir="runs/mine", total_steps=100)
  model = trainer.train()
  ```

  `ll3m.load` and every command accept the run's folder. A second `train` with the same folder
  resumes from its latest step.
  """

  def __init__(
    self,
    model: Model,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Batch],
    *,
    output_dir: str | os.PathLike[str],
    total_steps: int,
    loss_fn: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
    z_loss: float = 0.0,
    seed: int = 0,
    log_freq: int = 10,
    eval_batches: Iterable[Batch] | None = None,
    eval_steps: int = 0,
    eval_freq: int = 0,
    save_model_freq: int = 0,
    save_model_minutes: float = 15.0,
    save_milestone_freq: int = 0,
    max_to_keep: int = 2,
    max_nonfinite_steps: int = 5,
    tensorboard: bool = False,
  ):
    """Checks the options. Nothing is read, written or compiled before `train`.

    Args:
      model: The model to start from.
      optimizer: Any optax transformation.
      batches: Batches of [B, T]. Batches of `ll3m.data` save their position with every checkpoint;
        for other iterables, a resumed run reads the trained batches again and skips them.
      output_dir: The folder of the run, local or gs://.
      total_steps: Number of optimizer steps of the whole run.
      loss_fn: A loss to use instead of the next-token loss; see `ll3m.make_train_step`.
      accumulate: Number of batches whose gradients are accumulated in a step.
      schedule: Function from the number of updates to the learning rate, for reports only.
      z_loss: Weight of the z-loss in the default loss.
      seed: Random seed of the training state.
      log_freq: Steps between log records.
      eval_batches: Held-out batches, which are read once and kept in memory. None disables
        evaluation.
      eval_steps: Number of held-out batches to read; 0 for all.
      eval_freq: Steps between evaluations; 0 evaluates at the first and last step only.
      save_model_freq: Steps between checkpoints; 0 disables it. The last step is always saved.
      save_model_minutes: Minutes between checkpoints; 0 disables it.
      save_milestone_freq: Steps between milestones, checkpoints that are never deleted; 0 for none.
      max_to_keep: Number of latest checkpoints to keep in addition to milestones.
      max_nonfinite_steps: Number of consecutive non-finite steps after which training fails.
      tensorboard: Whether to write TensorBoard events.

    Raises:
      ValueError: An option is invalid.
    """
    if accumulate < 1:
      raise ValueError(f"`accumulate` must be at least 1, got {accumulate}")
    self._options = LoopOptions(
      total_steps=total_steps,
      log_freq=log_freq,
      eval_steps=eval_steps,
      eval_freq=eval_freq,
      save_model_freq=save_model_freq,
      save_model_minutes=save_model_minutes,
      save_milestone_freq=save_milestone_freq,
      max_nonfinite_steps=max_nonfinite_steps,
    )
    self._checkpointer = CheckpointerConfig(max_to_keep=max_to_keep)
    self._logger = LoggerConfig(output_dir=os.fspath(output_dir), tensorboard=tensorboard)
    self._model, self._optimizer, self._batches = model, optimizer, batches
    self._accumulate, self._schedule, self._seed = accumulate, schedule, seed
    self._z_loss, self._has_own_loss = z_loss, loss_fn is not None
    self._loss_fn = None if loss_fn is None else functools.partial(loss_fn, model)
    self._eval_batches = eval_batches

  def train(self) -> Model:
    """Trains up to `total_steps`, resuming from the latest step in the folder, if any.

    On SIGTERM and Ctrl-C the current step is saved; the same program resumes from it.

    Returns:
      The model with the parameters of the last step.

    Raises:
      ValueError: The folder holds a run of another model or optimizer, or another job uses it.
      FloatingPointError: Too many consecutive steps were not finite.
      OSError: A step could not be saved.
      KeyboardInterrupt: The user pressed Ctrl-C.
      SystemExit: The process received SIGTERM. The exit code is 75, as for ll3m.train.
    """
    output = epath.Path(self._logger.output_dir)
    if (output / checkpoint.MANIFEST).exists():
      raise ValueError(f"`output_dir` {output} holds a saved model; give the run its own folder")
    mesh = self._model.mesh or sharding.make_mesh("1,1,1", jax.devices()[:1])
    first = jax.tree.leaves(self._model.params)[0]
    plan = plan_state(
      self._model.decoder, self._optimizer, mesh, param_dtype=jnp.dtype(first.dtype).name
    )
    steps = checkpoint.list_steps(output)
    resumed = steps.open_latest() if steps.finished else None
    if resumed is not None and resumed.config != self._model.config:
      raise ValueError(f"`output_dir` {output} holds a run of another model")
    if resumed is not None and resumed.step >= self._options.total_steps:
      say(f"{output} is already at step {resumed.step} of {self._options.total_steps}")
      params = resumed.load_params(dtype=first.dtype, shardings=plan.param_shardings)
      return self._model.replace(params=params)
    with (
      claim(output),
      StopRequest(ends_process=False) as stop,
      RunCheckpoints(
        output,
        self._checkpointer,
        milestone_steps=self._options.save_milestone_freq,
        unfinished=steps.unfinished,
      ) as checkpoints,
    ):
      state, finished = self._run(plan, mesh, resumed, checkpoints, stop)
    if finished:
      return self._model.replace(params=state.params)
    say(f"stopped at step {int(state.step)}; the same program resumes from here")
    raise SystemExit(EXIT_CODE) if stop.exit_code == EXIT_CODE else KeyboardInterrupt

  def _run(
    self,
    plan: StatePlan,
    mesh: Mesh,
    resumed: checkpoint.Checkpoint | None,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
  ) -> tuple[TrainState, bool]:
    options, model = self._options, self._model
    if resumed is not None:
      say(f"resuming from step {resumed.step} in {self._logger.output_dir}")
      state = resumed.restore_state(plan.state)
    else:
      rng = jax.random.key_data(jax.random.key(self._seed))
      params = jax.tree.map(jnp.copy, model.params)  # the step donates its state
      state = plan.start(jax.device_put(params, plan.param_shardings), rng)
    checkpoints.set_aside_after(resumed.step if resumed else 0)
    if resumed is None:
      self._write_files()
    batches = _Stream(self._batches, resumed, self._accumulate)
    rows = batches.peek()
    compiled = jit_step(
      step.make_train_step(
        model.decoder, self._optimizer, self._schedule, z_loss=self._z_loss, loss_fn=self._loss_fn
      ),
      plan,
    )
    shapes = batch_shapes(mesh, self._accumulate, *rows.inputs.shape)
    with Logger(
      self._logger,
      total_steps=options.total_steps,
      first_step=int(state.step),
      flag_values=to_dict(options) | {"accumulate": self._accumulate, "seed": self._seed},
    ) as logger:
      loop = Loop(
        options=options,
        step=compiled.lower(plan.state, shapes).compile(),
        batches=batches,
        accumulate=self._accumulate,
        mesh=mesh,
        held_out=self._held_out(mesh, stop),
        summarise=functools.partial(self._summarise, length=rows.inputs.shape[1]),
        meta=checkpoint.model_meta(model.family, model.config),
        watch=NonFiniteWatch(self._logger.output_dir, model.tokenizer, options.max_nonfinite_steps),
        checkpoints=checkpoints,
        logger=logger,
        profiler=Profiler(self._logger.output_dir, range(0)),
        stop=stop,
      )
      return loop.run(state)

  def _write_files(self) -> None:
    """Writes tokenizer and config files beside the checkpoints, as ll3m.train does."""
    if jax.process_index():
      return
    tokenizer = self._model.tokenizer
    write_files(
      epath.Path(self._logger.output_dir),
      {
        checkpoint.TOKENIZER: {} if tokenizer is None else tokenizer.files(),
        checkpoint.SOURCE: self._model.source_files,
      },
    )

  def _held_out(self, mesh: Mesh, stop: StopRequest) -> Callable[[Any], dict[str, float]] | None:
    if self._eval_batches is None:
      return None
    eval_step = jax.jit(step.make_eval_step(self._model.decoder))
    batches = list(itertools.islice(self._eval_batches, self._options.eval_steps or None))
    skipped = getattr(self._eval_batches, "skipped", Skipped(strict=False))

    def record(params: Any) -> dict[str, float]:
      found = evaluate(
        eval_step,
        params,
        batches,
        steps=len(batches),
        mesh=mesh,
        skipped=skipped,
        on_batch=stop.check,
      )
      return {f"eval_{name}": value for name, value in found.items()}

    return record

  def _summarise(
    self, steps: Sequence[StepMetrics], *, seconds: float, length: int
  ) -> dict[str, float]:
    record = metrics.summarise(steps, seconds=seconds, config=self._model.config, length=length)
    unknown = ("accuracy", "z_loss") if self._has_own_loss else ()
    return {name: value for name, value in record.items() if name not in unknown}


class _Stream:
  """The batches of a run from its first or resumed step; see `loop.Batches`."""

  def __init__(
    self, batches: Iterable[Batch], resumed: checkpoint.Checkpoint | None, accumulate: int
  ):
    self._keeps_position = hasattr(batches, "state") and hasattr(batches, "set_state")
    self._source: Any = batches if self._keeps_position else iter(batches)
    self._next: Batch | None = None
    if resumed is not None and self._keeps_position:
      self._source.set_state(resumed.dataset_state())
    elif resumed is not None:
      for _ in range(resumed.step * accumulate):
        next(self)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    if self._next is not None:
      found, self._next = self._next, None
      return found
    try:
      return next(self._source)
    except StopIteration:
      raise ValueError(
        "`batches` ended before the last step; give more batches or reduce `total_steps`"
      ) from None

  def peek(self) -> Batch:
    """Returns the next batch without consuming it."""
    self._next = next(self)
    return self._next

  def state(self) -> Mapping[str, bytes]:
    """Returns the position to save; empty if the number of steps determines it."""
    return self._source.state() if self._keeps_position else {}
