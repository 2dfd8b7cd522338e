"""The plan of one program on one machine: whether it fits, and how fast it could be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ll3m.core import tpu_specs
from ll3m.planning import costs
from ll3m.planning.collectives import Collective, collectives
from ll3m.planning.hlo import Module
from ll3m_kernels.dispatch import GENERATIONS

# A ring along one dimension of the torus sends in both directions.
_LINKS_OF_A_RING = 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """Costs of a program on a machine. Bytes per chip are per jax device, which on v3 is a core.

  If the program does not fit, `flops`, `step_seconds`, `tokens_per_second` and `mfu` are None.

  Attributes:
    subject: Description of what was planned, as lines of (name, text).
    bytes_per_chip: "parameters", "optimizer" (or "kv_cache"), "temporaries" (activations and all
      else), and "headroom", which is negative if the program does not fit.
    hbm_bytes: Memory of a device that a program may use.
    kernels: Names of the Pallas kernels in the compiled program.
    device_kind: Kind of the devices, as jax names it.
    collectives: Collectives of a step; each device sends their bytes, by the ring algorithms.
    compile_seconds: Compile time on this machine.
    flops: FLOPs of all matrix products of a step, on all devices together.
    step_seconds: Lower bounds on the time of a step, by "compute", "hbm" and "ici", and on several
      slices "network". These can overlap, so the largest one bounds the step.
    tokens_per_second: Tokens per second at that bound, on all devices together.
    mfu: FLOPs that the model needs (in training, without recomputation; in decoding, `flops`), as a
      fraction of those that the devices could do in the time of a step.
    largest_batch: Largest batch that fits, if searched for.
    advice: Change that makes the program fit, if it does not.
  """

  subject: Sequence[tuple[str, str]]
  bytes_per_chip: dict[str, int]
  hbm_bytes: int
  kernels: Sequence[str]
  device_kind: str
  collectives: Sequence[Collective]
  compile_seconds: float
  flops: float | None
  step_seconds: dict[str, float] | None
  tokens_per_second: float | None
  mfu: float | None
  largest_batch: int | None = None
  advice: str | None = None

  @property
  def fits(self) -> bool:
    """Whether the program compiled and fits; for decoding, two layers compile and all L fit."""
    return self.flops is not None

  @property
  def why_no_kernels(self) -> str:
    """The reason why the program has no kernel."""
    if any(self.device_kind in g.device_kinds for g in GENERATIONS.values()):
      return "no kernel supports these shapes, so plain XLA runs"
    return f"{self.device_kind} has no kernels, so plain XLA runs"

  def to_json(self) -> dict[str, Any]:
    """Returns the object that `--json` prints."""
    return {
      "fits": self.fits,
      "hbm_bytes": self.hbm_bytes,
      "bytes_per_chip": self.bytes_per_chip,
      "collectives": [
        {"kind": c.kind, "bytes": round(c.bytes), "axis": c.axis} for c in self.collectives
      ],
      "compile_seconds": self.compile_seconds,
      "flops": self.flops,
      "step_seconds": self.step_seconds,
      "tokens_per_second": self.tokens_per_second,
      "mfu": self.mfu,
      "largest_batch": self.largest_batch,
    }


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of a compiled module in one run on one device.

  Attributes:
    flops: FLOPs of matrix products.
    hbm_bytes: Bytes read from and written to main memory.
    collectives: Collectives, with the bytes that the device sends.
    kernels: Names of the Pallas kernels.
  """

  flops: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  kernels: tuple[str, ...]

  @classmethod
  def of(cls, module: Module, mesh: Mesh, keys_per_query: float) -> "Work":
    """Returns the work of a module that was compiled for a mesh."""
    slice_of = np.array([getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat])
    return cls(
      flops=costs.flops(module, keys_per_query),
      hbm_bytes=costs.hbm_bytes(module),
      collectives=tuple(collectives(module, dict(mesh.shape), slice_of)),
      kernels=costs.kernels(module),
    )

  @staticmethod
  def sum(parts: Sequence[tuple[int, "Work"]]) -> "Work":
    """Adds up (times, work) pairs; negative times subtract."""
    sent: dict[Collective, float] = {}
    for times, part in parts:
      for collective in part.collectives:
        key = collective._replace(bytes=0.0)
        sent[key] = sent.get(key, 0.0) + times * collective.bytes
    rows = (key._replace(bytes=nbytes) for key, nbytes in sent.items() if nbytes > 0)
    return Work(
      flops=sum(times * part.flops for times, part in parts),
      hbm_bytes=sum(times * part.hbm_bytes for times, part in parts),
      collectives=tuple(sorted(rows, key=lambda row: -row.bytes)),
      kernels=tuple(sorted({name for _, part in parts for name in part.kernels})),
    )

  def seconds(self, chip: tpu_specs.Chip, *, num_slices: int) -> dict[str, float]:
    """Returns lower bounds on the time that each part of a device is busy."""
    within = sum(c.bytes for c in self.collectives if not c.between_slices)
    between = sum(c.bytes for c in self.collectives if c.between_slices)
    seconds = {
      "compute": self.flops / chip.peak_flops,
      "hbm": self.hbm_bytes / chip.hbm_bandwidth,
      "ici": within / (_LINKS_OF_A_RING * chip.link_bandwidth),
    }
    return seconds | ({"network": between / chip.network_bandwidth} if num_slices > 1 else {})
