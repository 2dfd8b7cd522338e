"""The loss of a linear head and its gradients, against float64 NumPy; and what jax does to it."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from ll3m_kernels import Sharding, linear_cross_entropy
from ll3m_kernels.cross_entropy import api, xla
from tests.kernels.tolerances import assert_close

AXES = ("dp", "fsdp", "mp")


class Case(NamedTuple):
  """Arguments of a call, and cotangents of its two losses."""

  hidden: Any
  head: Any
  labels: Any
  bias: Any
  mask: Any
  loss_bar: Any
  penalty_bar: Any
  options: dict


class Expected(NamedTuple):
  loss: np.ndarray
  penalty: np.ndarray
  correct: np.ndarray
  hidden_bar: np.ndarray
  head_bar: np.ndarray
  bias_bar: np.ndarray | None


@pytest.fixture
def unchecked():
  """Switches off the run-time checks of annotations that only tests have."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def narrow_chunks(monkeypatch):
  """Chunks of at most 256 columns, so that small vocabularies have several."""
  monkeypatch.setattr(xla, "_MOST_COLUMNS", 256)


def draw(
  tokens=12, features=16, vocabulary=700, *, layout="dv", dtype=jnp.float32, bias=False, mask=None,
  scale=3.0, seed=0, **options,
) -> Case:  # fmt: skip
  rng = np.random.default_rng(seed)
  tokens = (tokens,) if isinstance(tokens, int) else tokens
  weight = rng.normal(size=(features, vocabulary)) * scale / features**0.5
  return Case(
    hidden=jnp.asarray(rng.normal(size=(*tokens, features)), dtype),
    head=jnp.asarray(weight if layout == "dv" else weight.T, dtype),
    labels=jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32),
    bias=jnp.asarray(rng.normal(size=vocabulary), dtype) if bias else None,
    mask={
      None: None,
      "bool": jnp.asarray(rng.random(tokens) < 0.6),
      "float": jnp.asarray(rng.random(tokens) * (rng.random(tokens) < 0.6), jnp.float32),
      "empty": jnp.zeros(tokens, bool),
    }[mask],
    loss_bar=jnp.asarray(rng.normal(size=tokens), jnp.float32),
    penalty_bar=jnp.asarray(rng.normal(size=tokens), jnp.float32),
    options={"head_layout": layout, **options},
  )


def oracle(case: Case) -> Expected:
  """The definition in float64, on inputs that are already rounded to their dtype."""
  options = {"logits_soft_cap": None, "z_loss": 0.0} | case.options
  head = np.asarray(case.head, np.float64)
  head = head if options["head_layout"] == "dv" else head.T
  hidden = np.asarray(case.hidden, np.float64).reshape(-1, head.shape[0])
  labels = np.asarray(case.labels).reshape(-1)
  weight = np.ones(labels.size) if case.mask is None else np.asarray(case.mask, np.float64)
  weight = weight.reshape(-1)
  logits = hidden @ head
  if case.bias is not None:
    logits = logits + np.asarray(case.bias, np.float64)
  slope = 1.0
  if options["logits_soft_cap"] is not None:
    capped = np.tanh(logits / options["logits_soft_cap"])
    logits, slope = options["logits_soft_cap"] * capped, 1 - capped**2
  largest = logits.max(axis=1, keepdims=True)
  log_z = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
  onehot = labels[:, None] == np.arange(head.shape[1])
  picked = np.where(onehot, logits, 0.0).sum(axis=1)
  softmax = np.exp(logits - log_z[:, None])
  loss_bar, penalty_bar = (
    np.asarray(x, np.float64).reshape(-1) * weight for x in (case.loss_bar, case.penalty_bar)
  )
  softmax_bar = loss_bar + penalty_bar * 2 * options["z_loss"] * log_z
  logits_bar = (softmax * softmax_bar[:, None] - onehot * loss_bar[:, None]) * slope
  head_bar = hidden.T @ logits_bar
  shape = case.labels.shape
  return Expected(
    loss=((log_z - picked) * weight).reshape(shape),
    penalty=(options["z_loss"] * log_z**2 * weight).reshape(shape),
    correct=((weight != 0) & (picked == largest[:, 0]) & onehot.any(axis=1)).reshape(shape),
    hidden_bar=(logits_bar @ head.T).reshape(case.hidden.shape),
    head_bar=head_bar if options["head_layout"] == "dv" else head_bar.T,
    bias_bar=None if case.bias is None else logits_bar.sum(axis=0),
  )


