"""Conversions and exports that are killed, run out of disk space, or have little memory."""

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ll3m import families
from ll3m.core import checkpoint
from ll3m.families.tensor_rules import expected_tensors
from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
from ll3m.hf.safetensors_io import SafetensorsWriter, TensorInfo
from tests.faults.causing import REPETITIONS, files

MEBIBYTE = 2**20


def publish(folder: Path, *, layers: int, d_model: int) -> Path:
  """Writes a random model with 12 d_model^2 float32 values per layer."""
  family, config = families.get_preset("llama2_7b")
  config = config.replace(
    vocab_size=64, d_model=d_model, d_ff=8 * d_model // 3, num_layers=layers, num_heads=4,
    num_kv_heads=4, head_dim=d_model // 4, max_positions=64,
  )  # fmt: skip
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(family.to_hf_config(config)))
  draw = np.random.default_rng(0)
  tensors = {
    name: draw.standard_normal(spec.shape, dtype=np.float32)
    for name, spec in expected_tensors(family.rules, config).items()
  }
  save_file(tensors, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
  """A model of 150 MB, whose conversion takes about half a second after the imports."""
  return publish(tmp_path_factory.mktemp("models") / "published", layers=12, d_model=512)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> Path:
  output = tmp_path_factory.mktemp("models") / "converted"
  convert_model(open_model(published), output)
  return output


def command(verb: str, source: Path, output: Path, *more: str) -> list[str]:
  given = {"convert": "checkpoint_dir", "export": "checkpoint"}[verb]
  flags = (f"--{given}={source}", f"--output_dir={output}", *more)
  return [sys.executable, "-m", f"ll3m.{verb}", *flags]


def begun(verb: str, output: Path) -> bool:
  """Returns whether a command has begun to write weights."""
  if verb == "convert":
    return (output / "params").is_dir()
  return output.with_name(f".{output.name}.unfinished").is_dir()


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_killed_command_leaves_nothing_that_looks_complete(
  verb, published, converted, tmp_path, chance
):
  source = {"convert": published, "export": converted}[verb]
  output, killed = tmp_path / "output", 0

  def complete() -> None:
    if verb == "convert":
      assert files(output) == files(converted)
    else:
      ours, theirs = (load_file(f / "model.safetensors") for f in (output, published))
      assert ours.keys() == theirs.keys()
      assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

  for _ in range(REPETITIONS):
    process = subprocess.Popen(command(verb, source, output), stderr=subprocess.DEVNULL)
    while not begun(verb, output) and process.poll() is None:
      time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.25))
    process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
    if (output / "ll3m.json").exists() or (verb == "export" and output.exists()):
      complete()  # it finished before the signal
      shutil.rmtree(output)
    elif verb == "convert":
      with pytest.raises(ValueError, match="not a complete checkpoint: .* has no ll3m.json"):
        checkpoint.open_checkpoint(output)
  assert killed
  # Leftovers of the killed commands do not prevent or change the next one's result.
  done = subprocess.run(command(verb, source, output), capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  complete()
  assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_full_disk_is_one_sentence_and_existing_files_are_unaffected(
  verb, published, converted, tmp_path
):
  source = {"convert": published, "export": converted}[verb]
  (tmp_path / "earlier").mkdir()
  (tmp_path / "earlier" / "work").write_text("mine")
  before, output = files(source), tmp_path / "output"
  process = subprocess.Popen(
    command(verb, source, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MEBIBYTE, MEBIBYTE))
  _, said = process.communicate(timeout=120)
  assert process.returncode == 1
  last = said.splitlines()[-1]
  assert last.startswith("error: ") and "File too large" in last and str(output) in last
  assert "Traceback" not in said
  assert files(source) == before and (tmp_path / "earlier" / "work").read_text() == "mine"
  if verb == "convert":
    with pytest.raises(ValueError, match="not a complete checkpoint"):
      checkpoint.open_checkpoint(output)
  else:
    assert not output.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_too_small_disk_is_reported_before_anything_is_written(
  verb, published, converted, tmp_path
):
  """The disk is a real file system of 16 MiB, in namespaces in which any user may mount it."""
  source, disk = {"convert": published, "export": converted}[verb], tmp_path / "disk"
  disk.mkdir()
  inside = shlex.join(command(verb, source, disk / "output"))
  script = (
    f"mount -t tmpfs -o size=16m tmpfs {disk} && "
    f"{{ {inside}; code=$?; find {disk} -size +8k; exit $code; }}"
  )
  done = subprocess.run(
    ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1, done.stderr
  assert "needs 0.2 GB" in done.stderr.splitlines()[-1]
  assert not done.stdout  # no file of weights


# Imports come first, so that the limit applies to the memory that converting adds.
DRIVER = """
import resource, sys
from pathlib import Path
from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
import jax, tensorstore
convert_model(open_model(Path(sys.argv[1])), sys.argv[2])  # a small model, to start all threads
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = mapped + int(sys.argv[5])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
convert_model(open_model(Path(sys.argv[3])), sys.argv[4])
"""


def test_model_larger_than_memory_is_converted(tmp_path):
  """The model has 1.2 GB in shards; the address space, including mapped files, has 380 MiB."""
  small = publish(tmp_path / "small", layers=1, d_model=64)
  folder = tmp_path / "large"
  folder.mkdir()
  family, config = families.get_preset("llama2_7b")
  config = config.replace(
    vocab_size=64, d_model=1024, d_ff=2816, num_layers=24, num_heads=8, num_kv_heads=8,
    head_dim=128, max_positions=64,
  )  # fmt: skip
  (folder / "config.json").write_text(json.dumps(family.to_hf_config(config)))
  tensors = {
    name: TensorInfo(spec.shape, np.dtype(np.float32))
    for name, spec in expected_tensors(family.rules, config).items()
  }
  zeros = np.zeros(2816 * 1024, np.float32)
  with SafetensorsWriter(folder, tensors, 200 * MEBIBYTE) as writer:
    for name, info in tensors.items():
      writer.write(name, zeros[: np.prod(info.shape)].reshape(info.shape))
  size = sum(info.nbytes for info in tensors.values())
  room = 380 * MEBIBYTE
  assert size > 3 * room
  arguments = (small, tmp_path / "a", folder, tmp_path / "b", room)
  done = subprocess.run(
    [sys.executable, "-c", DRIVER, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  assert checkpoint.open_checkpoint(tmp_path / "b").config == config
