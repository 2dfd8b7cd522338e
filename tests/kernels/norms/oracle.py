"""The norms and their gradients in float64 NumPy, by their definitions.

Dimensions: R rows, D features.
"""

from typing import Any, NamedTuple

import numpy as np


class Normed(NamedTuple):
  normed: np.ndarray  # [.., D]
  total: np.ndarray | None  # the sum, with a fused addition
  x_bar: np.ndarray
  residual_bar: np.ndarray | None
  scale_bar: np.ndarray  # [D]
  bias_bar: np.ndarray | None


def norm(
  operation: str,
  x: Any,
  residual: Any,
  scale: Any,
  bias: Any,
  normed_bar: Any,
  sum_bar: Any,
  *,
  epsilon: float,
  scale_offset: float = 0.0,
) -> Normed:
  """Returns the results, and the gradients for their cotangents; None for absent arrays."""
  adds, is_centred = operation.startswith("add_"), operation.endswith("layer_norm")
  dtype, shape = np.asarray(x).dtype, np.shape(x)
  x, scale, normed_bar = wide(x), wide(scale), wide(normed_bar)
  total = None
  if adds:
    # The sum is rounded, as the next block reads it, before it is normalised.
    x = total = wide((x + wide(residual)).astype(dtype))
  rows, bars = x.reshape(-1, shape[-1]), normed_bar.reshape(-1, shape[-1])  # [R, D]
  gain = scale + scale_offset
  mean = rows.mean(axis=1, keepdims=True) if is_centred else 0.0
  deviation = np.sqrt(((rows - mean) ** 2).mean(axis=1, keepdims=True) + epsilon)
  unit = (rows - mean) / deviation
  normed = unit * gain + (0.0 if bias is None else wide(bias))
  # Row by row: the Jacobian of the unit rows, [D, D], times their cotangents.
  size = shape[-1]
  x_bar = np.empty_like(rows)
  for row, (u, d, bar) in enumerate(zip(unit, deviation[:, 0], bars, strict=True)):
    jacobian = np.eye(size) - np.outer(u, u) / size - (1.0 / size if is_centred else 0.0)
    x_bar[row] = jacobian @ (bar * gain) / d
  x_bar = x_bar.reshape(shape)
  if adds:
    x_bar = x_bar + wide(sum_bar)
  return Normed(
    normed.reshape(shape),
    total,
    x_bar,
    x_bar if adds else None,
    (bars * unit).sum(axis=0),
    None if bias is None else bars.sum(axis=0),
  )


def wide(x: Any) -> np.ndarray:
  return np.asarray(x).astype(np.float64)