def objective(hidden, head, bias, case: Case, **options):
  """Returns sum(cotangents * losses), and the losses."""
  results = linear_cross_entropy(
    hidden, head, case.labels, bias=bias, mask=case.mask, return_correct=True,
    **case.options, **options,
  )  # fmt: skip
  return jnp.sum(results[0] * case.loss_bar) + jnp.sum(results[1] * case.penalty_bar), results


def run(case: Case, **options) -> Expected:
  """What linear_cross_entropy gives, with gradients."""
  grad = jax.value_and_grad(
    functools.partial(objective, case=case, **options), argnums=(0, 1, 2), has_aux=True
  )
  (_, results), bars = jax.jit(grad)(case.hidden, case.head, case.bias)
  return Expected(*results, *bars)


def assert_right(actual: Expected, expected: Expected) -> None:
  """Losses as exact as float32 sums; gradients too, rounded once where they are bfloat16."""
  np.testing.assert_array_equal(actual.correct, expected.correct)
  for name in ("loss", "penalty", "hidden_bar", "head_bar", "bias_bar"):
    ours, theirs = getattr(actual, name), getattr(expected, name)
    if theirs is None:
      assert ours is None
    elif ours.dtype == jnp.float32:
      assert_close(ours, theirs, jnp.float32, name=name)
    else:
      assert_rounded_once(ours, theirs, name)


def assert_rounded_once(actual, expected: np.ndarray, name: str) -> None:
  """Holds every element of a bfloat16 array to one rounding, but for 2e-6 of the largest one.

  What is rounded is a float32 sum, which is only so exact where it cancels out.
  """
  assert actual.dtype == jnp.bfloat16
  if expected.size:
    error = np.abs(np.asarray(actual, np.float64) - expected)
    allowed = 2.0**-8 * np.abs(expected) + 2e-6 * np.abs(expected).max()
    assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.3g} too far"


OPTIONS = {
  "plain": {},
  "bias": {"bias": True},
  "soft cap": {"logits_soft_cap": 2.0},
  "z-loss": {"z_loss": 1e-2},
  "bool mask": {"mask": "bool"},
  "float mask": {"mask": "float"},
  "empty mask": {"mask": "empty"},
  "all": {"bias": True, "logits_soft_cap": 5.0, "z_loss": 1e-2, "mask": "float"},
}


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients(narrow_chunks, options, dtype, layout):
  """700 columns are two chunks of 256 and a rest of 188."""
  case = draw(layout=layout, dtype=dtype, **OPTIONS[options])
  assert_right(run(case), oracle(case))


@settings(max_examples=12, deadline=None)
@given(
  tokens=st.sampled_from([(), (0,), (1,), (2, 3), (33,)]),
  features=st.integers(1, 40),
  vocabulary=st.integers(1, 600),
  layout=st.sampled_from(["dv", "vd"]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  most_columns=st.sampled_from([128, 8192]),
  seed=st.integers(0, 100),
)
def test_any_shape(tokens, features, vocabulary, layout, dtype, most_columns, seed):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "_MOST_COLUMNS", most_columns)
    case = draw(tokens, features, vocabulary, layout=layout, dtype=dtype, seed=seed, z_loss=0.01)
    assert_right(run(case), oracle(case))


