"""The counts and timings of the benchmarks, and the validation before them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ll3m_kernels
from benchmarks import cases, measuring, oracles, report, shapes, small_models, validation
from benchmarks.cases import Argument, Case

ROOT = Path(__file__).parents[2]


class Benchmark:
  """A fake of pytest-benchmark's fixture, with a median of two seconds."""

  def __init__(self):
    self.extra_info, self.stats, self.calls = {}, None, 0

  def pedantic(self, function, *, rounds, warmup_rounds):
    assert rounds >= 5 and warmup_rounds >= 1
    self.calls += 1
    function()
    self.stats = SimpleNamespace(stats=SimpleNamespace(median=2.0))


def square(x, *, implementation, wrong=None):
  """Computes x**2 and its derivative in two implementations, one of which may be wrong."""
  value, slope = x**2, 2 * x
  if implementation == "pallas" and wrong == "value":
    value = value.at[0].mul(1.0001)
  if implementation == "pallas" and wrong == "gradient":
    slope = slope.at[0].mul(1.0001)
  if implementation == "pallas" and wrong == "nan":
    slope = slope.at[-1].set(jnp.nan)
  return jax.lax.stop_gradient(value) + jax.lax.stop_gradient(slope) * (
    x - jax.lax.stop_gradient(x)
  )


