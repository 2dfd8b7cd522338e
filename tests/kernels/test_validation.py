"""The argument checks shared by the operations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m_kernels import validation

NO_ARRAYS = [[1.0], (1.0,), None, 1.0, "x", jnp.float32, {"shape": (1,)}]
NO_NUMBERS = [True, np.bool_(True), "1", None, jnp.ones(()), np.ones(()), np.ones(1), [1.0], 1j]
NO_FINITE_NUMBERS = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 1e39, 10**400]

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("x", NO_ARRAYS, ids=repr)
def test_arguments_that_are_not_arrays(x):
  name = re.escape(type(x).__name__)
  for check in (
    validation.check_array,
    validation.floating,
    validation.integers,
    validation.int32_ids,
  ):
    with pytest.raises(ValueError, match=f"query must be an array, got {name}"):
      check("query", x)


def test_arrays_of_floating_point_numbers():
  for x in (jnp.ones(3, jnp.bfloat16), np.ones(3, np.float32), np.float32(1)):
    assert isinstance(validation.floating("x", x), jax.Array)
  described = validation.floating("x", jax.ShapeDtypeStruct((3,), np.float64))
  assert described == jax.ShapeDtypeStruct((3,), jnp.float32)
  assert validation.floating("x", np.ones(3)).dtype == jnp.float32
  jax.jit(lambda x: validation.floating("x", x))(jnp.ones(3))
  for x in (jnp.ones(3, int), np.array(["a"]), jax.random.key(0), np.ones(3, bool)):
    with pytest.raises(ValueError, match="x must be floating, got"):
      validation.floating("x", x)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_ids_become_int32(dtype):
  ids = np.array([3, 0, 7], dtype)
  for given in (ids, jnp.asarray(ids)):
    actual = validation.int32_ids("ids", given)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, [3, 0, 7])
  assert validation.int32_ids("ids", np.zeros((0, 2), dtype)).shape == (0, 2)
  described = validation.int32_ids("ids", jax.ShapeDtypeStruct((3,), dtype))
  assert described == jax.ShapeDtypeStruct((3,), jnp.int32)


@pytest.mark.parametrize(
  "ids",
  [
    np.array([3, 2**32 + 3]), np.array([-(2**31) - 1]), np.array([2**31], np.uint32),
    np.array([2**64 - 1], np.uint64), jnp.array([2**31], jnp.uint32),
  ],
)  # fmt: skip
def test_ids_that_do_not_fit(ids):
  with pytest.raises(ValueError, match="ids must fit in int32, got -?[0-9]+"):
    validation.int32_ids("ids", ids)


def test_traced_wide_ids_are_taken_modulo_2_to_32():
  """The documentation says so; their values are not known."""
  with jax.enable_x64(True):
    at_hand = jnp.array([3, 2**32 + 3])
    with pytest.raises(ValueError, match="ids must fit in int32, got 4294967299"):
      validation.int32_ids("ids", at_hand)
    traced = jax.jit(lambda ids: validation.int32_ids("ids", ids))(at_hand)
  np.testing.assert_array_equal(traced, [3, 3])


@pytest.mark.parametrize("value", [2, 2.0, np.int16(2), np.float32(2), np.float16(2)], ids=repr)
def test_numbers(value):
  actual = validation.finite_number("epsilon", value, above=0)
  assert type(actual) is float and actual == 2.0
  assert validation.finite_number("epsilon", value, at_least=2) == 2.0


@pytest.mark.parametrize("value", NO_NUMBERS + NO_FINITE_NUMBERS, ids=lambda x: repr(x)[:20])
def test_values_that_are_not_finite_numbers(value):
  with pytest.raises(ValueError, match="epsilon must be a finite number, got"):
    validation.finite_number("epsilon", value)


@pytest.mark.parametrize(
  ("value", "limits", "message"),
  [
    (0, {"above": 0}, "a positive number, got 0"),
    (1e-60, {"above": 0}, "a positive number, got 1e-60"),  # 0 in float32
    (1e-40, {"above": 0}, "a positive number, got 1e-40"),  # 0 on a TPU
    (-1.0, {"at_least": 0}, "a finite number of at least 0, got -1.0"),
    (2, {"above": 2}, "a finite number above 2, got 2"),
  ],
)
def test_numbers_out_of_range(value, limits, message):
  with pytest.raises(ValueError, match=f"epsilon must be {message}"):
    validation.finite_number("epsilon", value, **limits)


def test_traced_numbers_are_refused():
  for check in (validation.finite_number, validation.whole_number, validation.flag):
    with pytest.raises(ValueError, match=r"theta must be .*, got an array of shape \(\)"):
      jax.jit(lambda x, check=check: check("theta", x))(1)


def test_whole_numbers():
  for value in (8, np.int64(8), np.uint8(8)):
    actual = validation.whole_number("size", value, at_least=8)
    assert type(actual) is int and actual == 8
  for value in [*NO_NUMBERS, 8.0, np.float32(8)]:
    with pytest.raises(ValueError, match="size must be a whole number, got"):
      validation.whole_number("size", value)
  with pytest.raises(ValueError, match="size must be a whole number of at least 0, got -1"):
    validation.whole_number("size", -1, at_least=0)


def test_flags():
  assert validation.flag("is_causal", np.bool_(True)) is True
  assert validation.flag("is_causal", False) is False
  for value in (1, 0.0, "yes", None, jnp.array(True)):
    with pytest.raises(ValueError, match="is_causal must be True or False, got"):
      validation.flag("is_causal", value)
