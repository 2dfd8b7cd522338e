"""Trains or fine-tunes a model.

python -m ll3m.train --load_checkpoint=params::DIR --logger.output_dir=DIR ...

All checks that need no weights are performed before weights are loaded. A run with the same flags
and output_dir resumes where it stopped, bit for bit, and no longer needs the model that it started
from.
"""

import functools
import os
import sys
import time
from collections.abc import Sequence

import jax
from etils import epath

from ll3m.core import flags, sharding
from ll3m.core.checkpoint import MANIFEST, model_meta
from ll3m.core.checkpoint_manager import RunCheckpoints
from ll3m.core.object_store import require_bucket, writing
from ll3m.core.options import require
from ll3m.core.output_lock import claim
from ll3m.core.progress import aligned
from ll3m.data import gin_settings
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import load_tokenizer
from ll3m.planning.remedies import advising
from ll3m.planning.training_plan import job_of
from ll3m.training import memory, metrics
from ll3m.training.config import FALLBACKS, FLAG_GROUPS, SHORT, without_effect
from ll3m.training.logger import Logger, say
from ll3m.training.loop import Loop
from ll3m.training.model_choice import check_length, check_same_model, choose_model
from ll3m.training.nonfinite import NonFiniteWatch
from ll3m.training.preemption import INTERRUPTED, StopRequest
from ll3m.training.profiling import Profiler
from ll3m.training.program import make_program
from ll3m.training.run import (
  PARTS,
  Run,
  find_start,
  fixed_settings,
  held_out_evaluation,
  initial_state,
  open_batches,
  open_held_out,
  show_batches,
  write_companions,
)
from ll3m.training.run_length import held_out_part, with_length
from ll3m.training.step import make_eval_step


def main(argv: Sequence[str] | None = None) -> int:
  """Trains on one or several hosts; see `flags.call` for `argv`.

  Returns:
    The exit code of `flags.call`, or that of an interrupted run.
  """
  return flags.call(_train, FLAG_GROUPS, argv, doc=__doc__, fallbacks=FALLBACKS, short=SHORT)


def _train(given: flags.Flags) -> int:
  """Checks the flags, prepares the run and trains.

  Returns:
    The exit code: 0 if the run is complete, another one if it was interrupted.
  """
  run = read_run(given)
  options = run.options
  if run.resumed is not None and run.resumed.step >= options.total_steps:
    print(
      f"{run.logger.output_dir} is already at step {run.resumed.step} of {options.total_steps}; "
      f"raise {'--epochs' if run.epochs else '--total_steps'} to train longer"
    )
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
    writing(run.logger.output_dir),
    claim(run.logger.output_dir),
    StopRequest() as stop,
    RunCheckpoints(
      run.logger.output_dir,
      run.checkpointer,
      milestone_steps=options.save_milestone_freq,
      unfinished=run.unfinished,
    ) as checkpoints,
    advising(job_of(run), plan),
  ):
    batches, held_out_batches = open_batches(run), open_held_out(run)
    show_batches(run, batches)
    # Load before compiling, which takes minutes for a large model, so that errors come early.
    state = initial_state(run, plan)
    checkpoints.set_aside_after(run.resumed.step if run.resumed else 0)
    write_companions(run)
    start = time.perf_counter()
    say("compiling the training step")
    fewest, most = _allowed_parts(given, run)
    train_step, parts = memory.compile_to_fit(
      train_step, plan.state, run.batch_shapes, fewest=fewest, most=most
    )
    say(f"compiled the training step in {time.perf_counter() - start:.1f} s")
    say(
      memory.describe(
        memory.used_bytes(train_step),
        run.mesh.devices.flat[0],
        rows=run.train_dataset.seqio_dataset.batch_size,
        parts=parts,
      )
    )
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
        flag_values=run.settings,
      ) as logger,
      profiler,
    ):
      loop = Loop(
        options=options,
        step=train_step,
        batches=batches,
        accumulate=run.optimizer.accumulate_gradient_steps,
        parts=parts,
        mesh=run.mesh,
        held_out=held_out,
        summarise=functools.partial(metrics.summarise, config=run.config, length=run.length),
        meta=model_meta(run.family.name, run.config)
        | {"settings": fixed_settings(options, run.optimizer, run.train_dataset) | {PARTS: parts}},
        watch=NonFiniteWatch(run.logger.output_dir, run.tokenizer, options.max_nonfinite_steps),
        checkpoints=checkpoints,
        logger=logger,
        profiler=profiler,
        stop=stop,
      )
      state, finished = loop.run(state)
  for name, stream in (("train", batches), ("eval", held_out_batches)):
    if stream is not None and (skipped := stream.skipped.describe_unreported()):
      say(f"{name}_dataset: {skipped}")
  output_dir = run.logger.output_dir
  if finished:
    use = f"python -m ll3m.generate --checkpoint={output_dir} --prompt=..."
    say(aligned([("finished", f"step {state.step} in {output_dir}"), ("to use it", use)]))
    return 0
  signal = "Ctrl-C" if stop.exit_code == INTERRUPTED else "SIGTERM"
  say(f"stopped by {signal} at step {state.step}; to resume, give the same command again")
  return stop.exit_code