def square_case(model, size, dtype, wrong=None):
  return Case(
    function=functools.partial(square, wrong=wrong),
    oracle=oracles.by_autodiff(lambda x: x**2),
    arguments=(Argument((4 if size == "check" else 8,), dtype),),
    dims={"T": {"full": 64, "cpu": 8, "check": 4}[size], "D": 1},
    tokens=8,
    flops=8.0,
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_validate_returns_the_largest_errors(dtype):
  errors = validation.validate(square_case("m", "check", dtype))
  assert errors.keys() == {"pallas", "xla"}
  assert max(errors.values()) <= (1e-7 if dtype == jnp.float32 else 2**-8)


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_wrong_results_fail_before_anything_is_timed(wrong):
  benchmark = Benchmark()
  with pytest.raises(AssertionError, match="pallas, array"):
    measuring.bench_case(benchmark, square_case, "m", "forward", wrong=wrong)
  assert benchmark.calls == 0 and not benchmark.extra_info


@pytest.mark.parametrize(
  ("make_case", "model", "name"),
  [
    (cases.norm, "phi_2", "layer_norm"),
    (cases.rotary, "smollm2_135m", "rotary_embedding"),
    (cases.cross_entropy, "smollm2_135m", "linear_cross_entropy"),
  ],
)
def test_a_wrong_kernel_of_ours_fails(make_case, model, name, monkeypatch):
  right = getattr(ll3m_kernels, name)

  def wrong(*arrays, implementation, **options):
    first, *others = jax.tree.leaves(right(*arrays, implementation="xla", **options))
    return (first * 1.0001, *others) if others else first * 1.0001

  monkeypatch.setattr(ll3m_kernels, name, wrong)
  with pytest.raises(AssertionError, match="largest error"):
    validation.validate(make_case(model, "check", jnp.float32))


def test_a_wrong_model_fails(monkeypatch):
  """The decoder's weights are slightly too large; the kernels are omitted, for speed."""
  unstack = small_models.unstack
  monkeypatch.setattr(
    small_models, "unstack", lambda *a: jax.tree.map(lambda w: w * 1.0002, unstack(*a))
  )
  monkeypatch.setattr(small_models, "IMPLEMENTATIONS", ("xla",))
  with pytest.raises(AssertionError, match="llama2_7b, xla: logits at 70: largest error"):
    small_models.validate_decoding.__wrapped__("llama2_7b")


@pytest.mark.parametrize(("passes", "flops", "nbytes"), [("forward", 8, 64), (None, 24, 160)])
def test_rates_come_from_the_median(passes, flops, nbytes):
  benchmark = Benchmark()
  measuring.bench_case(benchmark, square_case, "m", passes or "forward+backward")
  info = benchmark.extra_info
  assert benchmark.calls == 1
  assert (info["flops"], info["bytes"], info["tokens"]) == (flops, nbytes, 8)
  assert info["flops_per_second"] == flops / 2
  assert info["bytes_per_second"] == nbytes / 2
  assert info["tokens_per_second"] == 4
  assert (info["implementation"], info["dtype"], info["device"]) == ("xla", "float32", "cpu")
  assert info["shape"] == "T=8 D=1"
  assert info["reduced"] == "T 64 -> 8"
  assert info["validated"] == "T=4 D=1, interpreted"
  assert 0 <= info["largest_error"] <= 2e-5
  json.dumps(info)


@pytest.mark.parametrize("model", ["llama2_70b", "mistral_7b"])
@pytest.mark.parametrize("size", ["cpu", "check"])
def test_attention_counts_visible_pairs(model, size):
  case = cases.attention(model, size, jnp.float32)
  _, length, heads, head_dim = case.arguments[0].shape
  t = np.arange(length)
  seen = t[:, None] - t[None] >= 0
  if "window" in case.dims:
    seen &= t[:, None] - t[None] < case.dims["window"]
  pairs = sum(int(row.sum()) for row in seen)
  assert case.flops == 4 * heads * head_dim * pairs
  assert case.dims["N"] // case.dims["K"] == shapes.ATTENTION[model].group


def test_full_sizes_are_those_of_the_models():
  for make_case, table in (
    (cases.norm, shapes.NORMS), (cases.cross_entropy, shapes.HEADS),
  ):  # fmt: skip
    for model, shape in table.items():
      assert make_case(model, "full", jnp.bfloat16).dims["D"] == shape.features
  for model, shape in shapes.HEADS.items():
    assert cases.cross_entropy(model, "full", jnp.bfloat16).dims["V"] == shape.vocab_size
  assert cases.attention("mistral_7b", "full", jnp.bfloat16).dims["window"] == 4096
  for model, shape in shapes.ROTARY.items():
    dims = cases.rotary(model, "full", jnp.bfloat16).dims
    assert (dims["N"], dims["K"], dims["H"], dims["R"]) == tuple(shape)


def test_one_benchmark_from_the_command_to_the_report(tmp_path, capsys):
  """Runs like `make bench`: compared with another machine's run, saved, and reported."""
  name = "test_cross_entropy[smollm2_135m-forward]"
  fullname = f"benchmarks/bench_cross_entropy.py::{name}"
  numbers = ("min", "max", "mean", "stddev", "median", "iqr", "ops", "total", "q1", "q3")
  entry = {
    "name": name,
    "fullname": fullname,
    "group": "linear_cross_entropy",
    "stats": dict.fromkeys(numbers, 1e4) | {"outliers": "0;0", "rounds": 5, "iterations": 1},
    "extra_info": {"shape": "T=256 D=144 V=6144", "dtype": "float32"},
  }
  old, new = tmp_path / "old.json", tmp_path / "new.json"
  old.write_text(
    json.dumps({"benchmarks": [entry], "machine_info": {"node": "other"}, "version": "5.3.1"})
  )
  command = [
    sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:xdist",
    "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-compare={old}",
    f"--benchmark-json={new}", fullname,
  ]  # fmt: skip
  # Without the tests' eight devices, and without xdist's variables, since its workers time nothing.
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "PYTEST_"))}
  result = subprocess.run(
    command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert "(NOW)" in result.stdout and "1 passed" in result.stdout
  (row,) = json.loads(new.read_text())["benchmarks"]
  info = row["extra_info"]
  assert info["reduced"] == "T 8192 -> 256, D 576 -> 144, V 49152 -> 6144"
  assert info["flops_per_second"] == 2 * 256 * 144 * 6144 / row["stats"]["median"]
  assert report.main([str(new)]) == 0
  (line,) = (line for line in capsys.readouterr().out.splitlines() if "smollm2" in line)
  assert float(line.split("|")[6].replace(",", "")) == pytest.approx(
    info["flops_per_second"] / 1e9, rel=0.01
  )
