"""Randomly damaged files and flags give a clear error or a correct result, and nothing else.

2,000 mutated inputs in `make test`, 20,000 in `make soak`.
"""

import json
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ll3m.data.skipped_examples import Unusable
from ll3m.hf.lazy_tensor import read_part
from ll3m.hf.model_files import open_model
from tests.faults.causing import PARITY, SOAK, files

INSERTED = (b"\x00", b"\xff", b'"', b"{", b"]", b"-", b"9" * 30)
EACH = 4000 if SOAK else 400  # of five kinds of input
CLEAR = (ValueError, NotImplementedError, FileNotFoundError)
VALUES = (None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../x",
          "\x00", "\ud800", [], {}, [[]], {"a": {}}, [1, 2], "F32", "🦙" * 50)  # fmt: skip


@pytest.fixture(autouse=True)
def no_hang():
  """Fails a test that takes too long in total."""
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
  signal.alarm(600 if SOAK else 120)
  yield
  signal.alarm(0)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
  """Changes, drops, repeats, inserts or cuts bytes at a random place."""
  at = draw.randrange(len(data) + 1)
  return draw.choice([
    lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
    lambda: data[:at] + data[at + draw.randrange(9) :],
    lambda: data[:at] + data[max(0, at - draw.randrange(20)) :],
    lambda: data[:at] + draw.choice(INSERTED) + data[at:],
    lambda: data[:at],
  ])()  # fmt: skip


def mutate_json(value, draw: random.Random):
  """Replaces, removes, renames or adds an item at a random place in a JSON value."""
  if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
    return draw.choice(VALUES)
  value = value.copy()
  key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
  match draw.randrange(8):
    case 0:
      del value[key]
    case 1 if isinstance(value, dict):
      value[draw.choice(["a", "", "dtype", "shape", key + "x"])] = value.pop(key)
    case 2 if isinstance(value, dict):
      value[draw.choice(["a", "../x", "dtype"])] = draw.choice(VALUES)
    case _:
      value[key] = mutate_json(value[key], draw)
  return value


def mutate(text: bytes, draw: random.Random) -> bytes:
  """Mutates JSON as a value or as bytes, once or several times."""
  for _ in range(draw.choice([1, 1, 1, 2, 5])):
    try:
      if draw.random() < 0.6:
        text = json.dumps(mutate_json(json.loads(text), draw)).encode()
        continue
    except (ValueError, RecursionError):
      pass
    text = mutate_bytes(text, draw)
  return text


@pytest.fixture
def folder(tmp_path) -> Path:
  return shutil.copytree(PARITY / "llama2", tmp_path / "published")


def read_everything(folder: Path) -> dict[str, np.ndarray] | None:
  """Returns the tensors of a folder, or None if it is refused with a clear error."""
  try:
    model = open_model(folder)
    return {
      name: read_part(tensor, tuple(slice(0, size) for size in tensor.shape))
      for name, tensor in model.tensors.items()
    }
  except CLEAR as error:
    assert 0 < len(str(error)) < 10_000
    return None


def test_mutated_safetensors_headers(folder, chance):
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  (length,) = struct.unpack("<Q", whole[:8])
  header, data = whole[8 : 8 + length], whole[8 + length :]
  (folder / "expected.npz").unlink()
  before, refused = files(folder.parent), 0
  needed = len(open_model(folder).tensors)
  original = {name: values.shape for name, values in load_file(file).items()}
  for _ in range(EACH):
    changed = mutate(header, chance)
    said = len(changed) if chance.random() < 0.9 else chance.choice([0, 1, 2**63, len(changed) + 1])
    file.write_bytes(struct.pack("<Q", said) + changed + data)
    found = read_everything(folder)
    refused += found is None
    if found is not None:  # an accepted folder has a whole model
      shapes = {name: values.shape for name, values in found.items()}
      assert shapes.items() <= original.items() and len(shapes) == needed
  assert refused > EACH / 4
  file.write_bytes(whole)
  assert files(folder.parent) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_mutated_json_files(folder, chance, name):
  expected = load_file(folder / "model.safetensors")
  if "index" in name:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    weight_map = {tensor: "part.safetensors" for tensor in expected}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  text = (folder / name).read_bytes()
  before, refused = files(folder.parent), 0
  for _ in range(EACH):
    (folder / name).write_bytes(mutate(text, chance))
    found = read_everything(folder)
    refused += found is None
    if found is not None:
      assert all(np.array_equal(found[tensor], expected[tensor]) for tensor in found)
  assert refused > EACH / 10
  (folder / name).write_bytes(text)
  assert files(folder.parent) == before


