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


def test_the_trace_has_the_selected_steps(tmp_path):
  assert run(tmp_path, range(2, 5)) == 7
  assert traced_steps(tmp_path) == [2, 3, 4]


def test_a_resumed_run_traces_the_remaining_steps(tmp_path):
  run(tmp_path, range(2, 5), made=2)
  assert traced_steps(tmp_path) == [3, 4]


def test_a_run_resumed_after_the_selected_steps_writes_no_trace(tmp_path, capsys):
  run(tmp_path, range(2, 5), made=4)
  assert not (tmp_path / "profile").exists()
  said = "nothing to trace: step 4 is finished, and profile_steps ends at 4\n"
  assert capsys.readouterr().err == said


def test_without_selected_steps_there_is_no_trace_and_no_message(tmp_path, capsys):
  run(tmp_path, range(0), made=4)
  assert not (tmp_path / "profile").exists() and not capsys.readouterr().err


def test_the_trace_is_written_when_the_run_fails(tmp_path):
  with pytest.raises(FloatingPointError):
    run(tmp_path, range(2, 6), fails_at=3)
  assert traced_steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("text", ["", "3", "0:2", "3:2", "2:11", "a:b", "1:2:3", "-1:2", "1:٢"])
def test_malformed_steps_and_steps_outside_the_run_are_refused(text):
  with pytest.raises(ValueError, match=r"`profile_steps` .*FIRST:LAST.* 1\.\.10 "):
    parse_steps(text, total_steps=10)
