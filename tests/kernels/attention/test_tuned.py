"""Every configuration that the tables choose, interpreted, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ll3m_kernels import explain, flash_attention, target
from ll3m_kernels.dispatch import GENERATIONS
from ll3m_kernels.tuning import tables
from tests.kernels.attention import oracle
from tests.kernels.tolerances import assert_close


def configurations():
  """Yields one entry of each kind: generations with one matrix unit run the same kernel."""
  found = {}
  for path in sorted(tables.Path(tables.__file__).parent.glob("*.json")):
    for key, entry in tables.read(path).items():
      if key.operation == "flash_attention":
        unit = GENERATIONS[key.generation].matrix_unit
        kind = (unit, key.dtype, key.size, key.mask, *entry["limits"].values())
        found.setdefault(kind, (key, entry["limits"]))
  return list(found.values())


@pytest.mark.parametrize(
  "key, limits", configurations(), ids=lambda value: "-".join(map(str, value))
)
def test_values_and_gradients(key, limits):
  length = max(limits.values())  # the largest tile is whole, and cut by the mask
  options = {
    "is_causal": key.mask != "full",
    "local_window_size": (length // 4 - 1, 0) if key.mask == "window" else None,
  }
  rng = np.random.default_rng(0)
  dtype = jnp.dtype(key.dtype)
  shape = (1, length, 1, key.size)
  q, k, v, bar = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))

  def both(implementation):
    def run(*arrays):
      output, vjp = jax.vjp(
        lambda *x: flash_attention(*x, **options, implementation=implementation), *arrays
      )
      return output, *vjp(bar)

    return jax.jit(run)(q, k, v)

  with target(key.generation), tables.force({"flash_attention": limits}):
    said = explain(flash_attention, q, k, v, **options)
    assert f"tiles of {limits['keys']} keys x {limits['queries']} queries" in said
    with pltpu.force_tpu_interpret_mode():
      actual = both("pallas")
  expected = oracle.attention(q, k, v, bar, np.zeros((1, 1, length)), **options)
  expected = (expected.output, expected.query_bar, expected.key_bar, expected.value_bar)
  names = ("output", "query", "key", "value")
  for name, found, right, xla in zip(names, actual, expected, both("xla"), strict=True):
    assert_close(found, right, dtype, xla, name)
