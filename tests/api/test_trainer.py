"""`ll3m.Trainer` matches plain optax and resumes bitwise."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ll3m

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
OPTIMIZER = optax.adamw(1e-2)


@pytest.fixture(scope="module")
def model(byte_tokenizer):
  return ll3m.init(
    "smollm2_135m", tokenizer=byte_tokenizer, vocab_size=258, d_model=16, d_ff=24, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64,
  )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  lines = [{"text": f"line {number} of {number**3} lines " * 3} for number in range(40)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture
def stream(model, text):
  return lambda: ll3m.data.jsonl(text, model.tokenizer, batch_size=2, length=32)


def make(model, batches, output, steps=4, **options) -> ll3m.Trainer:
  return ll3m.Trainer(
    model, OPTIMIZER, batches, output_dir=output, total_steps=steps, log_freq=1, **options
  )


def same(one: ll3m.Model, other: ll3m.Model) -> bool:
  pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
  return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def records(output: Path) -> list[dict]:
  keep = ("step", "loss", "eval_loss", "gradient_norm")
  lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if k in keep} for line in lines]


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory) -> tuple[Path, ll3m.Model]:
  """An uninterrupted run of four steps."""
  output = tmp_path_factory.mktemp("runs") / "whole"
  batches = ll3m.data.jsonl(text, model.tokenizer, batch_size=2, length=32)
  return output, make(model, batches, output).train()


def test_training_matches_plain_optax(model, stream, whole):
  """The expected losses and updates are computed by optax from the model's logits."""

  @jax.jit
  def update(params, opt_state, batch):
    def loss(params):
      hidden = model.decoder.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
      losses = optax.softmax_cross_entropy_with_integer_labels(
        model.decoder.logits(params, hidden), batch.targets
      )
      return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  params, opt_state, losses = model.params, OPTIMIZER.init(model.params), []
  for _, batch in zip(range(4), stream(), strict=False):
    params, opt_state, value = update(params, opt_state, batch)
    losses.append(float(value))
  output, trained = whole
  assert [r["loss"] for r in records(output)] == pytest.approx(losses, rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), trained.params, params)
  assert not same(trained, model)  # the initial parameters have not been donated


def test_load_reads_the_folder_of_a_run(whole, model):
  output, trained = whole
  loaded = ll3m.load(output)
  assert same(loaded, trained) and loaded.config == model.config
  assert loaded.tokenizer("a b") == model.tokenizer("a b")
  assert isinstance(loaded.generate("a", max_new_tokens=2), str)


def test_a_run_resumes_bitwise(model, stream, whole, tmp_path):
  held_out = [next(stream())]
  first = make(model, stream(), tmp_path / "run", steps=2).train()
  assert not same(first, whole[1])
  resumed = make(model, stream(), tmp_path / "run", eval_batches=held_out, eval_freq=3).train()
  assert same(resumed, whole[1])
  found = records(tmp_path / "run")
  assert [r for r in found if "loss" in r] == records(whole[0])
  assert [r["step"] for r in found if "eval_loss" in r] == [3, 4]
  # The loss of the last parameters, computed by a separate function.
  assert found[-1]["eval_loss"] == pytest.approx(ll3m.evaluate(resumed, held_out)["loss"], rel=1e-6)


def test_batches_without_a_position_are_read_again_on_resuming(model, stream, whole, tmp_path):
  batches = [batch for _, batch in zip(range(4), stream(), strict=False)]
  make(model, batches, tmp_path / "run", steps=2).train()
  assert same(make(model, batches, tmp_path / "run").train(), whole[1])


def test_a_finished_run_is_not_trained_again(model, whole):
  assert same(make(model, [], whole[0]).train(), whole[1])


@pytest.mark.parametrize(
  ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_the_step_and_the_run_resumes_from_it(
  model, stream, whole, tmp_path, number, raised
):
  def interrupted(batches):
    for count, batch in enumerate(batches):
      if count == 2:
        os.kill(os.getpid(), number)
        time.sleep(0.5)  # until the listening thread has received it
      yield batch

  # Processes started in the background ignore SIGINT.
  mine = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  before = signal.signal(number, mine)
  try:
    with pytest.raises(raised) as caught:
      make(model, interrupted(stream()), tmp_path / "run").train()
    assert signal.getsignal(number) is mine
  finally:
    signal.signal(number, before)
  if raised is SystemExit:
    assert caught.value.code == 75
  assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
  again = [batch for _, batch in zip(range(4), stream(), strict=False)]
  assert same(make(model, again, tmp_path / "run").train(), whole[1])


def test_a_custom_loss_with_accumulation(model, stream, tmp_path):
  def doubled(model, params, batch):
    hidden = model.decoder.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      model.decoder.logits(params, hidden), batch.targets
    )
    return 2 * jnp.sum(losses * batch.mask), jnp.sum(batch.mask)

  options = {"accumulate": 2, "steps": 1}
  make(model, stream(), tmp_path / "own", loss_fn=doubled, **options).train()
  make(model, stream(), tmp_path / "default", **options).train()
  (own,), (default,) = records(tmp_path / "own"), records(tmp_path / "default")
  assert own["loss"] == pytest.approx(2 * default["loss"], rel=1e-5)
  line = json.loads((tmp_path / "own" / "metrics.jsonl").read_text())
  assert "accuracy" not in line and line["tokens_per_second"] > 0


def test_a_mesh_changes_losses_by_rounding_only(text, model, whole, tmp_path):
  wide = model.replace(mesh=ll3m.make_mesh("1,2,1", jax.devices()[:2]))
  batches = ll3m.data.jsonl(text, model.tokenizer, batch_size=2, length=32)
  trained = make(wide, batches, tmp_path / "run").train()
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(trained.params)} == {2}
  assert [r["loss"] for r in records(tmp_path / "run")] == pytest.approx(
    [r["loss"] for r in records(whole[0])], rel=1e-4
  )


def test_invalid_options_are_rejected_before_anything_is_written(model, stream, tmp_path):
  for options, match in (
    ({"steps": 0}, "`total_steps` must be at least 1, got 0"),
    ({"accumulate": 0}, "`accumulate` must be at least 1, got 0"),
    ({"eval_freq": -1}, "`eval_freq` must be at least 0, got -1"),
    ({"max_to_keep": 0}, "`max_to_keep` must be at least 1, got 0"),
  ):
    with pytest.raises(ValueError, match=match):
      make(model, stream(), tmp_path / "run", **options)
  assert not (tmp_path / "run").exists()


def test_a_folder_with_another_model_is_rejected(model, stream, whole, tmp_path):
  model.save(tmp_path / "saved")
  with pytest.raises(ValueError, match="holds a saved model"):
    make(model, stream(), tmp_path / "saved").train()
  other = ll3m.load(PARITY / "llama2")
  with pytest.raises(ValueError, match="a run of another model"):
    make(other, stream(), whole[0], steps=9).train()


def test_batches_that_end_are_reported(model, stream, tmp_path):
  with pytest.raises(ValueError, match="`batches` ended before the last step"):
    make(model, [next(stream())], tmp_path / "run").train()
