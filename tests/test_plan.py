"""The plan command with the real TPU compiler, which needs no TPU.

The output of plans is cached between runs.
"""

import json

import pytest
from etils import epath

from ll3m import families
from ll3m.core import checksums
from ll3m.core.checkpoint import MANIFEST, PARAMS, model_meta
from ll3m.training.metrics import flops_per_token

# The sizes have no accidental divisors. With D = 256, XLA would sum the head's gradients in a
# different way from the others.
SIZES = {
  "d_model": 512, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64,
}  # fmt: skip
# For tests that hold for any size; it compiles in a third of the time.
SMALLER = {
  "d_model": 256, "d_ff": 640, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64,
  "vocab_size": 4096,
}  # fmt: skip


def model(sizes):
  return (
    "--load_model_config=llama2_7b",
    "--update_model_config=" + ",".join(f"{k}={v}" for k, v in sizes.items()),
    "--dtype=bf16",
    "--param_dtype=bf16",
    "--train_dataset.seqio_dataset.task_feature_lengths=(256,)",
  )


MODEL, SMALL_MODEL = model(SIZES), model(SMALLER)
ROWS, STEPS, LENGTH = 8, 2, 256
BATCH = (
  f"--train_dataset.seqio_dataset.batch_size={ROWS}",
  f"--optimizer.accumulate_gradient_steps={STEPS}",
)
KEYS = {
  "fits", "hbm_bytes", "bytes_per_chip", "collectives", "compile_seconds", "flops", "step_seconds",
  "tokens_per_second", "mfu", "largest_batch",
}  # fmt: skip


def matrices(config):
  """Returns the number of parameters without those of the norms."""
  heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
  layers = config.num_layers * config.d_model * (heads + 3 * config.d_ff)
  return layers + 2 * config.d_model * config.vocab_size


@pytest.fixture(scope="module")
def config():
  return families.get_preset("llama2_7b").config.replace(**SIZES)


