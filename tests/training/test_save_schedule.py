"""The schedule of checkpoints, with a clock that the test sets."""

import jax
import pytest
from jax.experimental import multihost_utils

from ll3m.training import save_schedule
from ll3m.training.config import TrainOptions
from ll3m.training.save_schedule import SaveSchedule


@pytest.fixture
def clock(monkeypatch):
  """Clock in seconds, set by the test."""
  now = [100.0]
  monkeypatch.setattr(save_schedule.time, "monotonic", lambda: now[0])
  return now


def saved(schedule, clock, *, steps, seconds):
  """Returns the steps after which a run is saved if each takes so many seconds."""
  found = []
  for step in range(1, steps + 1):
    clock[0] += seconds
    if schedule.due(step):
      found.append(step)
      schedule.restart()
  return found


@pytest.mark.parametrize(
  ("every_steps", "every_minutes", "expected"),
  [
    (0, 0.0, [20]),
    (8, 0.0, [8, 16, 20]),
    (0, 1.0, [6, 12, 18, 20]),  # steps of 10 seconds
    (8, 1.0, [6, 8, 14, 16, 20]),  # the clock restarts at each save
    (0, 0.1, list(range(1, 21))),
  ],
)
def test_saves_by_steps_by_time_and_at_the_end(clock, every_steps, every_minutes, expected):
  schedule = SaveSchedule(20, every_steps=every_steps, every_minutes=every_minutes)
  assert saved(schedule, clock, steps=20, seconds=10) == expected


def test_process_0s_clock_decides_for_all_processes(clock, monkeypatch):
  """The other process's clock is never due; the processes compare every tenth step."""
  asked = []

  def broadcast(own):
    asked.append(bool(own))
    return len(asked) % 2 == 0  # the answer of process 0

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
  schedule = SaveSchedule(45, every_steps=0, every_minutes=15.0)
  assert saved(schedule, clock, steps=45, seconds=0) == [20, 40, 45]
  assert asked == [False] * 4


def test_runs_are_saved_every_15_minutes_by_default():
  assert TrainOptions().save_model_minutes == 15
  with pytest.raises(ValueError, match="`save_model_minutes` .*at least 0, got -1"):
    TrainOptions(save_model_minutes=-1.0)
