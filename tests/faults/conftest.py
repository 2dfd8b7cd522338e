"""Fixtures of the tiny run in which faults are caused."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny_runs
from tests.faults.causing import Job

WORDS = ("the", "disk", "was", "full", "and", "nobody", "saw", "which", "bit", "had", "turned")


SEED = os.environ.get("LL3M_FAULT_SEED", str(time.time_ns() % 10**6))


@pytest.fixture
def chance(request) -> random.Random:
  """A test's random numbers, which depend only on the seed and the test."""
  print(f"LL3M_FAULT_SEED={SEED}")
  return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
  """A JSONL file of 400 distinct documents of about 100 bytes."""
  draw = random.Random(0)
  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  lines = (" ".join(draw.choices(WORDS, k=20)) for _ in range(400))
  path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
  return path


@pytest.fixture(scope="session")
def arguments(byte_tokenizer, text) -> list[str]:
  """Flags of a tiny model on the text, with 64 tokens per step."""
  return [
    *tiny_runs.flags(byte_tokenizer, rows=2, shards=2),
    "--train_dataset.type=json",
    f"--train_dataset.json_dataset.path={text}",
    "--logger.tensorboard=False",
  ]


@pytest.fixture(scope="session")
def start(arguments) -> Callable[..., Job]:
  """Returns a function that starts a run: (output, *more arguments, file_limit=None) -> Job."""
  return lambda output, *more, **options: Job([*arguments, *more], output, **options)


@pytest.fixture(scope="session")
def finished(start, tmp_path_factory) -> Path:
  """The output_dir of a run of 30 steps with checkpoints 10, 20 and 30; tests use copies."""
  output = tmp_path_factory.mktemp("runs") / "finished"
  more = ("--total_steps=30", "--save_model_freq=10", "--checkpointer.max_to_keep=3")
  with start(output, *more) as job:
    assert job.end() == 0, job.said()
  return output


@pytest.fixture
def copy(finished, tmp_path) -> Path:
  """A copy of the finished run, to be damaged."""
  return shutil.copytree(finished, tmp_path / "copy")