@pytest.fixture
def plan_of(run_command, kept):
  """Returns a function that runs `plan` and returns its stdout and stderr."""

  def run(*arguments):
    done = run_command("plan", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

  return lambda *arguments: kept.get(("plan", *arguments), lambda: run(*arguments))


def test_memory_flops_and_traffic_of_a_training_step(plan_of, config):
  stdout, _ = plan_of("--topology=v5e:2x4", "--mesh_dim=-1,2,2", *MODEL, *BATCH, "--json")
  plan = json.loads(stdout)
  assert set(plan) == KEYS
  assert plan["fits"] and plan["largest_batch"] is None
  held = plan["bytes_per_chip"]
  assert set(held) == {"parameters", "optimizer", "temporaries", "headroom"}
  assert sum(held.values()) == plan["hbm_bytes"] == int(15.75 * 2**30)
  # All matrices are split over fsdp x mp = 4, norms are not. The optimizer has two moments and
  # step counters.
  whole = matrices(config)
  norms = (2 * config.num_layers + 1) * config.d_model
  assert held["parameters"] == 2 * (whole // 4 + norms)
  assert 0 <= held["optimizer"] - 2 * held["parameters"] < 64
  # The backward pass recomputes the logits of the loss, and nothing else.
  tokens = ROWS * STEPS * LENGTH
  recomputed = 2 * config.d_model * config.vocab_size * tokens
  backward = 4 * config.num_layers * config.num_heads * config.head_dim * LENGTH / 2 / 2 * tokens
  expected = flops_per_token(config, LENGTH) * tokens + recomputed + backward
  assert plan["flops"] == pytest.approx(expected, rel=0.02)
  sent = {(c["kind"], c["axis"]): c["bytes"] for c in plan["collectives"]}
  # Each micro-step sums a device's part of the gradients over dp: 2 (n - 1) / n of its bytes.
  assert sent["all-reduce", "dp"] == pytest.approx(STEPS * 2 * whole / 4, rel=0.01)
  # The results of two products per layer are summed over mp in the forward pass and of two in the
  # backward pass. So are the embedded tokens, and the gradient of the loss, which is float32. The
  # remainder is the loss's sums by token.
  rows = ROWS // 4 * LENGTH * config.d_model * 2
  summed = STEPS * (4 * config.num_layers + 1 + 2) * rows
  assert sent["all-reduce", "mp"] == pytest.approx(summed, rel=0.01)
  assert set(plan["step_seconds"]) == {"compute", "hbm", "ici"}
  slowest = max(plan["step_seconds"].values())
  assert plan["step_seconds"]["compute"] == pytest.approx(plan["flops"] / 8 / 197e12)
  assert plan["tokens_per_second"] == pytest.approx(tokens / slowest)
  needed = flops_per_token(config, LENGTH) * tokens
  assert plan["mfu"] == pytest.approx(needed / (slowest * 8 * 197e12))


def test_slices_exchange_nothing_but_gradients(plan_of):
  stdout, _ = plan_of(
    "--topology=v5e:2x2", "--num_slices=2", "--mesh_dim=-1,2,2", *SMALL_MODEL, *BATCH
  )
  assert "8 devices of TPU v5 lite on 8 chips, 2 slices" in stdout
  network = [line.split()[:2] for line in stdout.splitlines() if "(network)" in line]
  assert network == [["all-reduce", "dp"]]
  assert "flash_attention_forward" in stdout


def test_a_run_that_does_not_fit_gets_advice_that_was_tried(plan_of):
  batch = "--train_dataset.seqio_dataset.batch_size=7168"
  stdout, stderr = plan_of("--topology=v5e:2x2", "--mesh_dim=-1,1,2", *SMALL_MODEL, batch)
  (headroom,) = (line for line in stdout.splitlines() if "headroom" in line)
  assert float(headroom.split()[1]) < 0
  remat = stdout.partition("does not fit: it fits with --remat=")[2].strip()
  assert stderr.splitlines()[-1].endswith(f"remat {remat}: fits")


def test_memory_and_traffic_of_decoding(plan_of):
  stdout, _ = plan_of(
    "--topology=v5e:2x2", "--mesh_dim=1,1,4", "--load_model_config=llama2_7b",
    "--dtype=bf16", "--train_dataset.seqio_dataset.task_feature_lengths=(2048,)", *BATCH[:1],
    "--mode=decode", "--json",
  )  # fmt: skip
  plan = json.loads(stdout)
  assert set(plan) == KEYS
  config = families.get_preset("llama2_7b").config
  cache = 2 * config.num_layers * ROWS * 2048 * config.num_kv_heads * config.head_dim * 2
  assert plan["bytes_per_chip"]["kv_cache"] == cache // 4
  # Decoding a token reads all weights except the embedding's rows, and all keys and values, once.
  read = (matrices(config) - config.d_model * config.vocab_size) * 2 + cache
  assert plan["step_seconds"]["hbm"] == pytest.approx(read / 4 / 819e9, rel=0.05)
  assert plan["tokens_per_second"] == pytest.approx(ROWS / plan["step_seconds"]["hbm"])
  # Two sums of activations per layer and one of the embeddings; weights and cache are not sent.
  sent = {collective["kind"]: collective["bytes"] for collective in plan["collectives"]}
  ring = 2 * (4 - 1) / 4
  sums = (2 * config.num_layers + 1) * ROWS * config.d_model * 2
  assert sent.pop("all-reduce") == pytest.approx(ring * sums, rel=0.02)
  assert sum(sent.values()) < 0.01 * sums


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "--topology must be given"),
    (["--topology=v9:2x2"], "--topology expects a machine that libtpu knows, such as v5e:8x8"),
    (["--topology=v5e:2x2", "--mesh_dim=3,1,1"], "--mesh_dim=3,1,1 needs 3 devices, there are 4"),
    (["--topology=v5e:2x2", "--num_slices=0"], "--num_slices must be at least 1, got 0"),
    (
      ["--topology=v5e:2x2", "--num_slices=2", "--mesh_dim=1,8,1"],
      "dp must be a multiple of the 2 slices, got dp=1",
    ),
    (
      ["--topology=v5e:2x2", "--train_dataset.seqio_dataset.batch_size=6"],
      "batch_size must be a multiple of dp x fsdp = 4, got 6",
    ),
    (
      ["--topology=v5e:2x2", "--optimizer.lion_optimizer.lr=1"],
      "--optimizer.lion_optimizer.lr has no effect with --optimizer.type=adamw",
    ),
  ],
)
def test_wrong_flags_are_reported_in_one_sentence(run_command, flags, message):
  done = run_command("plan", *SMALL_MODEL, *flags)
  assert done.returncode == (1 if message.startswith("dp") else 2)
  assert message in done.stderr.splitlines()[-1]


def test_plan_does_not_read_the_weights_of_a_converted_model(run_command, tmp_path, config):
  """The model's weights are missing, but the error is about the machine, which is read later."""
  (tmp_path / MANIFEST).write_text(json.dumps(model_meta("llama", config)))
  (tmp_path / PARAMS).mkdir()
  weights = tmp_path / PARAMS / "weights"
  weights.write_bytes(bytes(8))
  checksums.write(epath.Path(tmp_path))
  weights.unlink()
  done = run_command("plan", f"--load_checkpoint=params::{tmp_path}", "--topology=v9:2x2")
  assert done.returncode == 2
  assert "--topology expects a machine that libtpu knows" in done.stderr.splitlines()[-1]
