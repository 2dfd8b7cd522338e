import jax
import jax.numpy as jnp
import pytest

from ll3m.training.profiling import Profiler, parse_steps
from tests.traces import traced_steps


def run(folder, steps: range, *, made: int = 0, total: int = 6, fails_at: int | None = None):
  step = jax.jit(lambda x: x + 1)
  x = step(jnp.float32(made))
  with Profiler(str(folder), steps, made=made) as profiler:
    for number in range(made + 1, total + 1):
      with profiler.step(number):
        x = step(x)
        if number == fails_at:
          raise FloatingPointError
      profiler.finish(number, x)
  return float(x)


def test_the_steps_asked_for_are_in_the_trace(tmp_path):
  assert run(tmp_path, range(2, 5)) == 7
  assert traced_steps(tmp_path) == [2, 3, 4]


def test_a_resumed_run_traces_what_is_left(tmp_path):
  run(tmp_path, range(2, 5), made=2)
  assert traced_steps(tmp_path) == [3, 4]


def test_nothing_is_left_to_trace(tmp_path, capsys):
  run(tmp_path, range(2, 5), made=4)
  assert not (tmp_path / "profile").exists()
  said = "nothing to trace: step 4 is made, profile_steps ends at 4\n"
  assert capsys.readouterr().err == said


def test_nothing_is_asked_for(tmp_path, capsys):
  run(tmp_path, range(0), made=4)
  assert not (tmp_path / "profile").exists() and not capsys.readouterr().err


def test_an_error_does_not_lose_the_trace(tmp_path):
  with pytest.raises(FloatingPointError):
    run(tmp_path, range(2, 6), fails_at=3)
  assert traced_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("text", ["", "3", "0:2", "3:2", "2:11", "a:b", "1:2:3", "-1:2", "1:٢"])
def test_what_are_no_steps_of_the_run(text):
  with pytest.raises(ValueError, match=r"`profile_steps` must be FIRST:LAST, both within 1..10 "):
    parse_steps(text, total_steps=10)