def _allowed_parts(given: flags.Flags, run: Run) -> tuple[int, int]:
  """Returns the fewest and the most parts into which a micro-batch may be divided to fit.

  Only the default batch size is divided, on CPUs, whose memory other programs need too. The update
  is that of the whole batch, but for rounding; a resumed run therefore keeps its number of parts.
  """
  if run.resumed is not None:
    parts = run.resumed.meta.get("settings", {}).get(PARTS, 1)
    return parts, parts
  chosen = ("train_dataset.seqio_dataset.batch_size", "optimizer.accumulate_gradient_steps")
  if any(map(given.given, chosen)) or jax.process_count() > 1 or run.mesh.size > 1:
    return 1, 1
  is_cpu = run.mesh.devices.flat[0].platform == "cpu"
  return 1, run.train_dataset.seqio_dataset.batch_size if is_cpu else 1


def read_run(given: flags.Flags) -> Run:
  """Checks all flags against each other and against the files that they name.

  Raises:
    ValueError: A flag or a file is invalid.
    FileNotFoundError: A file is missing.
  """
  options, logger, optimizer = given[""], given["logger"], given["optimizer"]
  train_dataset, eval_dataset = given["train_dataset"], given["eval_dataset"]
  has_eval_data = given.given("eval_dataset.data")
  given.refuse(without_effect(options, has_eval_data=has_eval_data))
  if not options.dry_run:
    with given.within("logger"):
      require(logger, "output_dir")
      require_bucket(logger.output_dir)
      if (epath.Path(logger.output_dir) / MANIFEST).exists():
        raise ValueError(
          f"`output_dir`={logger.output_dir} holds a converted model; give the run its own folder"
        )
  mesh = sharding.make_mesh(options.mesh_dim)
  of_run = {
    "seed": options.seed,
    "strict": options.strict,
    "data_dir": options.data_dir,
    "eval_fraction": options.eval_fraction,
    "workers": os.cpu_count() or 1,
  }
  with given.within("train_dataset.seqio_dataset"):
    sharding.local_rows(mesh, train_dataset.seqio_dataset.batch_size)
  with given.within("train_dataset"):
    train_data, eval_data = resolve(train_dataset, **of_run), None
  if options.eval_fraction:
    eval_dataset = held_out_part(train_dataset)
    eval_data = resolve(eval_dataset, is_evaluation=True, **of_run)
  elif options.eval_steps or (has_eval_data and options.eval_steps is None):
    with given.within("eval_dataset.seqio_dataset"):
      sharding.local_rows(mesh, eval_dataset.seqio_dataset.batch_size)
    if eval_dataset.data is None and train_dataset.data is not None:
      raise ValueError(
        "`eval_dataset.data` (or `eval_fraction`) must be given, because held-out text is separate"
      )
    if eval_dataset.type == "json" and not eval_dataset.json_dataset.path:
      raise ValueError(
        "`eval_dataset.json_dataset.path` must be given, because held-out text is read from "
        "separate files"
      )
    with given.within("eval_dataset"):
      eval_data = resolve(eval_dataset, is_evaluation=True, **of_run)
  if not any(data.is_rows for data in (train_data, eval_data) if data is not None):
    given.refuse({"strict": "on mixtures"})
  settings = fixed_settings(options, optimizer, train_data.config)
  start = find_start(options, logger.output_dir, settings)
  resumed, source = start.resumed, start.source
  family, config = choose_model(options, resumed or source)
  if resumed is not None:  # all fields must match: a run cannot change its architecture
    check_same_model(config, resumed.config)
  with given.within("train_dataset.seqio_dataset"):
    check_length(train_dataset.seqio_dataset.length, config)
  if eval_data is not None:
    with given.within("eval_dataset.seqio_dataset"):
      check_length(eval_dataset.seqio_dataset.length, config)
  tokenizer_config = gin_settings.apply(options, given["tokenizer"])
  origin = resumed or source
  tokenizer = load_tokenizer(
    tokenizer_config,
    checkpoint_dir=None if origin is None else origin.tokenizer_dir,
    source_dir=None if origin is None else origin.source_dir,
    family=family.name,
    embedding_size=config.vocab_size,
  )
  run = Run(
    options=options,
    optimizer=optimizer,
    checkpointer=given["checkpointer"],
    logger=logger,
    train_data=train_data,
    eval_dataset=eval_dataset,
    eval_data=eval_data,
    **start._asdict(),
    family=family,
    config=config,
    tokenizer=tokenizer,
    tokenizer_config=tokenizer_config,
    mesh=mesh,
    settings=given.settings(leave_out=["jax_distributed"]),
  )
  return with_length(run)


if __name__ == "__main__":
  sys.exit(main())