@pytest.mark.parametrize("chunk", [0, 1])
def test_logits_of_any_size(narrow_chunks, chunk):
  """Logits that exceed all before them by more than exp can hold, in the first chunk or later."""
  case = draw(scale=1.0)
  steps = np.where(np.arange(700) // 128 == 2 * chunk + 1, 60.0, 1.0)
  case = case._replace(head=case.head * jnp.asarray(steps, jnp.float32)[None])
  expected = oracle(case)
  assert expected.loss.max() > 100
  assert_right(run(case), expected)
  # One of a batch walks twice, and the other ones do not mind.
  heads = jnp.stack([draw(scale=1.0).head, case.head, case.head / 60])
  losses = jax.vmap(
    lambda head: linear_cross_entropy(case.hidden, head, case.labels)[0]
  )(heads)  # fmt: skip
  for head, loss in zip(heads, losses, strict=True):
    assert_close(loss, oracle(case._replace(head=head)).loss, jnp.float32)


def test_masked_tokens_may_hold_anything():
  case = draw(mask="float", bias=True, z_loss=1e-2)
  gone = np.asarray(case.mask) == 0
  assert gone.any() and not gone.all()
  poisoned = case._replace(
    hidden=jnp.where(gone[:, None], jnp.nan, case.hidden),
    labels=jnp.where(gone, -100, case.labels),
  )
  actual = run(poisoned)
  assert_right(actual, oracle(case))
  assert not np.asarray(actual.hidden_bar)[gone].any()
  mask_bar = jax.grad(
    lambda mask: jnp.sum(linear_cross_entropy(case.hidden, case.head, case.labels, mask=mask)[0])
  )(case.mask)
  unmasked = oracle(case._replace(mask=None, bias=None)).loss
  assert_close(mask_bar, np.where(gone, 0.0, unmasked), jnp.float32)


def test_labels_outside_the_vocabulary_are_no_columns():
  case = draw(vocabulary=300)
  labels = np.array([-1, -100, 300, 2**31 - 1, -(2**31), 299, 0, 5, 300, 301, 428, 127])
  case = case._replace(labels=jnp.asarray(labels, jnp.int32))
  actual = run(case)
  assert_right(actual, oracle(case))
  assert not np.asarray(actual.correct)[(labels < 0) | (labels >= 300)].any()


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint64])
def test_labels_wider_than_int32_are_no_columns(unchecked, dtype):
  """Neither is what they wrap around to."""
  case = draw(2, vocabulary=9)
  wide = {np.uint32: 2**31 + 3}.get(dtype, 2**32 + 3)
  labels = np.array([3, wide], dtype)
  expected = oracle(case._replace(labels=np.array([3, -1])))
  assert_right(run(case._replace(labels=labels)), expected)
  with jax.enable_x64(True):  # traced ones
    objective_of = jax.jit(lambda labels: objective(*case[:2], None, case._replace(labels=labels)))
    _, results = objective_of(labels)
  assert_close(results[0], expected.loss, jnp.float32)
  np.testing.assert_array_equal(results[2], expected.correct)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_columns_may_be_taken_out(narrow_chunks, layout, first):
  """By a bias of -inf: whole chunks of them, the first one too."""
  case = draw(vocabulary=900, layout=layout, z_loss=1e-2)
  gone = np.arange(900) < 400 if first else np.arange(900) >= 400
  labels = np.where(gone[case.labels], (np.asarray(case.labels) + 450) % 900, case.labels)
  labels = np.where(gone[labels], 450 if first else 50, labels)
  bias = jnp.asarray(np.where(gone, -np.inf, 0.0), jnp.float32)
  case = case._replace(labels=jnp.asarray(labels, jnp.int32), bias=bias)
  # The same without these columns.
  kept = np.flatnonzero(~gone)
  axis = layout.index("v")
  expected = oracle(
    case._replace(
      head=jnp.take(case.head, kept, axis=axis),
      labels=np.searchsorted(kept, labels),
      bias=bias[kept],
    )
  )
  head_bar = np.zeros(case.head.shape)
  head_bar[(slice(None), kept) if axis else kept] = expected.head_bar
  bias_bar = np.zeros(900)
  bias_bar[kept] = expected.bias_bar
  assert_right(run(case), expected._replace(head_bar=head_bar, bias_bar=bias_bar))


def test_labels_and_tokens_without_a_column(narrow_chunks):
  """A label that is taken out costs inf; a token with nothing left has no gradients."""
  case = draw(3, vocabulary=600, bias=True, z_loss=1e-2)
  taken = case._replace(bias=case.bias.at[7].set(-jnp.inf), labels=jnp.array([7, 8, -1]))
  actual = run(taken)
  assert actual.loss[0] == np.inf and np.isfinite(actual.loss[1:]).all()
  for bar in (actual.hidden_bar, actual.head_bar, actual.bias_bar):
    assert np.isfinite(bar).all()
  nothing = run(taken._replace(bias=jnp.full(600, -jnp.inf)))
  np.testing.assert_array_equal(nothing.loss, [np.inf, np.inf, -np.inf])
  assert not nothing.correct.any()
  for bar in (nothing.hidden_bar, nothing.head_bar, nothing.bias_bar):
    assert not np.asarray(bar).any()
  # Without a z-loss there is none.
  case = taken._replace(bias=jnp.full(600, -jnp.inf), options={"head_layout": "dv"})
  assert not np.asarray(run(case).penalty).any()


