"""The choice of each operation's implementation and TPU generation; no other module makes it."""

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
  """The properties of a TPU generation that the kernels depend on.

  Attributes:
    name: Common name, such as "v5e".
    device_kinds: Values of jax's `device_kind`; the first one is canonical.
    vmem_bytes: Vector memory (VMEM) of one core.
    num_cores: Cores of one jax device; a parallel leading grid axis is split over them.
    matrix_unit: Rows and columns of the matrix unit.
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
    implementation: "pallas" (the TPU kernel), "xla" (plain jnp, for any platform), or None, which
      selects the kernel if the program is lowered for a TPU that has one for these arguments, else
      "xla". The host's own devices do not matter. On a CPU, "pallas" runs only under
      `pltpu.force_tpu_interpret_mode`; otherwise jax raises "Only interpret mode is supported on
      CPU backend".

  Raises:
    NotImplementedError: The implementation does not exist.
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise NotImplementedError(
      f"implementation={implementation!r} does not exist; expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  return implementation


def choose(implementation: str | None, refusal: str | None) -> str | None:
  """Returns "pallas", "xla", or None to decide by the platform that the program is lowered for.

  Args:
    implementation: The caller's choice.
    refusal: Name of an argument and why the kernel does not support it; None if it supports all.

  Raises:
    NotImplementedError: The implementation does not exist, or is "pallas" and the kernel does not
      support an argument.
  """
  implementation = resolve(implementation)
  if implementation is None and (refusal is not None or unknown_tpu() is not None):
    return "xla"
  if implementation == "pallas" and refusal is not None:
    raise NotImplementedError(f"implementation='pallas' does not support {refusal}")
  return implementation


def run(
  implementation: str | None, pallas: Callable[..., Any], xla: Callable[..., Any], *args: Any
) -> Any:
  """Runs the implementation from `choose`; both must return the same shapes and dtypes."""
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
  """Describes in words what a call would run.

  Args:
    operation: Name of the operation.
    implementation: The caller's choice.
    refusal: See `choose`.
    kernels: Layout of the kernel in words and its VMEM in bytes, for each pass.

  Raises:
    NotImplementedError: See `choose`.
  """
  chosen = choose(implementation, refusal)
  if chosen == "xla":
    reason = "requested" if implementation == "xla" else refusal
    if reason is None:
      reason = f"there are no kernels for {unknown_tpu()}"
    return f"{operation}: xla, on every platform ({reason})"
  where = "pallas" if chosen == "pallas" else "pallas where lowered for TPU, else xla"
  layout = "; ".join(
    f"{name} {text}, {nbytes / MIB:.1f} MiB of vector memory"
    for name, (text, nbytes) in kernels.items()
  )
  found = _device_kind()
  why = f"from the mesh, the target or this host: {found}" if found else "default: no TPU found"
  return f"{operation}: {where}; laid out for {generation().name} ({why}): {layout}"


def generation() -> Generation:
  """Returns the TPU generation that kernels are laid out for.

  This is the first of: the devices of the mesh in use (the call's `Sharding`, else jax's context),
  the `target`, the process's own TPU, v5e.
  """
  return _BY_KIND.get(_device_kind() or "", GENERATIONS[_DEFAULT])


def unknown_tpu() -> str | None:
  """Returns the kind of the TPU in use if it has no kernels (v2, v3), else None."""
  kind = _device_kind()
  return None if kind is None or kind in _BY_KIND else kind


# Both are part of the key of jax's trace caches. `_PINNED` holds the result of `_device_kind` at
# the call ("" for None), because the result would differ inside a `shard_map`.
_TARGET = jax.make_user_context(None)
_PINNED = jax.make_user_context(None)


def pin(device_kind: str | None) -> contextlib.AbstractContextManager[None]:
  """Fixes the result of `generation` inside the context; see `sharding.laid_out_for`.

  Args:
    device_kind: Kind of the TPUs of the call's mesh; None without such a mesh.
  """
  return _PINNED(device_kind or _device_kind() or "")


def kind_of(mesh: Mesh | AbstractMesh) -> str | None:
  """Returns jax's `device_kind` of a mesh's TPUs; None if it does not consist of TPUs."""
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
  """Lays kernels out for a TPU generation inside the context, to compile without such a TPU.

  The target is part of jax's cache keys, so one function may be traced for several generations.
  The context may be entered before or after `jax.set_mesh`. A mesh of TPUs takes precedence over
  the target; on a mesh of other devices the target applies.

  Args:
    name: Generation: "v4", "v5e", "v5p", "v6e" or "tpu7x".

  Raises:
    ValueError: The name is unknown.
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
      # Without a mesh in use, also set jax's own abstract device, for operations that query the
      # chip while they are traced. A mesh in use is left unchanged: a `shard_map` must use it.
      chosen = GENERATIONS[name]
      device = AbstractDevice(chosen.device_kinds[0], chosen.num_cores, "tpu")
      mesh = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device
      )
      stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    yield


def first_order(operation: str, function: Callable[..., Any], *args: Any) -> Any:
  """Runs one pass of a `custom_vjp`, which must not itself be differentiated.

  Both passes need this: a second derivative goes through the forward pass first.

  Raises:
    NotImplementedError: The pass is differentiated; kernels have no second derivatives.
  """

  @jax.custom_vjp
  def once(*args):
    return function(*args)

  def refuse(*_):
    raise NotImplementedError(f"{operation} has no second derivatives")

  once.defvjp(refuse, refuse)
  return once(*args)
