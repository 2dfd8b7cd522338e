"""Trains or fine-tunes a model: `python -m ll3m.train --help`.

Everything that can be checked is checked before weights are loaded. A run with the same flags in
the same output_dir resumes where it stopped, to the bit, without what it was loaded from.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ll3m.core import flags, processes, sharding
from ll3m.core.checkpoint import MANIFEST, finished_steps, model_meta, open_checkpoint
from ll3m.core.claim import claim
from ll3m.core.run import CheckpointerConfig, RunCheckpoints, restore_dataset_state
from ll3m.core.storage import require_bucket
from ll3m.data import gin_settings
from ll3m.data.batch import Batch
from ll3m.data.config import DatasetConfig, TokenizerConfig, refuse_strict, refuse_unread
from ll3m.data.spec import resolve
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.sources import open_source
from ll3m.planning.remedies import advising
from ll3m.planning.training import job_of
from ll3m.training import metrics
from ll3m.training.inputs import stack_micro_steps, to_devices
from ll3m.training.logger import Logger, LoggerConfig, say
from ll3m.training.nonfinite import NonFiniteWatch
from ll3m.training.optimizer import OptimizerConfig, refuse_unchosen
from ll3m.training.options import FLAG_GROUPS, TrainOptions
from ll3m.training.profiling import Profiler
from ll3m.training.program import make_program
from ll3m.training.run import (
  Run,
  check_settings,
  fixed_settings,
  held_out_evaluation,
  initial_state,
  open_batches,
  open_held_out,
  show_batches,
  write_companions,
)
from ll3m.training.saving import SaveSchedule
from ll3m.training.setup import check_length, check_same_model, choose_model
from ll3m.training.step import StepMetrics, TrainState, make_eval_step
from ll3m.training.stopping import INTERRUPTED, Stopped, StopRequest

for prefix, options_class in FLAG_GROUPS.items():
  flags.define(prefix, options_class)


def main() -> None:
  """Trains, on this host alone or together with others."""
  values = {group: flags.read(group, options) for group, options in FLAG_GROUPS.items()}
  with processes.joined(values["jax_distributed"], values):
    exit_code = run_to_the_end()
  if exit_code:  # only now: all processes have left in peace
    signal = "Ctrl-C" if exit_code == INTERRUPTED else "SIGTERM"
    say(f"stopped by {signal}; the same command resumes from here")
    sys.exit(exit_code)


def run_to_the_end() -> int:
  """Reads what to train, prepares it and trains.

  Returns:
    Exit code: 0 if the run is done, another one if it was asked to stop before.
  """
  run = read_run()
  options = run.options
  if run.resumed is not None and run.resumed.step >= options.total_steps:
    print(f"{run.logger.output_dir} is already at step {run.resumed.step} of {options.total_steps}")
    return 0
  program = make_program(options, run.optimizer, run.config, run.mesh)
  plan, train_step = program.plan, program.step
  if options.dry_run:
    print(run.describe(plan))
    jax.eval_shape(train_step, plan.state, run.batch_shapes())
    if options.show_batches:
      show_batches(run, open_batches(run))
    print("the training step traces; nothing was trained (--dry_run)")
    return 0
  say(run.describe(plan))
  with (
    claim(run.logger.output_dir),
    StopRequest() as stop,
    RunCheckpoints(
      run.logger.output_dir, run.checkpointer, milestone_steps=options.save_milestone_freq
    ) as checkpoints,
    advising(job_of(run), plan),
  ):
    batches, held_out_batches = open_batches(run), open_held_out(run)
    show_batches(run, batches)
    # Before compiling, which takes minutes for a large model: what is wrong here is told at once.
    state = initial_state(run, plan, checkpoints)
    checkpoints.set_aside_after(run.resumed.step if run.resumed else 0)
    write_companions(run)
    start = time.perf_counter()
    say("compiling the training step")
    train_step = train_step.lower(plan.state, run.batch_shapes()).compile()
    say(f"compiled the training step in {time.perf_counter() - start:.1f} s")
    held_out = None
    if held_out_batches is not None:
      evaluate = jax.jit(make_eval_step(program.model))
      held_out = held_out_evaluation(run, held_out_batches, evaluate, stop)
    profiler = Profiler(run.logger.output_dir, options.profiled(), made=int(state.step))
    with (
      Logger(
        run.logger,
        total_steps=options.total_steps,
        first_step=int(state.step),
        flag_values=run.settings(),
      ) as logger,
      profiler,
    ):
      finished = train(
        run, state, batches, train_step, held_out, checkpoints, logger, profiler, stop
      )
  for name, stream in (("train", batches), ("eval", held_out_batches)):
    if stream is not None and (skipped := stream.skipped.describe_unreported()):
      say(f"{name}_dataset: {skipped}")
  return 0 if finished else stop.exit_code


def train(
  run: Run,
  state: TrainState,
  batches: Any,
  train_step: Callable,
  held_out: Callable[[Any], dict[str, float]] | None,
  checkpoints: RunCheckpoints,
  logger: Logger,
  profiler: Profiler,
  stop: StopRequest,
) -> bool:
  """Steps from where the state stands to the end of the run.

  Returns:
    Whether it came there; if not, it was asked to stop and has saved the step it had reached.
    Asked at the last step, it came there, but its evaluation is left out.
  """
  options, step = run.options, int(state.step)
  rng = np.asarray(state.rng).tolist()
  settings = fixed_settings(options, run.optimizer, run.train_dataset)
  saving = SaveSchedule(
    options.total_steps,
    every_steps=options.save_model_freq,
    every_minutes=options.save_model_minutes,
  )
  watch = NonFiniteWatch(run.logger.output_dir, run.tokenizer, options.max_nonfinite_steps)
  under_way: tuple | None = None
  pending: list = []
  since = time.perf_counter()

  def due(freq: int) -> bool:
    return step == options.total_steps or bool(freq and step % freq == 0)

  def finish(made: int, made_metrics: StepMetrics, rows: Batch) -> None:
    watch.look(made, made_metrics, rows)  # which waits for the step
    logger.advance(made)

  def log() -> None:
    nonlocal pending, since
    logger.log(
      step,
      metrics.summarise(
        jax.device_get(pending),
        seconds=time.perf_counter() - since,
        config=run.config,
        length=run.length,
      ),
    )
    logger.advance(step)
    pending, since = [], time.perf_counter()

  def save() -> None:
    logger.flush()
    saving.restart()
    checkpoints.save(
      step,
      params=state.params,
      opt_state=state.opt_state,
      meta=model_meta(run.family.name, run.config)
      | {"step": step, "rng": rng, "settings": settings},
      dataset=batches.state(),
    )

  # Also that of the step which the run goes on from, if it was asked to stop before or within it.
  if held_out and (step == 0 or due(options.eval_freq)) and not logger.has(step, "eval_loss"):
    logger.log(step, held_out(state.params))
  stop.defer()
  while step < options.total_steps:
    with profiler.step(step + 1):
      batch = stack_micro_steps(batches, run.optimizer.accumulate_gradient_steps)
      state, step_metrics = train_step(state, to_devices(batch, run.mesh))
      if under_way:  # one step is always under way while the next batch is read
        finish(*under_way)
    step += 1
    profiler.finish(step, step_metrics)
    under_way = (step, step_metrics, batch)
    pending.append(step_metrics)
    checkpoints.check()
    try:
      stop.check(step)
      if due(options.log_freq):
        log()
      pause = time.perf_counter()
      if held_out and due(options.eval_freq):
        logger.log(step, held_out(state.params))
      if saving.due(step):
        save()
      since += time.perf_counter() - pause  # tokens/s is the training's
    except Stopped:
      if pending:
        log()
      save()
      if held_out and step == options.total_steps:
        logger.say("asked to stop: the last evaluation is left out; ll3m.evaluate makes it")
      break
  if under_way:
    finish(*under_way)
  return step >= options.total_steps


def read_run() -> Run:
  """Reads all flags and checks them against each other and against what is on disk.

  Raises:
    ValueError: what is wrong, in one sentence.
    FileNotFoundError: what is missing.
  """
  options = flags.read("", TrainOptions)
  logger = flags.read("logger", LoggerConfig)
  if not options.dry_run:
    flags.require(logger.output_dir, "logger.output_dir")
    require_bucket(logger.output_dir)
    if (epath.Path(logger.output_dir) / MANIFEST).exists():
      raise ValueError(
        f"--logger.output_dir={logger.output_dir} holds a converted model: give a folder of the "
        f"run's own"
      )
  optimizer = flags.read("optimizer", OptimizerConfig)
  refuse_unchosen(optimizer, "optimizer", options.param_dtype)
  train_dataset = flags.read("train_dataset", DatasetConfig)
  refuse_unread(train_dataset, "train_dataset")
  eval_dataset = read_eval_dataset(options)
  refuse_strict(train_dataset, eval_dataset)
  kind, _, path = (options.load_checkpoint or "").partition("::")
  mesh = sharding.make_mesh(options.mesh_dim)
  sharding.local_rows(mesh, train_dataset.seqio_dataset.batch_size)
  of_run = {"seed": options.seed, "strict": options.strict, "data_dir": options.data_dir}
  train_data, eval_data = resolve(train_dataset, prefix="--train_dataset.", **of_run), None
  if options.eval_steps:
    held_out = {"split_default": "validation", "repeat": False, "prefix": "--eval_dataset."}
    eval_data = resolve(eval_dataset, **held_out, **of_run)
    sharding.local_rows(mesh, eval_dataset.seqio_dataset.batch_size)
  settings = fixed_settings(options, optimizer, train_dataset)
  resumed = source = None
  dataset_state = {}
  if logger.output_dir and finished_steps(logger.output_dir):
    resumed = open_checkpoint(logger.output_dir, verify=options.verify)
    if resumed.step < options.total_steps:
      check_settings(resumed, settings)
      dataset_state = restore_dataset_state(resumed.path, verify=False)
  elif options.load_checkpoint:
    source = open_source(options.load_checkpoint if kind == "hf" else path, verify=options.verify)
    if kind.startswith("trainstate") and source.step is None:
      raise ValueError(f"--load_checkpoint={kind}:: needs a training run, {path} is none")
    if kind == "trainstate":
      settings.pop("train_dataset.seqio_dataset.num_shards")  # other data may follow
      check_settings(open_checkpoint(source.path, verify=False), settings)
  if resumed is None and options.load_dataset_state:
    dataset_state = restore_dataset_state(options.load_dataset_state, verify=options.verify)
  family, config = choose_model(options, resumed or source)
  if resumed is not None:  # in all fields: what is trained does not change under way
    check_same_model(config, resumed.config)
  check_length(train_dataset.seqio_dataset.length, config)
  if options.eval_steps:
    check_length(eval_dataset.seqio_dataset.length, config)
  tokenizer_config = gin_settings.apply(options, flags.read("tokenizer", TokenizerConfig))
  origin = resumed or source
  tokenizer = load_tokenizer(
    tokenizer_config,
    checkpoint_dir=None if origin is None else origin.tokenizer_dir,
    source_dir=None if origin is None else origin.source_dir,
    family=family.name,
    embedding_size=config.vocab_size,
  )
  return Run(
    options=options,
    optimizer=optimizer,
    checkpointer=flags.read("checkpointer", CheckpointerConfig),
    logger=logger,
    train_data=train_data,
    eval_dataset=eval_dataset,
    eval_data=eval_data,
    load_kind=kind or None,
    source=source,
    resumed=resumed,
    dataset_state=dataset_state,
    family=family,
    config=config,
    tokenizer=tokenizer,
    tokenizer_config=tokenizer_config,
    mesh=mesh,
  )


def read_eval_dataset(options: TrainOptions) -> DatasetConfig:
  """Reads --eval_dataset.*; what was not given is as for training, but for what it reads.

  The split is the validation split, and files have to be named anew: held-out text is not what
  is trained on.

  Raises:
    ValueError: the options make no sense, or have no effect.
  """
  if not options.eval_steps:
    for name in ("eval_dataset", "eval_freq"):
      flags.refuse(name, "without --eval_steps")
  config = flags.read("eval_dataset", DatasetConfig, fallback="train_dataset")
  own = flags.read("eval_dataset", DatasetConfig)
  config = dataclasses.replace(
    config,
    seqio_dataset=dataclasses.replace(
      config.seqio_dataset, split=own.seqio_dataset.split, shuffle=own.seqio_dataset.shuffle
    ),
    json_dataset=own.json_dataset,
    huggingface_dataset=dataclasses.replace(
      config.huggingface_dataset, split=own.huggingface_dataset.split
    ),
  )
  if options.eval_steps:
    refuse_unread(config, "eval_dataset")
    if config.type == "json" and not config.json_dataset.path:
      raise ValueError(
        "--eval_dataset.json_dataset.path must be given: held-out text is read from files of its "
        "own"
      )
  return config


if __name__ == "__main__":
  flags.run(main)
