"""The blocked implementation against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m_kernels.attention import reference, xla

B, N, K, H, HV = 2, 6, 2, 8, 5
SCALE = 0.3
# Both sum in float32, in other orders.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}

CASES = {
  "full": {},
  "causal": {"is_causal": True},
  "window": {"window": (4, 3)},
  "causal_window": {"is_causal": True, "window": (5, 0)},
  "window_of_itself": {"is_causal": True, "window": (0, 0)},
  "soft_cap": {"is_causal": True, "logits_soft_cap": 1.5},
  "segments": {"is_causal": True, "segments": True},
  "everything": {
    "is_causal": True,
    "window": (6, 0),
    "segments": True,
    "logits_soft_cap": 2.0,
  },
}
LENGTHS = {"square": (21, 21), "more_keys": (9, 21), "more_queries": (21, 9), "one": (1, 13)}


def run(attention, case, length, key_length, dtype=jnp.float32):
  """Returns outputs and gradients of a scalar of both."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  query, key, value = (
    draw(B, length, N, H), draw(B, key_length, K, H), draw(B, key_length, K, HV),
  )  # fmt: skip
  output_bar, sum_bar = draw(B, length, N, HV), draw(B, N, length)
  options = {"is_causal": False, "window": None, "logits_soft_cap": None} | case
  ids = (None, None)
  if options.pop("segments", False):
    # The last segment of the queries has no keys at all.
    ids = tuple(
      jnp.asarray(np.sort(rng.integers(0, top, (B, size)))).at[:, -1].set(last)
      for top, size, last in ((3, length, 7), (3, key_length, 2))
    )

  def forward(query, key, value):
    return attention(query, key, value, scale=SCALE, query_ids=ids[0], key_ids=ids[1], **options)

  def scalar(*arrays):
    output, log_sum_exp = forward(*arrays)
    seen = log_sum_exp > -1e29
    return jnp.sum(output * output_bar) + jnp.sum(jnp.where(seen, log_sum_exp, 0.0) * sum_bar)

  def both(*arrays):
    return forward(*arrays) + jax.grad(scalar, argnums=(0, 1, 2))(*arrays)

  return jax.jit(both)(query, key, value)


@pytest.mark.parametrize(
  ("case", "lengths", "block"),
  [(case, "square", 8) for case in CASES]
  + [("everything", lengths, 7) for lengths in LENGTHS]
  + [("full", lengths, 7) for lengths in LENGTHS]
  + [("causal", "square", 256)],
)
def test_equals_the_reference(case, lengths, block, monkeypatch):
  monkeypatch.setattr(xla, "_BLOCK", block)
  found = run(xla.attention, CASES[case], *LENGTHS[lengths])
  expected = run(reference.attention, CASES[case], *LENGTHS[lengths])
  for name, a, b in zip(("output", "sum", "query", "key", "value"), found, expected, strict=True):
    np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=name)


def test_many_blocks_are_merged():
  options = xla._Options(1.0, True, None, None)
  assert len(list(xla._blocks(options, 10_000, 10_000))) == 32
  assert [rows for rows, _ in xla._blocks(options, 200, 200)] == [slice(0, 128), slice(128, 200)]


def test_blocks_read_only_what_they_see():
  options = xla._Options(1.0, True, (100, 0), None)
  assert list(xla._blocks(options, 300, 300)) == [
    (slice(0, 128), slice(0, 128)),
    (slice(128, 256), slice(28, 256)),
    (slice(256, 300), slice(156, 300)),
  ]


def test_keeps_bfloat16_and_accumulates_in_float32():
  found = run(xla.attention, CASES["causal"], 21, 21, jnp.bfloat16)
  exact = run(reference.attention, CASES["causal"], 21, 21)
  assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
  for a, b in zip(found, exact, strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32) / scale, b / scale, atol=2e-2)
