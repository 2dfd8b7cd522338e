"""Losses and gradients that are not finite."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ll3m import families
from ll3m.core import checkpoint
from ll3m.data.batch import Batch
from ll3m.models.transformer import make_model
from ll3m.training import metrics
from ll3m.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from ll3m.training.preemption import EXIT_CODE
from ll3m.training.step import init_state, make_train_step
from tests.faults.causing import files
from tests.tiny_runs import arrays

CONFIG = families.get_preset("llama2_7b").config.replace(
  vocab_size=31, d_model=8, d_ff=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
  max_positions=16,
)  # fmt: skip
POISON = 7  # the token whose embedding is not finite


def batch(seed: int, poison: tuple[int, int, int] | None = None, micro_steps: int = 2) -> Batch:
  tokens = np.random.default_rng(seed).integers(8, 31, (micro_steps, 2, 9), dtype=np.int32)
  if poison:
    tokens[poison] = POISON
  shape = (micro_steps, 2, 8)
  return Batch(
    inputs=tokens[..., :-1],
    targets=tokens[..., 1:],
    mask=np.ones(shape, np.float32),
    segment_ids=np.ones(shape, np.int32),
    positions=np.broadcast_to(np.arange(8, dtype=np.int32), shape).copy(),
  )


@pytest.mark.parametrize(
  ("optimizer", "value"),
  [("adamw", np.nan), ("adafactor", np.inf), ("lion", -np.inf), ("sgd", np.nan)],
)
def test_nonfinite_step_changes_neither_the_state_nor_later_steps(optimizer, value):
  model = make_model(CONFIG)
  config = OptimizerConfig(type=optimizer)
  rule, schedule = make_optimizer(config, 10), make_schedule(config.chosen, 10)
  params = model.init(jax.random.key(0))
  row = params["embed"]["embedding"].at[POISON].set(value)
  params["embed"] = {"embedding": row}
  step = jax.jit(make_train_step(model, rule, schedule))
  start = init_state(params, rule, jnp.zeros(2, jnp.uint32))

  def run(*batches):
    state, skipped, rates = start, [], []
    for each in batches:
      state, outcome = step(state, each)
      skipped.append(float(outcome.skipped))
      rates.append(float(outcome.learning_rate))
    return state, skipped, rates

  bad = [batch(1, poison=(0, 0, 2)), batch(2, poison=(1, 1, 7)), batch(3, poison=(1, 0, 0))]
  state, skipped, rates = run(batch(4), *bad, batch(5))
  assert skipped == [0, 1, 1, 1, 0]
  assert int(state.step) == 5
  clean, _, clean_rates = run(batch(4), batch(5))
  first, second = clean_rates
  assert first > second == pytest.approx(float(schedule(1)))
  assert rates == [first, *[second] * 4]  # the schedule does not advance either
  for name in ("params", "opt_state"):
    ours, theirs = (jax.tree.leaves(getattr(s, name)) for s in (state, clean))
    assert [x.tobytes() for x in map(np.asarray, ours)] == [
      x.tobytes() for x in map(np.asarray, theirs)
    ]
  # A clean step does change something.
  assert any(
    np.asarray(a).tobytes() != np.asarray(b).tobytes()
    for a, b in zip(jax.tree.leaves(clean.params), jax.tree.leaves(start.params), strict=True)
  )


def test_records_count_nonfinite_steps_and_average_the_others():
  model = make_model(CONFIG)
  rule = optax.sgd(lambda updates: 0.0)
  params = model.init(jax.random.key(0))
  params["embed"] = {"embedding": params["embed"]["embedding"].at[POISON].set(np.nan)}
  step = jax.jit(make_train_step(model, rule, lambda step: 0.1))
  state = init_state(params, rule, jnp.zeros(2, jnp.uint32))
  outcomes = {
    name: jax.device_get(step(state, each)[1])
    for name, each in {"a": batch(1), "bad": batch(2, poison=(0, 0, 0)), "b": batch(3)}.items()
  }

  def summary(*names):
    return metrics.summarise(
      [outcomes[name] for name in names], seconds=1.0, config=CONFIG, length=8
    )

  mixed, clean = summary("a", "bad", "b"), summary("a", "b")
  assert mixed["skipped_steps"] == 1 and clean["skipped_steps"] == 0
  for name in ("loss", "accuracy", "gradient_norm"):
    assert mixed[name] == clean[name] and np.isfinite(mixed[name])
  assert mixed["tokens_per_second"] == 1.5 * clean["tokens_per_second"]
  only = summary("bad")
  assert "loss" not in only and "gradient_norm" not in only and only["skipped_steps"] == 1


def test_diverging_run_ends_and_writes_its_documents(start, tmp_path, text):
  """The learning rate makes the second step overflow; every step is saved."""
  output = tmp_path / "run"
  more = ("--total_steps=50", "--save_model_freq=1", "--log_freq=1", "--max_nonfinite_steps=3",
          "--checkpointer.max_to_keep=9", "--optimizer.accumulate_gradient_steps=2")  # fmt: skip
  with start(output, *more, "--optimizer.adamw_optimizer.lr=1e30") as job:
    assert job.end() == 1, job.said()
  last = job.said().splitlines()[-1]
  assert last.startswith(
    "error: the loss or gradient of 3 consecutive steps (2 to 4) was not finite; the parameters "
    "are those of step 1; "
  )
  assert "Traceback" not in job.said()
  assert "step 2/50  no step had a finite loss and gradient" in job.said()
  first, *others = [arrays(output / "checkpoints" / str(step)) for step in (1, 2, 3)]
  assert others == [first, first]
  # Each of the three steps has 2 micro-steps of 2 rows, with one segment or more in each.
  written = files(output / "nonfinite")
  assert sorted(written) == [f"step_{step}.process_0.jsonl" for step in (2, 3, 4)]
  known = text.read_text()
  for content in written.values():
    records = [json.loads(line) for line in content.decode().splitlines()]
    assert {(r["micro_step"], r["row"]) for r in records} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(record["text"].strip() in known for record in records)
  lines = (output / "metrics.jsonl").read_text().splitlines()
  counts = [json.loads(line)["skipped_steps"] for line in lines]
  assert counts[:3] == [0, 1, 1]


def test_last_step_of_a_stopped_run_is_checked_too(start, tmp_path):
  output = tmp_path / "run"
  more = ("--total_steps=1000000", "--max_nonfinite_steps=1000000", "--log_freq=1")
  with start(output, *more, "--optimizer.adamw_optimizer.lr=1e30") as job:
    job.wait_for(lambda: "step 3/" in job.said())
    job.signal(signal.SIGTERM)
    assert job.end() == EXIT_CODE, job.said()
  stopped_at = checkpoint.open_checkpoint(output).step
  assert len(files(output / "nonfinite")) == stopped_at - 1  # the first one was finite
  assert f"step_{stopped_at}.process_0.jsonl" in files(output / "nonfinite")
