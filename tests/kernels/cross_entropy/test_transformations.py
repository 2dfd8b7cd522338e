"""The loss under jax's transformations, its memory, and its errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m_kernels import explain, linear_cross_entropy
from tests.kernels.cross_entropy.oracle import (
  Expected,
  assert_right,
  draw,
  objective,
  oracle,
  run,
)
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_logits_are_not_in_memory(layout):
  """Both passes need at most 1/8 of the memory of the float32 logits in total."""
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
  """By default, a TPU rounds the operands of products to bfloat16."""
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
  """The z-loss does not depend on the labels, so its cotangents are summed into one."""
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


def test_second_derivatives_are_refused():
  case = draw(4, 4, 9)
  grad = jax.grad(lambda hidden: objective(hidden, case.head, None, case)[0])
  with pytest.raises(NotImplementedError, match="linear_cross_entropy .* second derivatives"):
    jax.grad(lambda hidden: jnp.sum(grad(hidden)))(case.hidden)


def test_there_is_no_kernel():
  case = draw(4, 4, 9)
  arrays = case.hidden, case.head, case.labels
  with pytest.raises(NotImplementedError, match="implementation='pallas' .* no kernel"):
    linear_cross_entropy(*arrays, implementation="pallas")
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    linear_cross_entropy(*arrays, implementation="triton")
  np.testing.assert_array_equal(
    linear_cross_entropy(*arrays, implementation="xla")[0], linear_cross_entropy(*arrays)[0]
  )
  assert "linear_cross_entropy: xla, on every platform (requested)" in explain(
    linear_cross_entropy, *arrays, implementation="xla"
  )
  text = explain(linear_cross_entropy, *arrays)
  assert text.startswith("linear_cross_entropy: xla, on every platform (this operation: it has no")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"head_layout": "dn"}, "head_layout must be 'dv' or 'vd', got 'dn'"),
    ({"head_layout": "vd"}, r"head .* 'vd' must have D = 4, got .*\(4, 9\)"),
    ({"hidden": jnp.ones((3, 4), int)}, "hidden must be floating, got int32"),
    ({"head": jnp.ones((4, 9), int)}, "head must be floating, got int32"),
    ({"head": jnp.ones((1, 4, 9))}, r"hidden must be \[.., D\] and head a matrix, got"),
    ({"head": jnp.ones((4, 0))}, r"head must have a vocabulary .*\(4, 0\)"),
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
  for function in (linear_cross_entropy, functools.partial(explain, linear_cross_entropy)):
    with pytest.raises(ValueError, match=message):
      function(options["hidden"], options["head"], options["labels"], **{
        key: value for key, value in options.items() if key not in ("hidden", "head", "labels")
      })  # fmt: skip