def test_the_slope_of_a_saturated_cap(narrow_chunks):
  """1 - tanh^2 would be 0, or have no digit right, where slopes are 1e-8."""
  case = draw(scale=0.5, logits_soft_cap=1.0)
  case = case._replace(bias=jnp.full(700, 10.0))
  actual, expected = run(case), oracle(case)
  slope = 4 * np.exp(-20.0)
  assert slope < np.abs(expected.bias_bar).max() < 100 * slope
  # The oracle's own slope is no better than 1e-16.
  np.testing.assert_allclose(actual.bias_bar, expected.bias_bar, rtol=1e-3, atol=1e-4 * slope)


def test_correct_takes_ties():
  ones = jnp.ones((1, 4))
  labels = jnp.asarray([3])
  *_, correct = linear_cross_entropy(ones, jnp.ones((4, 9)), labels, return_correct=True)
  assert correct.item() is True


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_logits_are_not_in_memory(layout):
  """At most 1/8 of their size, as float32, with everything else the passes need."""
  tokens, features, vocabulary = 512, 32, 128_000
  case = draw(1, features, 2, layout=layout)
  shape = (features, vocabulary) if layout == "dv" else (vocabulary, features)
  grad = jax.jit(jax.grad(lambda *x: jnp.mean(linear_cross_entropy(*x, **case.options)[0]), (0, 1)))
  compiled = grad.lower(
    jax.ShapeDtypeStruct((tokens, features), jnp.float32),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
  ).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 4 * tokens * vocabulary / 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_on_tpu(dtype):
  """A TPU rounds what it multiplies to bfloat16, unless it is asked not to."""
  case = draw(dtype=dtype, tokens=8)
  grad = jax.jit(jax.grad(lambda *x: jnp.sum(linear_cross_entropy(*x)[0]), (0, 1)))
  exported = jax.export.export(grad, platforms=["tpu"])(case.hidden, case.head, case.labels)
  products = [
    line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line
  ]
  assert products
  for line in products:
    from_cotangent = "xbf16>, tensor" not in line
    expected = "HIGHEST" if dtype == "float32" else "HIGH" if from_cotangent else "DEFAULT"
    asked = re.search(r"precision = \[(\w+), (\w+)\]", line)
    assert (asked.groups() if asked else ("DEFAULT",) * 2) == (expected,) * 2, line


def test_vmap(narrow_chunks):
  case = draw((3, 5), z_loss=1e-2)
  function = jax.grad(
    lambda hidden, head, labels: jnp.sum(
      sum(linear_cross_entropy(hidden, head, labels, **case.options))
    ),
    argnums=(0, 1),
  )
  heads = jnp.stack([case.head, case.head * 2, -case.head])
  for axes, head in (((0, None, 0), case.head), ((0, 0, 0), heads)):
    mapped = jax.vmap(function, in_axes=axes)(case.hidden, head, case.labels)
    for i in range(3):
      alone = function(case.hidden[i], head if axes[1] is None else head[i], case.labels[i])
      for ours, theirs in zip(mapped, alone, strict=True):
        assert_close(ours[i], np.asarray(theirs, np.float64), jnp.float32)