def test_mutated_rows_of_data(byte_tokenizer, chance):
  from ll3m.data.config import TokenizerConfig
  from ll3m.data.row_files import parse_json
  from ll3m.data.shapes import SHAPES
  from ll3m.data.text_processor import TextProcessor
  from ll3m.data.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))
  processor = TextProcessor(SHAPES["text"], tokenizer)
  row, skipped = json.dumps({"text": "naïve text of </s> a row"}).encode(), 0
  for _ in range(EACH):
    try:
      document = processor(parse_json(mutate(row, chance)))
    except Unusable as error:
      assert 0 < len(str(error)) < 200
      skipped += 1
      continue
    assert len(document.tokens) == len(document.loss)
    assert document.tokens.min() >= 0 and document.tokens.max() < 258
    assert np.count_nonzero(document.tokens == tokenizer.eos_id) == 1  # the one at its end
  assert EACH / 4 < skipped < EACH


DRIVER = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from ll3m import train

def stop(*_):
  raise RuntimeError("accepted")

train.make_program = stop  # the first call after the checks
for arguments in json.load(sys.stdin):
  with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
    code = train.main(arguments)
  print(json.dumps([code, said.getvalue()]))
"""


def test_mutated_flags(arguments, chance, tmp_path):
  """One flag of a valid command line is mutated at a time; a refusal comes with an explanation."""
  good = [*arguments, "--total_steps=3", "--mesh_dim=-1,1,1", "--optimizer.type=adamw",
          "--train_dataset.text_processor.fields=text", "--eval_steps=0"]  # fmt: skip
  nasty = ["", "-1", "0", "nan", "inf", "1e999", "9" * 40, "None", "()", "(32,", "a,b", "../x",
           "/dev/null", "true", "[1]", "x=1", "d_model=0", "{}", "-1,-1,1", "1,2"]  # fmt: skip
  lines = []
  for _ in range(EACH):
    line = list(good)
    at = chance.randrange(len(line))
    name, _, value = line[at].partition("=")
    if chance.random() < 0.3:
      cut = chance.randrange(3, len(name))
      name = name[:cut] + name[cut + 1 :]
    elif chance.random() < 0.5:
      value = chance.choice(nasty)
    else:
      value = mutate_bytes(value.encode(), chance).decode(errors="ignore").replace("\x00", "")
    line[at] = f"{name}={value}"
    lines.append([*line, f"--logger.output_dir={tmp_path / 'run'}"])
  done = subprocess.run(
    [sys.executable, "-c", DRIVER],
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
    timeout=500,
  )
  answered = len(done.stdout.splitlines())
  assert done.returncode == 0, (lines[answered : answered + 1], done.stderr[-3000:])
  outcomes = [json.loads(line) for line in done.stdout.splitlines()]
  accepted = sum("RuntimeError: accepted" in said for _, said in outcomes)
  assert len(outcomes) == EACH and 0 < accepted < EACH * 2 / 3
  for code, said in outcomes:  # a sentence, or the help
    explained = said.startswith("error: ") and said.count("\n") == 1
    assert "(--debug" not in said or "RuntimeError: accepted" in said, said
    assert (code in (1, 2) and explained) or (code, said) == (0, ""), said
  assert not list(tmp_path.iterdir())  # nothing was written
