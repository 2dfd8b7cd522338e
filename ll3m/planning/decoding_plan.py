"""Plans of generation: decoding one token for each text of a batch.

The decoder calls one compiled layer for all layers of a kind, so programs with one and with two
layers of each kind are compiled. Their difference is the cost of a layer; the rest is the cost of
embedding, head and sampling.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ll3m.core import sharding, tpu_specs
from ll3m.core.dtypes import DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.decoding.decode_params import Weights, joins, shardings, unstack
from ll3m.decoding.decoder import cache_length, cache_placement, make_decoder
from ll3m.decoding.engine import GREEDY, bucket
from ll3m.decoding.sampling import sample
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import make_model
from ll3m.planning.compile_attempt import Attempt, compile_program
from ll3m.planning.program_plan import Plan, Work
from ll3m.planning.training_plan import TrainingJob, machine
from ll3m.training.train_state import bytes_per_device


def plan_decoding(job: TrainingJob) -> Plan:
  """Compiles the decoding of one token and returns its costs.

  Args:
    job: Job to plan. Only the model, `dtype`, the mesh, the rows and the length, which is that of
      the cache, are used.

  Raises:
    ValueError: The mesh does not fit the devices, or the batch does not fit the mesh.
  """
  config, devices = job.preset.config, job.devices
  mesh = sharding.make_mesh(job.options.mesh_dim, devices)
  sharding.local_rows(mesh, job.rows)
  columns = bucket(job.length)
  counts = collections.Counter(config.all_layer_types)
  alike = {name: config.replace(layer_types=(name,)) for name in counts}
  attempts = {
    name: [_attempt(job, of_kind.replace(num_layers=n), mesh, columns) for n in (1, 2)]
    for name, of_kind in alike.items()
  }
  weights, cache = _shapes(job, config, mesh, columns)
  count = sum(x.size for x in jax.tree.leaves(weights))
  chip = tpu_specs.of_device(devices[0])
  parameters, cache_bytes = bytes_per_device(weights), bytes_per_device(cache)
  temporaries = max(
    0,
    *(
      two.used_bytes
      - bytes_per_device(_shapes(job, alike[name].replace(num_layers=2), mesh, columns))
      for name, (_, two) in attempts.items()
    ),
  )
  headroom = chip.hbm_bytes - parameters - cache_bytes - temporaries
  fields: dict[str, Any] = {
    "flops": None, "step_seconds": None, "tokens_per_second": None, "mfu": None,
  }  # fmt: skip
  work = None
  if headroom >= 0 and all(attempt.module for pair in attempts.values() for attempt in pair):
    terms = []
    for number, (name, pair) in enumerate(attempts.items()):
      keys = cache_length(alike[name].pattern[0], columns)
      one, two = (Work.of(attempt.module, mesh, keys) for attempt in pair)
      ends = 1 if number == 0 else 0  # the cost of what is not a layer: 2 one - two
      terms += [(2 * ends - counts[name], one), (counts[name] - ends, two)]
    work = Work.sum(terms)
    seconds = work.seconds(chip, num_slices=sharding.num_slices(devices))
    bound = max(seconds.values())
    fields = {
      "flops": work.flops * len(devices),
      "step_seconds": seconds,
      "tokens_per_second": job.rows / bound,
      "mfu": work.flops / (chip.peak_flops * bound),
    }
  return Plan(
    subject=(
      ("model", f"{job.preset.family.name}, {count:,} parameters"),
      ("machine", machine(devices)),
      ("mesh", ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())),
      ("step", f"one token for each of {job.rows} texts, {columns} columns of cache"),
      ("dtype", job.options.dtype),
    ),
    bytes_per_chip={
      "parameters": parameters,
      "kv_cache": cache_bytes,
      "temporaries": temporaries,
      "headroom": headroom,
    },
    hbm_bytes=chip.hbm_bytes,
    kernels=work.kernels if work else (),
    device_kind=devices[0].device_kind,
    collectives=work.collectives if work else (),
    compile_seconds=sum(attempt.seconds for pair in attempts.values() for attempt in pair),
    **fields,
  )


def _attempt(job: TrainingJob, config: ModelConfig, mesh: Mesh, columns: int) -> Attempt:
  decoder = make_decoder(config, dtype=DTYPES[job.options.dtype], kernels=Kernels.on(mesh))

  def step(weights, cache, tokens, column, starts, seeds):
    hidden, cache = decoder.step(weights, cache, tokens, column, starts)
    logits = decoder.logits(weights.ends, hidden)
    return sample(logits, seeds, column - starts, GREEDY), cache

  weights, cache = _shapes(job, config, mesh, columns)
  rows = sharding.batch_sharding(mesh)
  ints = jax.ShapeDtypeStruct((job.rows,), jnp.int32, sharding=rows)
  seeds = jax.ShapeDtypeStruct((job.rows,), jnp.uint32, sharding=rows)
  column = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  lowered = jax.jit(step, donate_argnums=1).lower(weights, cache, ints, column, ints, seeds)
  return compile_program(lowered)


def _shapes(
  job: TrainingJob, config: ModelConfig, mesh: Mesh, columns: int
) -> tuple[Weights, list[tuple[jax.ShapeDtypeStruct, ...]]]:
  """Returns the shapes and shardings of a decoder's weights and cache."""
  dtype = DTYPES[job.options.dtype]
  kernels = Kernels.on(mesh)

  def init(rng):
    return unstack(config, make_model(config).init(rng), dtype, joined=joins(kernels))

  shapes = jax.eval_shape(init, jax.random.key(0))
  weights = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    shapes,
    shardings(shapes, mesh),
  )
  placement = cache_placement(config, kernels.sharding)
  kept = [
    jax.ShapeDtypeStruct(
      (job.rows, config.num_kv_heads, cache_length(kind, columns), config.head_dim),
      dtype,
      sharding=placement,
    )
    for kind in config.layer_kinds
  ]
  return weights, [(array, array) for array in kept]