def test_gradients_through_a_vmap_over_labels(narrow_chunks):
  """The z-loss does not depend on them: its cotangents are one, the sum of all."""
  case = draw((3, 5), z_loss=1e-1)
  weights = jnp.arange(1.0, 4)[:, None]

  def total(loss, penalty):
    return jnp.sum(jnp.sin(loss)) + jnp.sum(penalty * weights)

  def losses(hidden, head, labels):
    return linear_cross_entropy(hidden, head, labels, **case.options)

  def mapped(hidden, head):
    return total(*jax.vmap(lambda labels: losses(hidden, head, labels))(case.labels))

  def one_by_one(hidden, head):
    results = [losses(hidden, head, labels) for labels in case.labels]
    return total(*(jnp.stack(x) for x in zip(*results, strict=True)))

  arrays = case.hidden[0], case.head
  expected = jax.jit(jax.grad(one_by_one, (0, 1)))(*arrays)
  for ours, theirs in zip(jax.jit(jax.grad(mapped, (0, 1)))(*arrays), expected, strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(narrow_chunks, policy):
  case = draw(mask="bool", bias=True)
  function = functools.partial(objective, case=case)
  remat = jax.checkpoint(function, policy=policy)
  (_, results), bars = jax.jit(jax.value_and_grad(remat, (0, 1, 2), has_aux=True))(
    case.hidden, case.head, case.bias
  )
  assert_right(Expected(*results, *bars), oracle(case))


def test_x64(narrow_chunks):
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
      case = draw(mask="bool", bias=True, dtype=dtype, logits_soft_cap=5.0, z_loss=1e-2)
      case = case._replace(labels=case.labels.astype(jnp.int64))
      actual = run(case)
      assert actual.loss.dtype == actual.penalty.dtype == jnp.float32
      assert actual.hidden_bar.dtype == actual.head_bar.dtype == actual.bias_bar.dtype == dtype
      if dtype == jnp.float64:
        actual = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, bool)), actual)
        actual = actual._replace(
          **{name: getattr(actual, name).astype(jnp.float32) for name in Expected._fields[3:]}
        )
      assert_right(actual, oracle(case))


def test_mixed_dtypes(narrow_chunks):
  """Computed in the wider of the two; each gradient in its own."""
  case = draw()
  case = case._replace(head=case.head.astype(jnp.bfloat16))
  assert_right(run(case), oracle(case))
  case = draw()
  case = case._replace(hidden=case.hidden.astype(jnp.float16).astype(jnp.bfloat16))
  assert_right(run(case), oracle(case))


def make_mesh(*sizes: int) -> Mesh:
  return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), AXES)


def placed(mesh: Mesh, layout: str):
  """How training holds hidden [B, T, D], head, labels [B, T] and bias."""
  rows = PartitionSpec(("dp", "fsdp"))
  head = PartitionSpec(*(("fsdp", "mp") if layout == "dv" else ("mp", "fsdp")))
  return [jax.NamedSharding(mesh, spec) for spec in (rows, head, rows, PartitionSpec("mp"))]


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (2, 4, 1), (1, 2, 4)])
@pytest.mark.parametrize("told", [True, False])
def test_any_mesh_gives_what_one_device_gives(narrow_chunks, sizes, layout, told):
  case = draw((8, 5), vocabulary=1200, layout=layout, bias=True, mask="float", z_loss=1e-2)
  mesh = make_mesh(*sizes)
  specs = placed(mesh, layout)
  arrays = zip((case.hidden, case.head, case.labels, case.bias), specs, strict=True)
  hidden, head, labels, bias = (jax.device_put(x, spec) for x, spec in arrays)
  sharding = Sharding(mesh, ("dp", "fsdp"), "mp") if told else None
  actual = run(case._replace(hidden=hidden, head=head, labels=labels, bias=bias), sharding=sharding)
  assert_right(actual, oracle(case))


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_the_vocabulary_is_split_over_devices(layout):
  """No device multiplies more than its part of a chunk, or gathers other parts."""
  mesh = make_mesh(2, 2, 2)
  sharding = Sharding(mesh, ("dp", "fsdp"), "mp")
  hidden, head, labels, _ = placed(mesh, layout)
  tokens, features, vocabulary = 64, 16, 16_384
  grad = jax.jit(
    jax.grad(
      lambda *x: jnp.sum(linear_cross_entropy(*x, head_layout=layout, sharding=sharding)[0]), (0, 1)
    ),
    out_shardings=(hidden, head),
  )
  shape = (features, vocabulary) if layout == "dv" else (vocabulary, features)
  text = grad.lower(
    jax.ShapeDtypeStruct((tokens, features), jnp.float32, sharding=hidden),
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=head),
    jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=labels),
  ).compile().as_text()  # fmt: skip
  assert " dot(" in text
  assert re.search(r"\b2048\b", text), "a device's half of a chunk"
  assert not re.search(r"\b4096\b", text), "a whole chunk on one device"
  assert not re.search(r"\b16384\b", text), "the whole head on one device"


