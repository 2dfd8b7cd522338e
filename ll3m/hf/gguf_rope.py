"""The rotary parameters of a GGUF file, as in config.json.

Scaling by a factor of each frequency's own is stored as tensors: the factors of Llama 3, which are
computed from four parameters, or the two tables of longrope.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ll3m.hf.gguf_metadata import Metadata, shortest_decimal

_LLAMA3 = "rope_freqs.weight"
_LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
TENSORS = (_LLAMA3, *_LONGROPE)

# Wavelengths per original context between which Llama 3 interpolates, in all published models.
_LOW, _HIGH = 1.0, 4.0


def read_rope(metadata: Metadata, tensors: Mapping[str, Any], rotary_dim: int) -> dict[str, Any]:
  """Returns the rotary parameters by their keys in config.json, except the rotated fraction.

  Args:
    metadata: The metadata of the file.
    tensors: The tensors of the file, by name.
    rotary_dim: R, the number of rotated dimensions of a head.

  Raises:
    ValueError: Keys contradict each other, or a tensor is missing.
    NotImplementedError: The scaling is not supported.
  """
  theta = shortest_decimal(metadata.get("{arch}.rope.freq_base", 10_000.0))
  factors = {name: np.ravel(tensors[name].data) for name in TENSORS if name in tensors}
  given = [name for name in _LONGROPE if name in factors]
  if len(given) == 1:
    (missing,) = set(_LONGROPE) - set(given)
    raise ValueError(f"{metadata.path} has {given[0]} but lacks {missing}")
  config: dict[str, Any] = {"rope_theta": theta}
  scalings = []
  if (factor := _linear_factor(metadata, ("longrope",) if given else ())) != 1:
    scalings.append({"rope_type": "linear", "factor": factor})
  if _LLAMA3 in factors and (factors[_LLAMA3] != 1).any():
    scalings.append(_llama3(metadata, factors[_LLAMA3].astype(np.float64), theta, rotary_dim))
  if given:
    original_key = "{arch}.rope.scaling.original_context_length"
    if (original := metadata.require(original_key)) < 2:
      raise ValueError(
        f"{metadata.path} has {metadata.full(original_key)}={original}, expected at least 2"
      )
    config["original_max_position_embeddings"] = original
    scalings.append(_longrope(metadata, original, *(factors[name] for name in _LONGROPE)))
  if len(scalings) > 1:
    kinds = " and ".join(scaling["rope_type"] for scaling in scalings)
    raise NotImplementedError(f"{metadata.path} has rotary scaling of several types, {kinds}")
  for scaling in scalings:
    config["rope_scaling"] = scaling | {"type": scaling["rope_type"]}
  return config


def _linear_factor(metadata: Metadata, other_types: tuple[str, ...]) -> float:
  """Returns the factor by which llama.cpp divides positions.

  Args:
    metadata: The metadata of the file.
    other_types: Types of scaling that tensors implement.

  Raises:
    ValueError: Keys contradict each other.
    NotImplementedError: The scaling is of another type.
  """
  keys = ("{arch}.rope.scaling.factor", "{arch}.rope.scale_linear")  # the latter until 2023
  given = {metadata.full(key): metadata.get(key, 0) for key in keys}
  factors = {shortest_decimal(factor) for factor in given.values() if factor} or {1.0}
  kind_key = metadata.full("{arch}.rope.scaling.type")
  kind = metadata.get(kind_key, "linear")
  if kind not in ("none", "linear", *other_types):
    raise NotImplementedError(
      f"{metadata.path} has {kind_key}={kind!r}; only 'none' and 'linear' are supported, and "
      f"'longrope' with tensors of factors"
    )
  if len(factors) > 1 or (kind == "none" and factors != {1.0}):
    said = ", ".join(f"{key}={factor}" for key, factor in given.items() if factor)
    raise ValueError(
      f"{metadata.path} has {said} and {kind_key}={kind!r}, which contradict each other"
    )
  return factors.pop()


def _llama3(
  metadata: Metadata, factors: np.ndarray, theta: float, rotary_dim: int
) -> dict[str, Any]:
  """Returns the parameters of Llama 3's scaling from which factors were computed.

  The largest factor is that of low frequencies. An interpolated one gives the original context.
  """
  frequencies = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
  factor = factors.max()
  between = (factors > 1) & (factors < factor)
  if factors.shape == frequencies.shape and np.isfinite(factor) and between.any():
    smooth = (factor / factors[between] - 1) / (factor - 1)
    turns = smooth * (_HIGH - _LOW) + _LOW
    original = round(float(np.median(turns * 2 * math.pi / frequencies[between])))
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
      return {
        "rope_type": "llama3",
        "factor": shortest_decimal(factor),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
      }
  raise NotImplementedError(
    f"{metadata.path} has {_LLAMA3}, which divides each rotary frequency by a factor, but not as "
    f"Llama 3.1 and 3.2 do; other factors are not supported"
  )


def _longrope(
  metadata: Metadata, original: int, short: np.ndarray, long: np.ndarray
) -> dict[str, Any]:
  """Returns the parameters of longrope."""
  scaling: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [shortest_decimal(x) for x in short],
    "long_factor": [shortest_decimal(x) for x in long],
  }
  longer = max(1.0, metadata.require("{arch}.context_length") / original)
  usual = math.sqrt(1 + math.log(longer) / math.log(original))
  magnitude = metadata.get("{arch}.rope.scaling.attn_factor", 1.0) or 1.0
  if not math.isclose(magnitude, usual, rel_tol=1e-6):  # float32 in GGUF
    scaling["attention_factor"] = shortest_decimal(magnitude)
  return scaling
