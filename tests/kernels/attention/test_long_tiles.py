"""The largest tiles that the rule chooses, interpreted and compared with float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m_kernels import explain, flash_attention, target
from ll3m_kernels.attention import block_sizes
from ll3m_kernels.dispatch import GENERATIONS
from tests.kernels import numpy_kernels
from tests.kernels.attention import oracle
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize(
  "generation, mask", [("v5e", "causal"), ("v5p", "full"), ("v6e", "causal")]
)
def test_values_and_gradients_of_the_largest_tiles(generation, mask):
  problem = block_sizes.Problem(4096, 4096, 128, 128, 2, has_segments=False, mask=mask)
  limits = block_sizes.rule(problem, GENERATIONS[generation])._asdict()
  # The largest tile is not shortened, and a causal mask crosses it.
  length = max(limits.values())
  options = {"is_causal": mask == "causal"}
  rng = np.random.default_rng(0)
  dtype = jnp.bfloat16
  shape = (1, length, 1, 128)
  q, k, v, bar = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))

  def both(implementation):
    def run(*arrays):
      output, vjp = jax.vjp(
        lambda *x: flash_attention(*x, **options, implementation=implementation), *arrays
      )
      return output, *vjp(bar)

    return jax.jit(run)(q, k, v)

  with target(generation):
    explanation = explain(flash_attention, q, k, v, **options)
    assert all(f"{name}={limit}" in explanation for name, limit in limits.items())
    with numpy_kernels.interpreted():
      actual = both("pallas")
  expected = oracle.attention(q, k, v, bar, np.zeros((1, 1, length)), **options)
  expected = (expected.output, expected.query_bar, expected.key_bar, expected.value_bar)
  names = ("output", "query", "key", "value")
  for name, found, wanted, xla in zip(names, actual, expected, both("xla"), strict=True):
    assert_close(found, wanted, dtype, xla, name)
