"""The one place that chooses an operation's implementation, and the TPU it is laid out for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

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
    matrix_unit: rows and columns of its matrix unit.
  """

  name: str
  device_kinds: tuple[str, ...]
  vmem_bytes: int
  num_cores: int
  matrix_unit: int


GENERATIONS = {
  generation.name: generation
  for generation in (
    Generation("v4", ("TPU v4",), 16 * MIB, 2, 128),
    Generation("v5e", ("TPU v5 lite", "TPU v5e"), 128 * MIB, 1, 128),
    Generation("v5p", ("TPU v5", "TPU v5p"), 64 * MIB, 2, 128),
    Generation("v6e", ("TPU v6 lite", "TPU v6e"), 128 * MIB, 1, 256),
    Generation("tpu7x", ("TPU7x",), 64 * MIB, 1, 256),
  )
}
_DEFAULT = "v5e"
_BY_KIND = {kind: g for g in GENERATIONS.values() for kind in g.device_kinds}


def resolve(implementation: str | None) -> str | None:
  """Checks the name of an implementation.

  Args:
    implementation: "pallas": the TPU kernel, which also runs under
      `pltpu.force_tpu_interpret_mode` (elsewhere on a CPU it is jax that refuses it, with "Only
      interpret mode is supported on CPU backend"); "xla": plain jnp, for any platform; None: the
      kernel where the program is lowered for a TPU that has one for these arguments, else "xla".
      The host's own devices have no say in it.

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

  That is the device of the mesh in use (of the call's `Sharding`, else of jax's own context); else
  what `target` says; else the process's own TPU; else v5e.
  """
  return _BY_KIND.get(_device_kind() or "", GENERATIONS[_DEFAULT])


def unknown_tpu() -> str | None:
  """Returns the kind of the TPU at hand if there are no kernels for it (v2, v3)."""
  kind = _device_kind()
  return None if kind is None or kind in _BY_KIND else kind


# Both are part of what jax caches traces by. What is pinned is the answer of `_device_kind`, "" for
# none: inside of a `shard_map` it would be another one than at the call.
_TARGET = jax.make_user_context(None)
_PINNED = jax.make_user_context(None)


def pin(device_kind: str | None) -> contextlib.AbstractContextManager[None]:
  """Settles what `generation` returns while it is open; see `sharding.laid_out_for`.

  Args:
    device_kind: of the TPU of the mesh that a call is given; None if there is none.
  """
  return _PINNED(device_kind or _device_kind() or "")


def kind_of(mesh: Mesh | AbstractMesh) -> str | None:
  """Returns how jax calls the TPUs that a mesh is made of; None if it is not of TPUs."""
  if isinstance(mesh, Mesh):
    mesh = mesh.abstract_mesh
  device = mesh.abstract_device
  return device.device_kind if device is not None and device.platform == "tpu" else None


def _device_kind() -> str | None:
  if _PINNED.value is not None:
    return _PINNED.value or None
  if (kind := kind_of(jax.sharding.get_abstract_mesh())) is not None:
    return kind
  if _TARGET.value is not None:
    return GENERATIONS[_TARGET.value].device_kinds[0]
  if jax.default_backend() == "tpu":
    return jax.devices()[0].device_kind
  return None


def target(name: str) -> contextlib.AbstractContextManager[None]:
  """Lays kernels out for a generation while it is open: to compile for a TPU that is not here.

  It is part of what compiled functions are cached by: one function may be traced for several
  generations. It may be opened before or after `jax.set_mesh`; a mesh of TPUs is laid out for
  itself, whatever the target, and on a mesh of other devices the target holds.

  Args:
    name: "v4", "v5e", "v5p", "v6e" or "tpu7x".

  Raises:
    ValueError: unknown name.
  """
  if not isinstance(name, str) or name not in GENERATIONS:
    raise ValueError(f"unknown TPU generation {name!r}; expected one of {', '.join(GENERATIONS)}")
  return _open_target(name)


@contextlib.contextmanager
def _open_target(name: str) -> Iterator[None]:
  with contextlib.ExitStack() as stack:
    stack.enter_context(_TARGET(name))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      # Where no mesh is in use, jax itself may be told: then operations that ask it for the chip
      # while they are traced find one. The mesh of a `shard_map` has to be the one in use, so that
      # one stays as it is.
      chosen = GENERATIONS[name]
      device = AbstractDevice(chosen.device_kinds[0], chosen.num_cores, "tpu")
      mesh = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device
      )
      stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
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
