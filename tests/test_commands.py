"""All commands and tools in one process, one after another, and in processes of their own."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import absl.flags
import jax
import pytest

from tests import tiny_runs
from tests.calling import call
from tests.compiled import quickly

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests" / "fixtures" / "parity" / "llama2"
VERBS = ("convert", "train", "evaluate", "generate", "export", "plan")
TOOLS = ("demo", "download", "logits", "plan_sweep", "prepare_text", "tpu_run")


def surroundings() -> dict:
  """Returns the state of the process that a command must not change."""
  return {
    # Libraries define flags of their own when first used, with other names than these.
    "flags": [n for n in absl.flags.FLAGS if "." in n or n in ("config", "debug", "total_steps")],
    "handlers": list(logging.getLogger().handlers),
    "environment": dict(os.environ),
    "platforms": jax.config.jax_platforms,
    "argv": list(sys.argv),
    "folder": os.getcwd(),
  }


@pytest.fixture
def text(tmp_path) -> Path:
  path = tmp_path / "text.jsonl"
  path.write_text("".join(f'{{"text": "{"line after line " * 6}{n}"}}\n' for n in range(20)))
  return path


def test_all_commands_run_in_one_process(byte_tokenizer, text, tmp_path):
  before = surroundings()
  rows = f"--eval_dataset.json_dataset.path={text}"
  train = [
    *tiny_runs.flags(byte_tokenizer, rows=2, shards=1), "--train_dataset.type=json",
    f"--train_dataset.json_dataset.path={text}", "--logger.tensorboard=False", "--total_steps=2",
    f"--logger.output_dir={tmp_path / 'run'}", "--eval_steps=2", rows, "--log_freq=1",
  ]  # fmt: skip
  model, run, exported = tmp_path / "model", tmp_path / "run", tmp_path / "exported"
  evaluated = None
  for verb, arguments, printed in (
    ("convert", [f"--checkpoint_dir={PUBLISHED}", f"--output_dir={model}"], "llama"),
    ("train", train, ""),
    ("train", train, "step 2 of 2"),
    ("evaluate", [f"--checkpoint={run}", "--eval_dataset.type=json", rows, "--json",
                  "--eval_dataset.seqio_dataset.batch_size=2", "--eval_steps=2",
                  "--eval_dataset.seqio_dataset.num_shards=1",
                  "--eval_dataset.seqio_dataset.task_feature_lengths=(32,)"], '"loss"'),
    ("generate", [f"--checkpoint={run}", "--prompt=line", "--max_new_tokens=3"], "\n"),
    ("export", [f"--checkpoint={run}", f"--output_dir={exported}"], "llama"),
  ):  # fmt: skip
    done = call(verb, *arguments)
    assert done.returncode == 0 and printed in done.stdout, (verb, done)
    if verb == "evaluate":
      evaluated = json.loads(done.stdout)
    assert surroundings() == before
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  (last,) = (record for record in records if record["step"] == 2 and "eval_loss" in record)
  assert evaluated["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
  assert (exported / "model.safetensors").is_file() and (model / "ll3m.json").is_file()

  # A run's flags.json reproduces it bit for bit in another folder.
  again = tmp_path / "again"
  done = call("train", f"--config={run / 'flags.json'}", f"--logger.output_dir={again}")
  assert done.returncode == 0, done.stderr
  one, other = (tiny_runs.arrays(folder / "checkpoints" / "2") for folder in (run, again))
  assert one == other
  flags = [json.loads((folder / "flags.json").read_text()) for folder in (run, again)]
  assert {n for n in flags[0] if flags[0][n] != flags[1][n]} == {"logger.output_dir"}
  assert flags[0]["eval_dataset.seqio_dataset.batch_size"] is None  # taken from train_dataset


def load_tool(name: str):
  spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", [*VERBS, *TOOLS])
def test_wrong_flag_is_one_sentence_and_exit_code_2(capsys, name):
  before = surroundings()
  module = importlib.import_module(f"ll3m.{name}") if name in VERBS else load_tool(name)
  assert module.main(["--nosuch=1"]) == 2
  assert capsys.readouterr().err == "error: unknown flag --nosuch\n"
  assert module.main(["--help"]) == 0
  assert module.__doc__.splitlines()[0] in capsys.readouterr().out
  assert surroundings() == before


def test_wrong_key_in_a_file_is_named_with_its_line(tmp_path):
  file = tmp_path / "run.yaml"
  file.write_text("total_steps: 3\noptimizer:\n  type: adamw\n  adamw_optimiser:\n    lr: 1e-4\n")
  done = call("train", f"--config={file}", f"--logger.output_dir={tmp_path / 'run'}")
  assert done.returncode == 2
  assert done.stderr == (
    f"error: --config: {file}:5: unknown key optimizer.adamw_optimiser.lr (did you mean "
    f"'optimizer.adamw_optimizer.lr'?)\n"
  )
  assert not (tmp_path / "run").exists()


def test_files_and_flags_give_the_same_run(byte_tokenizer, text, tmp_path):
  """A nested file with an overriding flag gives the same run as flags alone."""
  model = "vocab_size=258,d_model=16,d_ff=24,num_layers=1,num_heads=2,num_kv_heads=1,head_dim=8"
  base = tmp_path / "base.yaml"
  base.write_text(f"""
    load_model_config: smollm2_135m
    update_model_config: {model}
    tokenizer.path: {byte_tokenizer}
    train_dataset:
      type: json
      json_dataset.path: {text}
      seqio_dataset: {{batch_size: 2, num_shards: 1, task_feature_lengths: [32]}}
    logger: {{tensorboard: false}}
    total_steps: 7
  """)
  (tmp_path / "more.yaml").write_text("optimizer: {type: lion, lion_optimizer.lr: 1e-2}\n")
  files = [f"--config={base}", f"--config={tmp_path / 'more.yaml'}"]
  flags = [
    "--load_model_config=smollm2_135m",
    f"--update_model_config={model}",
    f"--tokenizer.path={byte_tokenizer}", "--train_dataset.type=json",
    f"--train_dataset.json_dataset.path={text}", "--train_dataset.seqio_dataset.batch_size=2",
    "--train_dataset.seqio_dataset.num_shards=1", "--logger.tensorboard=False",
    "--train_dataset.seqio_dataset.task_feature_lengths=(32,)", "--optimizer.type=lion",
    "--optimizer.lion_optimizer.lr=0.01",
  ]  # fmt: skip
  arrays = []
  for name, arguments in (("files", files), ("flags", flags)):
    output = tmp_path / name
    done = call("train", *arguments, "--total_steps=1", f"--logger.output_dir={output}")
    assert done.returncode == 0, done.stderr
    arrays.append(tiny_runs.arrays(output / "checkpoints" / "1"))
  assert arrays[0] == arrays[1]


@pytest.mark.parametrize("verb", VERBS)
def test_error_ends_a_process_with_one_sentence(verb):
  """The command runs as typed; an error ends the process at once, with exit code 2."""
  done = subprocess.run(
    [sys.executable, "-m", f"ll3m.{verb}", "--nosuch=1"],
    env=os.environ | quickly(),
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: unknown flag --nosuch\n"
