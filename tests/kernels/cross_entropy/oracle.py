"""The loss of a linear head and its gradients in float64 NumPy, and comparisons with them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ll3m_kernels import linear_cross_entropy
from tests.kernels.tolerances import assert_close


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
  """Evaluates the definition in float64, on inputs that are already rounded to their dtype."""
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
  """Returns the results and gradients of linear_cross_entropy."""
  grad = jax.value_and_grad(
    functools.partial(objective, case=case, **options), argnums=(0, 1, 2), has_aux=True
  )
  (_, results), bars = jax.jit(grad)(case.hidden, case.head, case.bias)
  return Expected(*results, *bars)


def assert_right(actual: Expected, expected: Expected) -> None:
  """Checks losses and gradients to the accuracy of float32 sums, plus one rounding in bfloat16."""
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
  """Checks that each element of a bfloat16 array is rounded once, up to 2e-6 of the largest one.

  The elements are rounded float32 sums, whose error is that large if their terms cancel.
  """
  assert actual.dtype == jnp.bfloat16
  if expected.size:
    error = np.abs(np.asarray(actual, np.float64) - expected)
    allowed = 2.0**-8 * np.abs(expected) + 2e-6 * np.abs(expected).max()
    assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.3g} above the bound"
