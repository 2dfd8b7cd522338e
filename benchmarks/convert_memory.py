"""Measures the memory and speed of converting a checkpoint with TinyLlama's shapes.

  python benchmarks/convert_memory.py [--rounds=3]

Writes a random bf16 checkpoint of 2.2 GB and one with twice the layers to a temporary folder (which
needs up to 13 GB), converts each in a separate process, and reports

* the peak of the process's own memory (RssAnon, which excludes mapped files) above its level after
  the imports, for both depths;
* bytes per second, compared with reading and writing the same file with the safetensors library in
  a separate process; the two alternate, and the medians of the rounds are reported.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 2**30


def rss_anon() -> int:
  """Returns this process's anonymous resident memory, in bytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon"):
      return int(line.split()[1]) * 1024
  raise OSError("this kernel does not report RssAnon")


class Measure:
  """The seconds, processor seconds and peak RssAnon (sampled every 2 ms) of a `with` block."""

  def __enter__(self):
    self.start = self.peak = rss_anon()
    self._clock, self._processor = time.perf_counter(), time.process_time()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._sample)
    self._thread.start()
    return self

  def _sample(self):
    while not self._stop.wait(0.002):
      self.peak = max(self.peak, rss_anon())

  def __exit__(self, *_):
    self.seconds = time.perf_counter() - self._clock
    self.processor = time.process_time() - self._processor
    self._stop.set()
    self._thread.join()

  def figures(self, nbytes: int) -> dict[str, float]:
    """Returns the measurements, to be sent to the parent process."""
    memory = self.peak - self.start
    return {
      "seconds": self.seconds, "processor": self.processor, "memory": memory, "nbytes": nbytes
    }  # fmt: skip


def make_checkpoint(directory: Path, layers: int) -> None:
  """Writes a random bf16 checkpoint; its values repeat, which does not affect conversion."""
  import ml_dtypes
  import numpy as np

  from ll3m import families
  from ll3m.families.tensor_rules import expected_tensors
  from ll3m.hf.safetensors_io import SafetensorsWriter, TensorInfo

  family, config = families.get_preset("tiny_llama_1b")
  config = config.replace(num_layers=layers)
  specs = expected_tensors(family.rules, config)
  values = np.random.default_rng(0).standard_normal(32_000 * 2048, np.float32)
  values = values.astype(ml_dtypes.bfloat16)
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(family.to_hf_config(config)))
  infos = {name: TensorInfo(spec.shape, values.dtype) for name, spec in specs.items()}
  with SafetensorsWriter(directory, infos, 10**12) as writer:
    for name, info in infos.items():
      writer.write(name, values[: info.nbytes // 2].reshape(info.shape))


def convert(source: str, output: str) -> dict[str, float]:
  """Converts in this process."""
  from ll3m.hf.conversion import convert_model
  from ll3m.hf.model_files import open_model

  with Measure() as measure:
    done = convert_model(open_model(source), output)
  return measure.figures(done.nbytes)


def copy(source: str, output: str) -> dict[str, float]:
  """Reads and writes the same file with the safetensors library."""
  import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors looks up by name
  from safetensors.numpy import load_file, save_file

  path = Path(source) / "model.safetensors"
  with Measure() as measure:
    save_file(load_file(path), output)
  return measure.figures(path.stat().st_size)


def run(job: str, source: Path, output: Path) -> dict[str, float]:
  """Runs `convert` or `copy` in a new process and deletes its output."""
  command = [sys.executable, __file__, f"--job={job}", f"--source={source}", f"--output={output}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  try:
    result = subprocess.run(
      command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
  finally:
    shutil.rmtree(output, ignore_errors=True)
    if output.is_file():
      output.unlink()
  os.sync()  # pending writes of this run must not slow down the next one
  return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
  """Writes the checkpoints, measures, and prints the results."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3, help="repetitions of each measurement")
  parser.add_argument("--job", choices=("convert", "copy"), help=argparse.SUPPRESS)
  parser.add_argument("--source", help=argparse.SUPPRESS)
  parser.add_argument("--output", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.job:
    job = convert if options.job == "convert" else copy
    print(json.dumps(job(options.source, options.output)))
    return

  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    for layers in (22, 44):
      make_checkpoint(root / f"{layers}", layers)
    os.sync()
    ours, theirs = [], []
    for _ in range(options.rounds):
      theirs.append(run("copy", root / "22", root / "copy.safetensors"))
      ours.append(run("convert", root / "22", root / "converted"))
    deep = run("convert", root / "44", root / "converted")
  for name, runs in (("safetensors read + write", theirs), ("ll3m.convert", ours)):
    seconds, processor = (statistics.median(r[k] for r in runs) for k in ("seconds", "processor"))
    speed = runs[0]["nbytes"] / seconds / 1e9
    print(f"{name}: {speed:.2f} GB/s ({seconds:.1f} s, {processor:.1f} s of processor; medians)")
  ratios = sorted(r["seconds"] / o["seconds"] for r, o in zip(theirs, ours, strict=True))
  print(
    f"speed against safetensors: {statistics.median(ratios):.2f} (at least 0.5; rounds gave "
    f"{ratios[0]:.2f} to {ratios[-1]:.2f})"
  )
  peak = max(run["memory"] for run in ours)
  print(f"peak RssAnon above the imports, 22 layers: {peak / GIB:.3f} GiB (at most 1 GB)")
  print(f"peak RssAnon above the imports, 44 layers: {deep['memory'] / GIB:.3f} GiB")


if __name__ == "__main__":
  main()
