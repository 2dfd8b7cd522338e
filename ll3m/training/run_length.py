"""The length of a training run: its steps, given or as epochs amount to, and its evaluations."""

import dataclasses

from ll3m.data.batching import open_dataset
from ll3m.data.config import DatasetConfig
from ll3m.data.epoch_estimate import estimate_epoch
from ll3m.training.config import DEFAULT_EPOCHS, DEFAULT_STEPS
from ll3m.training.run import Run, open_training_data


def held_out_part(dataset: DatasetConfig) -> DatasetConfig:
  """Returns the options of the evaluation data that `eval_fraction` takes from the training data.

  It is divided in the same way, but read in order.
  """
  rows = dataclasses.replace(dataset.seqio_dataset, shuffle=False)
  return dataclasses.replace(dataset, seqio_dataset=rows)


def with_length(run: Run) -> Run:
  """Returns a run with its number of steps, and how often it evaluates, as epochs decide them.

  If the rows are known, the training data is opened: its tokens are counted for runs of epochs, and
  else estimated.

  Raises:
    ValueError: The data does not match the options, or epochs cannot be counted.
  """
  options, data, epochs = run.options, run.train_data, None
  if options.total_steps is None and (data.is_countable or options.epochs):
    epochs = options.epochs or DEFAULT_EPOCHS
    data = dataclasses.replace(data.counted(), passes=epochs)
  elif options.eval_fraction:
    data = data.counted("eval_fraction")  # also for the rows that are held out
  run = dataclasses.replace(run, train_data=data)
  total_steps = options.total_steps or DEFAULT_STEPS
  if data.is_rows:
    run = dataclasses.replace(run, batches=open_training_data(run, data))
  if epochs:
    if run.dataset_state:  # a finished run that is given more epochs has padding at its old end
      run.batches.set_state(run.dataset_state)
    total_steps = run.batches.num_batches // run.optimizer.accumulate_gradient_steps
  elif data.is_countable:
    run = dataclasses.replace(run, estimate=estimate_epoch(run.batches.corpus, data))
  eval_data, eval_steps, eval_freq = run.eval_data, options.eval_steps, options.eval_freq
  if eval_data is not None and eval_steps is None:
    held_out = open_dataset(
      eval_data.counted("eval_steps"),
      run.tokenizer,
      rows=run.rows(eval_data.config),
      scanned=run.batches.corpus.tables if options.eval_fraction else None,
    )
    run = dataclasses.replace(run, held_out=held_out)
    eval_steps = held_out.num_batches
  if eval_freq is None:
    every_epoch = epochs and options.eval_steps is None and eval_data is not None
    eval_freq = max(1, total_steps // epochs) if every_epoch else 0
  length = {"total_steps": total_steps, "eval_steps": eval_steps or 0, "eval_freq": eval_freq}
  return dataclasses.replace(
    run, epochs=epochs, options=dataclasses.replace(options, epochs=None, **length)
  )
