"""The one place that chooses an operation's implementation, and the TPU it is laid out for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

IMPLEMENTATIONS = ("pallas", "xla")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Generation:
  """What the kernels have to know of a TPU.

  Attributes:
    name: how people call it.
    device_kinds: how jax calls it; the first one stands for it.
    vmem_bytes: vector memory of one core.
    num_cores: cores of one jax device; a parallel leading grid axis is split over them.
  """

  name: str
  device_kinds: tuple[str, ...]
  vmem_bytes: int
  num_cores: int


GENERATIONS = {
  generation.name: generation
  for generation in (
    Generation("v4", ("TPU v4",), 16 * MIB, 2),
    Generation("v5e", ("TPU v5 lite", "TPU v5e"), 128 * MIB, 1),
    Generation("v5p", ("TPU v5", "TPU v5p"), 64 * MIB, 2),
    Generation("v6e", ("TPU v6 lite", "TPU v6e"), 128 * MIB, 1),
    Generation("tpu7x", ("TPU7x",), 64 * MIB, 1),
  )
}
_DEFAULT = "v5e"
_BY_KIND = {kind: g for g in GENERATIONS.values() for kind in g.device_kinds}


def resolve(implementation: str | None) -> str | None:
  """Checks the name of an implementation.

  Args:
    implementation: "pallas": the TPU kernel, which also runs under
      `pltpu.force_tpu_interpret_mode`; "xla": plain jnp, for any platform; None: the kernel where
      the program is lowered for a TPU that has one for these arguments, else "xla". The host's own
      devices have no say in it.

  Raises:
    NotImplementedError: there is no implementation of that name.
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise NotImplementedError(
      f"implementation={implementation!r} does not exist; expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  return implementation


def choose(implementation: str | None, refusal: str | None) -> str | None:
  """Returns "pallas", "xla", or None for the one that suits the lowering platform.

  Args:
    implementation: what the caller asked for.
    refusal: why the kernel cannot serve these arguments, naming the argument; None if it can.

  Raises:
    NotImplementedError: no such implementation, or the kernel was asked for and cannot serve.
  """
  implementation = resolve(implementation)
  if implementation is None and (refusal is not None or unknown_tpu() is not None):
    return "xla"
  if implementation == "pallas" and refusal is not None:
    raise NotImplementedError(f"implementation='pallas' does not serve {refusal}")
  return implementation


def run(
  implementation: str | None, pallas: Callable[..., Any], xla: Callable[..., Any], *args: Any
) -> Any:
  """Runs what `choose` returned; both functions give the same shapes and dtypes."""
  if implementation == "pallas":
    return pallas(*args)
  if implementation == "xla":
    return xla(*args)
  return jax.lax.platform_dependent(*args, tpu=pallas, default=xla)


def describe(
  operation: str,
  implementation: str | None,
  refusal: str | None,
  kernels: Mapping[str, tuple[str, int]],
) -> str:
  """Says in words what a call would run.

  Args:
    operation: its name.
    implementation: what the caller asked for.
    refusal: as in `choose`.
    kernels: by pass, how the kernel is laid out and the vector memory it takes, in bytes.

  Raises:
    NotImplementedError: as `choose`.
  """
  chosen = choose(implementation, refusal)
  if chosen == "xla":
    reason = "asked for" if implementation == "xla" else refusal
    if reason is None:
      reason = f"there are no kernels for {unknown_tpu()}"
    return f"{operation}: xla, on every platform ({reason})"
  where = "pallas" if chosen == "pallas" else "pallas where lowered for TPU, else xla"
  layout = "; ".join(
    f"{name} {text}, {nbytes / MIB:.1f} MiB of vector memory"
    for name, (text, nbytes) in kernels.items()
  )
  found = _device_kind()
  why = f"of the mesh, the target or this host: {found}" if found else "the default: no TPU here"
  return f"{operation}: {where}; laid out for {generation().name} ({why}): {layout}"


def generation() -> Generation:
  """Returns the TPU that kernels are laid out for.

  That is the device of the abstract mesh, which `target` sets and `shard_map` has; else the
  process's own TPU; else v5e.
  """
  return _BY_KIND.get(_device_kind() or "", GENERATIONS[_DEFAULT])


def unknown_tpu() -> str | None:
  """Returns the kind of the TPU at hand if there are no kernels for it (v2, v3)."""
  kind = _device_kind()
  return None if kind is None or kind in _BY_KIND else kind


def _device_kind() -> str | None:
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "tpu":
    return device.device_kind
  if jax.default_backend() == "tpu":
    return jax.devices()[0].device_kind
  return None


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
  """Lays kernels out for a generation while it is open: to compile for a TPU that is not here.

  It is part of jax's abstract mesh, and so of what compiled functions are cached by: one function
  may be traced for several generations.

  Args:
    name: "v4", "v5e", "v5p", "v6e" or "tpu7x".

  Raises:
    ValueError: unknown name.
  """
  if name not in GENERATIONS:
    raise ValueError(f"unknown TPU generation {name!r}; expected one of {', '.join(GENERATIONS)}")
  chosen = GENERATIONS[name]
  device = AbstractDevice(chosen.device_kinds[0], chosen.num_cores, "tpu")
  mesh = jax.sharding.get_abstract_mesh()
  mesh = AbstractMesh(
    mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def first_order(operation: str, function: Callable[..., Any], *args: Any) -> Any:
  """Runs what a `custom_vjp` is made of, which is not itself to be differentiated.

  Both passes need it: a second derivative goes through the forward one first.

  Raises:
    NotImplementedError: when it is: kernels have no second derivatives.
  """

  @jax.custom_vjp
  def once(*args):
    return function(*args)

  def refuse(*_):
    raise NotImplementedError(f"{operation} has no second derivatives")

  once.defvjp(refuse, refuse)
  return once(*args)
