import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m.decoding.sampling import Sampling, sample

# A permutation of 0.5, 0.25, 0.15, 0.07, 0.03.
PROBABILITIES = np.array([0.15, 0.5, 0.03, 0.25, 0.07])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3.0
DRAWS = 20_000


def frequencies(sampling, logits=LOGITS):
  batch = jnp.broadcast_to(logits, (DRAWS, len(logits)))
  seeds = jnp.arange(DRAWS, dtype=jnp.uint32)
  tokens = jax.jit(sample, static_argnums=3)(batch, seeds, jnp.full(DRAWS, 7), sampling)
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=len(logits)) / DRAWS


def expected(temperature=1.0, top_k=0, top_p=1.0):
  """Returns the distribution computed by sorting in NumPy, one token at a time."""
  p = PROBABILITIES ** (1 / temperature)
  p = p / p.sum()
  order = np.argsort(-p)[: top_k or None]
  kept, total = [], 0.0
  for token in order:
    kept.append(token)
    total += p[token] / p[order].sum()
    if total >= top_p:
      break
  result = np.zeros_like(p)
  result[kept] = p[kept] / p[kept].sum()
  return result


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 99},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
  ],
)
def test_samples_have_the_expected_distribution(options):
  want = expected(**options)
  found = frequencies(Sampling(**options))
  # Five standard deviations of the frequency of an event with probability 1/2.
  np.testing.assert_allclose(found, want, atol=5 * (0.25 / DRAWS) ** 0.5)
  assert not found[want == 0].any()


def test_a_tiny_top_p_keeps_the_most_likely_token():
  assert frequencies(Sampling(1.0, top_p=1e-9))[1] == 1.0


def test_top_k_is_applied_before_top_p():
  # Among the two most likely tokens, 0.5 and 0.25, the first has 2/3, which exceeds 0.6.
  assert frequencies(Sampling(1.0, top_k=2, top_p=0.6))[1] == 1.0


def test_temperature_zero_selects_the_first_largest_logit():
  tokens = sample(
    jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]]),
    jnp.zeros(2, jnp.uint32),
    jnp.arange(2),
    Sampling(),
  )
  assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
  assert frequencies(Sampling(temperature))[1] == 1.0


def test_a_huge_temperature_is_uniform():
  np.testing.assert_allclose(frequencies(Sampling(1e30)), 0.2, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.99}])
def test_masked_tokens_are_never_sampled(options):
  logits = np.array([1.0, -np.inf, 1.0, 1.0, -np.inf], np.float32)
  found = frequencies(Sampling(50.0, **options), logits)
  assert found[1] == found[4] == 0.0


def test_samples_depend_only_on_seed_and_position():
  logits = jnp.zeros((4, 1000))
  draw = lambda seeds, positions: sample(  # noqa: E731
    logits, jnp.array(seeds, jnp.uint32), jnp.array(positions), Sampling(1.0)
  ).tolist()
  a, b, c, d = draw([1, 1, 2, 1], [5, 5, 5, 6])
  assert a == b and len({a, c, d}) == 3
  assert draw([2, 1, 1, 1], [5, 6, 5, 5]) == [c, d, a, a]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"temperature": float("nan")}, "`temperature` must be a finite number"),
    ({"temperature": float("inf")}, "`temperature` must be a finite number"),
    ({"temperature": -1.0}, "`temperature` must be a finite number"),
    ({"temperature": 1.0, "top_k": -1}, "`top_k` must be at least 0"),
    ({"temperature": 1.0, "top_p": 0.0}, "`top_p` must be above 0"),
    ({"temperature": 1.0, "top_p": 1.5}, "at most 1, got 1.5"),
    ({"temperature": 1.0, "top_p": float("nan")}, "`top_p` must be above 0"),
    ({"top_k": 5}, "temperature above 0"),
    ({"top_p": 0.5}, "temperature above 0"),
  ],
)
def test_rejects_invalid_settings(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)
