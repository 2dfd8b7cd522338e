"""Bad arguments of all operations but attention, which raise the same errors in `explain`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ll3m_kernels as kernels

NAN, INF = float("nan"), float("inf")
IMPLEMENTATIONS = [None, "xla", "pallas"]

pytestmark = pytest.mark.usefixtures("unchecked")


def mesh():
  return jax.make_mesh((2, 2, 2), ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)


def norm(operation, **changes):
  x, scale = jnp.ones((4, 16)), jnp.ones(16)
  arguments = {"x": x, "residual": x, "scale": scale, "bias": scale}
  names = {
    "rms_norm": ("x", "scale"), "layer_norm": ("x", "scale", "bias"),
    "add_rms_norm": ("x", "residual", "scale"), "add_layer_norm": tuple(arguments),
  }[operation]  # fmt: skip
  return {name: arguments[name] for name in names} | changes


def rotary(**changes):
  x = jnp.ones((4, 8, 2, 16))
  return {"query": x, "key": x, "positions": jnp.zeros((4, 8), jnp.int32)} | changes


def loss(**changes):
  labels = jnp.zeros(4, jnp.int32)
  return {"hidden": jnp.ones((4, 16)), "head": jnp.ones((16, 9)), "labels": labels} | changes


def expect(operation, arguments, message, implementation):
  for call in (getattr(kernels, operation), functools.partial(kernels.explain, operation)):
    with pytest.raises(ValueError, match=message):
      call(**arguments, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [[1.0], None, 1.0], ids=repr)
def test_arguments_that_are_not_arrays(bad, implementation):
  kind = type(bad).__name__
  for operation in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
    for name in norm(operation):
      if name == "bias" and bad is None:
        continue
      message = f"{name} must be an array, got {kind}"
      expect(operation, norm(operation, **{name: bad}), message, implementation)
  for name in rotary():
    message = f"{name} must be an array, got {kind}"
    expect("rotary_embedding", rotary(**{name: bad}), message, implementation)
  if implementation == "pallas":
    return
  for name in (*loss(), "bias", "mask"):
    if name in loss() or bad is not None:
      message = f"{name} must be an array, got {kind}"
      expect("linear_cross_entropy", loss(**{name: bad}), message, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "epsilon", [0.0, -1e-6, NAN, INF, 1e-60, "1e-6", True, np.ones(()), jnp.ones(())], ids=repr
)
def test_bad_epsilon(epsilon, implementation):
  for operation in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
    message = "epsilon must be a positive number, got"
    expect(operation, norm(operation, epsilon=epsilon), message, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("operation", "make", "name", "values"),
  [
    ("rms_norm", functools.partial(norm, "rms_norm"), "scale_offset", [NAN, INF, "1", None]),
    (
      "add_rms_norm", functools.partial(norm, "add_rms_norm"), "scale_offset",
      [NAN, True, jnp.ones(())],
    ),
    (
      "rotary_embedding", rotary, "theta",
      [NAN, INF, 0, -1.0, 1e-60, "1e4", jnp.array(1e4), np.array(1e4), None],
    ),
    ("rotary_embedding", rotary, "scaling_factor", [NAN, INF, 0, 0.5, "2", jnp.ones(()), None]),
    (
      "rotary_embedding", rotary, "rotary_dim",
      [8.0, jnp.array(8), "8", True, np.array(8), 7, 0, -2, 18],
    ),
  ],
)  # fmt: skip
def test_bad_options(operation, make, name, values, implementation):
  for value in values:
    expect(operation, make(**{name: value}), f"{name} must be", implementation)


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("z_loss", [NAN, INF, -1e-4, "0", None, jnp.zeros(()), True]),
    ("logits_soft_cap", [NAN, INF, 0, -1.0, "30", jnp.ones(())]),
    ("return_correct", [1, "yes", None, jnp.array(True)]),
    ("head_layout", ["dn", None, 3]),
  ],
)
def test_bad_options_of_the_loss(name, values):
  for value in values:
    expect("linear_cross_entropy", loss(**{name: value}), f"{name} must be", None)


def test_traced_options():
  x, scale = jnp.ones((4, 16)), jnp.ones(16)
  for function, message in (
    (lambda value: kernels.rms_norm(x, scale, epsilon=value), "epsilon"),
    (lambda value: kernels.rms_norm(x, scale, scale_offset=value), "scale_offset"),
    (lambda value: kernels.rotary_embedding(**rotary(theta=value)), "theta"),
    (lambda value: kernels.linear_cross_entropy(**loss(z_loss=value)), "z_loss"),
  ):
    with pytest.raises(ValueError, match=f"{message} must be .*, got an array of shape"):
      jax.jit(function)(1.0)


def test_hidden_states_without_features():
  arguments = loss(hidden=jnp.ones((4, 0)), head=jnp.ones((0, 9)))
  expect("linear_cross_entropy", arguments, "hidden must have a D of at least 1", None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_shardings(implementation):
  sharding = kernels.Sharding(mesh())
  every = [("rms_norm", norm("rms_norm")), ("rotary_embedding", rotary())]
  if implementation != "pallas":
    every.append(("linear_cross_entropy", loss()))
  for operation, arguments in every:
    for bad in ("x", mesh(), 1):
      message = "sharding must be a Sharding or None, got"
      expect(operation, {**arguments, "sharding": bad}, message, implementation)
    batch = {k: v[:3] if k in ("x", "query", "key") else v for k, v in arguments.items()}
    batch |= {k: v[:3] for k, v in batch.items() if k in ("positions", "hidden", "labels")}
    message = r"must be a multiple of dp x fsdp = 4, got \[3, "
    expect(operation, {**batch, "sharding": sharding}, message, implementation)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((None,), "mesh must be a jax.sharding.Mesh or AbstractMesh, got None"),
    (("m", None), r"batch_axes must be a tuple of names, such as \('dp',\), got None"),
    (("m", "dp", "mp"), r"batch_axes must be a tuple of names, such as \('dp',\), got 'dp'"),
    (("m", ["dp"], "mp"), r"batch_axes must be a tuple of names, such as \('dp',\), got \['dp'\]"),
    (("m", (0,), "mp"), "batch_axes must be a tuple of names"),
    (("m", ("dp", "mp"), "mp"), "axis can split .* got dp, mp, mp"),
    (("m", ("dp", "dp"), None), "axis can split .* got dp, dp"),
    (("m", ("dp",), ("mp",)), r"head_axis must be a name or None, got \('mp',\)"),
    (("m", ("dp",), ""), "the mesh has the axes .*, got "),
  ],
)
def test_bad_fields_of_a_sharding(arguments, message):
  arguments = [mesh() if argument == "m" else argument for argument in arguments]
  with pytest.raises(ValueError, match=message):
    kernels.Sharding(*arguments)


@pytest.mark.parametrize("name", [["v4"], None, "V4", {}], ids=repr)
def test_unknown_targets(name):
  with pytest.raises(ValueError, match="unknown TPU generation .*; expected one of v4, v5e"):
    kernels.target(name)


@pytest.mark.parametrize("operation", ["rms_norm", "rotary_embedding", "linear_cross_entropy"])
def test_explain_rejects_unknown_keywords(operation):
  arguments = {"rms_norm": norm("rms_norm"), "rotary_embedding": rotary()}.get(operation, loss())
  with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
    kernels.explain(operation, **arguments, colour="red")


@pytest.mark.parametrize("with_sharding", [True, False])
def test_empty_arrays(with_sharding):
  """Plain jnp returns empty results and zero gradients; the kernel raises an error."""
  sharding = kernels.Sharding(mesh()) if with_sharding else None
  for shape in ((0, 16), (4, 0), (0, 3, 16)):
    x, scale = jnp.ones(shape), jnp.ones(shape[-1])

    def total(x, scale, implementation=None):
      results = kernels.add_layer_norm(
        x, x, scale, scale, sharding=sharding, implementation=implementation
      )
      return sum(jnp.sum(y) for y in results)

    bars = jax.jit(jax.grad(total, (0, 1)))(x, scale)
    assert bars[0].shape == shape and not np.asarray(bars[1]).any()
    with pytest.raises(NotImplementedError, match="x: .* at least one element"):
      total(x, scale, "pallas")
  for shape in ((0, 8, 2, 16), (4, 0, 2, 16), (4, 8, 0, 16)):
    query, positions = jnp.ones(shape), jnp.zeros(shape[:2], jnp.int32)
    for implementation in (None, "xla"):
      turned, _ = kernels.rotary_embedding(
        query, query, positions, implementation=implementation, sharding=sharding
      )
      assert turned.shape == shape
    with pytest.raises(NotImplementedError, match="query: .* at least one element"):
      kernels.rotary_embedding(query, query, positions, implementation="pallas")
  hidden = jnp.ones((0, 16))
  losses = kernels.linear_cross_entropy(
    hidden, jnp.ones((16, 9)), jnp.zeros(0, jnp.int32), sharding=sharding
  )
  assert losses[0].shape == (0,)