def test_vocabulary_that_does_not_divide(narrow_chunks):
  case = draw(vocabulary=701)
  sharding = Sharding(make_mesh(1, 1, 2), ("dp", "fsdp"), "mp")
  assert_right(run(case, sharding=sharding), oracle(case))


def test_inside_a_shard_map(narrow_chunks):
  """In a caller's own map, whose varying axes are checked; the head's gradient is summed."""
  case = draw(16, z_loss=1e-2)
  mesh = make_mesh(1, 8, 1)
  rows, whole = PartitionSpec("fsdp"), PartitionSpec()

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(rows, whole, rows, rows, rows), out_specs=(rows, whole)
  )
  def grad(hidden, head, labels, loss_bar, penalty_bar):
    def total(hidden, head):
      loss, penalty = linear_cross_entropy(hidden, head, labels, **case.options)
      return jnp.sum(loss * loss_bar + penalty * penalty_bar)

    return jax.grad(total, (0, 1))(hidden, head)

  hidden_bar, head_bar = jax.jit(grad)(
    case.hidden, case.head, case.labels, case.loss_bar, case.penalty_bar
  )
  expected = oracle(case)
  assert_close(hidden_bar, expected.hidden_bar, jnp.float32)
  assert_close(head_bar, expected.head_bar, jnp.float32)


def test_second_derivatives_are_refused():
  case = draw(4, 4, 9)
  grad = jax.grad(lambda hidden: objective(hidden, case.head, None, case)[0])
  with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivatives"):
    jax.grad(lambda hidden: jnp.sum(grad(hidden)))(case.hidden)


def test_there_is_no_kernel():
  case = draw(4, 4, 9)
  arrays = case.hidden, case.head, case.labels
  with pytest.raises(NotImplementedError, match="does not serve this operation: it has no kernel"):
    linear_cross_entropy(*arrays, implementation="pallas")
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    linear_cross_entropy(*arrays, implementation="triton")
  np.testing.assert_array_equal(
    linear_cross_entropy(*arrays, implementation="xla")[0], linear_cross_entropy(*arrays)[0]
  )
  assert "linear_cross_entropy: xla, on every platform (asked for)" in api.explain(
    *arrays, implementation="xla"
  )
  text = api.explain(*arrays)
  assert text.startswith("linear_cross_entropy: xla, on every platform (this operation: it has no")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"head_layout": "dn"}, "head_layout must be 'dv' or 'vd', got 'dn'"),
    ({"head_layout": "vd"}, r"head of layout 'vd' must have 4 as its D, got \(4, 9\)"),
    ({"hidden": jnp.ones((3, 4), int)}, "hidden must be floating, got int32"),
    ({"head": jnp.ones((4, 9), int)}, "head must be floating, got int32"),
    ({"head": jnp.ones((1, 4, 9))}, r"hidden must be \[.., D\] and head a matrix, got"),
    ({"head": jnp.ones((4, 0))}, r"head must have a vocabulary, got \(4, 0\)"),
    ({"labels": jnp.ones((4,), int)}, r"labels must have shape \(3,\), got \(4,\)"),
    ({"labels": jnp.ones((3,))}, "labels must be integers, got float32"),
    ({"bias": jnp.ones((4,))}, r"bias must have shape \(9,\), got \(4,\)"),
    ({"bias": jnp.ones((9,), int)}, "bias must be floating, got int32"),
    ({"mask": jnp.ones((3, 1))}, r"mask must have shape \(3,\), got \(3, 1\)"),
    ({"mask": jnp.ones((3,), int)}, "mask must be boolean or floating, got int32"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap must be a positive number, got 0.0"),
  ],
)
def test_bad_input_is_explained(unchecked, change, message):
  case = draw(3, 4, 9)
  options = {"hidden": case.hidden, "head": case.head, "labels": case.labels} | change
  for function in (linear_cross_entropy, api.explain):
    with pytest.raises(ValueError, match=message):
      function(options["hidden"], options["head"], options["labels"], **{
        key: value for key, value in options.items() if key not in ("hidden", "head", "labels")
      })  # fmt: skip
