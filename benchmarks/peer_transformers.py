"""Compares training steps and generation with transformers + torch on this machine's CPU.

python -m benchmarks.peer_transformers --torch_python=VENV/bin/python

Both sides run float32 models of the same shapes with random weights, each in one process for the
whole session. Their measurements alternate, so that other load on the machine affects both. The
first measurements are dropped, and the medians are compared. VENV is a virtual environment with
torch and transformers; nothing of this project is imported there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BATCH, LENGTH = 2, 512
PROMPT, NEW_TOKENS = 16, 64
# The tokens of one measurement.
TOKENS = {"train": BATCH * LENGTH, "generate": NEW_TOKENS}
# The project's targets for the ratio of our speed to theirs.
TARGETS = {"train": "at least 0.8, goal 1.1", "generate": "at least 1.1, goal 1.4"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--torch_python", help="Python of a venv with torch and transformers")
  parser.add_argument("--model", default="smollm2_135m", help="preset to measure")
  parser.add_argument("--measure", default="generate,train", help="train, generate, or both")
  parser.add_argument("--repeats", type=int, default=10, help="measurements per side")
  parser.add_argument("--warmup", type=int, default=3, help="dropped measurements before these")
  parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    _serve(arguments.worker)
    return
  if not arguments.torch_python:
    parser.error("--torch_python is required")
  for measure in arguments.measure.split(","):
    _compare(measure, arguments)


def _compare(measure: str, arguments: argparse.Namespace) -> None:
  from ll3m.families import get_preset

  family, config = get_preset(arguments.model)
  task = {"measure": measure, "preset": arguments.model, "hf_config": family.to_hf_config(config)}
  sides = {
    "ll3m": _Side([sys.executable, "-m", "benchmarks.peer_transformers", "--worker=ll3m"], task),
    "torch": _Side([arguments.torch_python, os.path.abspath(__file__), "--worker=torch"], task),
  }
  seconds = {name: [] for name in sides}
  for repeat in range(arguments.warmup + arguments.repeats):
    for name, side in sides.items():
      taken = side.measure()
      if repeat >= arguments.warmup:
        seconds[name].append(taken)
    line = "  ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items() if times)
    print(f"{measure} {repeat}: {line or 'warm-up'}", file=sys.stderr, flush=True)
  for side in sides.values():
    side.close()
  speeds = {name: TOKENS[measure] / statistics.median(times) for name, times in seconds.items()}
  pairs = zip(seconds["torch"], seconds["ll3m"], strict=True)
  print(
    f"{measure}: ll3m {speeds['ll3m']:.1f} tokens/s, torch {speeds['torch']:.1f} tokens/s, "
    f"ratio of medians {speeds['ll3m'] / speeds['torch']:.2f}, median of ratios "
    f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f} ({TARGETS[measure]})",
    flush=True,
  )


class _Side:
  """A process that measures on request."""

  def __init__(self, command: list[str], task: dict):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    self._ask(json.dumps(task))

  def measure(self) -> float:
    """Runs one measurement and returns its duration in seconds."""
    return float(self._ask("go"))

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _ask(self, line: str) -> str:
    print(line, file=self._process.stdin, flush=True)
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f"{self._process.args[0]} exited with code {self._process.wait()}")
    return answer


def _serve(worker: str) -> None:
  """Prepares the task in the first line of stdin, then measures once per further line."""
  task = json.loads(sys.stdin.readline())
  run = WORKERS[worker](task)
  print("ready")
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start)


def _ll3m(task: dict):
  import jax
  import numpy as np

  from ll3m.data.batch import Batch
  from ll3m.decoding.engine import Engine
  from ll3m.families import get_preset
  from ll3m.models.transformer import make_model
  from ll3m.training import optimizer as optimizers
  from ll3m.training.step import init_state, make_train_step

  config = get_preset(task["preset"]).config
  model = make_model(config)
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  if task["measure"] == "generate":
    engine = Engine(config, params)
    prompt = rng.integers(0, config.vocab_size, PROMPT).tolist()
    return lambda: engine.generate([prompt], max_new_tokens=NEW_TOKENS)

  options = optimizers.OptimizerConfig()
  optimizer = optimizers.make_optimizer(options, 100)
  schedule = optimizers.make_schedule(options.chosen, 100)
  step = jax.jit(make_train_step(model, optimizer, schedule), donate_argnums=0)
  state = init_state(params, optimizer, np.zeros(2, np.uint32))
  shape = (1, BATCH, LENGTH)
  batch = Batch(
    inputs=rng.integers(0, config.vocab_size, shape).astype(np.int32),
    targets=rng.integers(0, config.vocab_size, shape).astype(np.int32),
    mask=np.ones(shape, np.float32),
    segment_ids=np.ones(shape, np.int32),
    positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
  )

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  return run


def _torch(task: dict):
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(**task["hf_config"])
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  if task["measure"] == "generate":
    model.eval()
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT))
    return lambda: model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      min_new_tokens=NEW_TOKENS,
      max_new_tokens=NEW_TOKENS,
      pad_token_id=0,
    )

  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
  tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH))

  def run():
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return run


WORKERS = {"ll3m": _ll3m, "torch": _torch}

if __name__ == "__main__":
  main()
