"""The answer to "would it fit, and how fast could it be": one program on one machine."""

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

# A ring along one dimension of the torus goes both ways round.
_LINKS_OF_A_RING = 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a program takes of a machine. Bytes are per chip: per jax device (of v3, a core).

  Attributes:
    subject: what was planned, in lines of (name, text).
    bytes_per_chip: "parameters", "optimizer" (or "kv_cache"), "temporaries" (activations and all
      else), and "headroom", which is negative where the program does not fit.
    hbm_bytes: what a program may have of a device's memory.
    kernels: names of the Pallas kernels in the compiled program.
    device_kind: how jax calls the devices.
    collectives: what each device sends in a step; bytes by the ring algorithms.
    compile_seconds: of the compiler, on this machine.
    flops: of all matrix products of a step, all devices together; None where it does not fit, as
      for all that follows.
    step_seconds: how long a step takes at least for "compute", "hbm" and "ici", and on several
      slices "network". What bounds the step is the largest: they can run at the same time.
    tokens_per_second: at that bound, all devices together.
    mfu: FLOPs that the model needs (of training, with nothing recomputed; of decoding, `flops`) by
      those the devices could do meanwhile.
    largest_batch: that fits, if it was searched for.
    advice: what to change, if it does not fit.
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
    """Whether the compiler made a program of it; of decoding, of two layers, and all have room."""
    return self.flops is not None

  @property
  def why_no_kernels(self) -> str:
    """Says why there is no kernel in the program."""
    if any(self.device_kind in g.device_kinds for g in GENERATIONS.values()):
      return "none serves these shapes, plain XLA runs"
    return f"there are none for {self.device_kind}, plain XLA runs"

  def to_json(self) -> dict[str, Any]:
    """Returns what `--json` prints."""
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
  """What a compiled module does in one run, on one device.

  Attributes:
    flops: of matrix products.
    hbm_bytes: read and written.
    collectives: what it sends.
    kernels: names of the Pallas kernels in it.
  """

  flops: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  kernels: tuple[str, ...]

  @classmethod
  def of(cls, module: Module, mesh: Mesh, keys_per_query: float) -> "Work":
    """Reads it off a module that was compiled for a mesh."""
    slice_of = np.array([getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat])
    return cls(
      flops=costs.flops(module, keys_per_query),
      hbm_bytes=costs.hbm_bytes(module),
      collectives=tuple(collectives(module, dict(mesh.shape), slice_of)),
      kernels=costs.kernels(module),
    )

  @staticmethod
  def sum(parts: Sequence[tuple[int, "Work"]]) -> "Work":
    """Adds up (times, work); times may be negative, to take work off another."""
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
    """Returns how long each part of a device is busy at least."""
    within = sum(c.bytes for c in self.collectives if not c.between_slices)
    between = sum(c.bytes for c in self.collectives if c.between_slices)
    seconds = {
      "compute": self.flops / chip.peak_flops,
      "hbm": self.hbm_bytes / chip.hbm_bandwidth,
      "ici": within / (_LINKS_OF_A_RING * chip.link_bandwidth),
    }
    return seconds | ({"network": between / chip.network_bandwidth} if num_slices > 1 else {})
