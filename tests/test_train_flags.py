"""Every wrong flag of the trainer is reported in one sentence, before weights are loaded."""

import json
import subprocess
import sys

import pytest

from ll3m import train

GOOD = {
  "load_model_config": "tiny_llama_1b",
  "logger.output_dir": "OUT",
  "train_dataset.seqio_dataset.mixture_or_task_name": "python_mixture",
  "tokenizer.path": "TOKENIZER",
}
JSON = {
  "train_dataset.type": "json",
  "train_dataset.json_dataset.path": __file__,
  "train_dataset.seqio_dataset.mixture_or_task_name": None,
}
CASES = {
  "preset": ({"load_model_config": "llama2_7bb"}, "did you mean 'llama2_7b'"),
  "another preset": ({"load_model_config": "smollm_135m"}, "did you mean 'smollm2_135m'"),
  "steps with an exponent": ({"total_steps": "1e3"}, "--total_steps=1e3: invalid literal"),
  "too many steps": ({"total_steps": "99999999999"}, "--total_steps=99999999999: "),
  "too many rows": (
    {"train_dataset.seqio_dataset.batch_size": "9999999999"},
    "--train_dataset.seqio_dataset.batch_size=9999999999: ",
  ),
  "no limit of non-finite steps": (
    {"max_nonfinite_steps": "0"},
    "--max_nonfinite_steps must be at least 1, got 0",
  ),
  "field": ({"update_model_config": "d_modle=3"}, "did you mean 'd_model'"),
  "value": ({"update_model_config": "d_model=__import__('os')"}, "d_model must be int, got"),
  "heads": ({"update_model_config": "num_heads=30"}, "must be a multiple of num_kv_heads (4)"),
  "mixture": (
    {"train_dataset.seqio_dataset.mixture_or_task_name": "wikipedia_mixtur"},
    "did you mean 'wikipedia_mixture'",
  ),
  "data_dir": (
    {
      "train_dataset.seqio_dataset.mixture_or_task_name": "wikipedia_mixture",
      "data_dir": "/nowhere",
    },
    "data_dir /nowhere does not exist",
  ),
  "mesh form": ({"mesh_dim": "1,2"}, "--mesh_dim must be dp,fsdp,mp"),
  "mesh size": ({"mesh_dim": "1,3,1"}, "needs 3 devices, there are 1"),
  "batch": (
    {"train_dataset.seqio_dataset.batch_size": "0"},
    "--train_dataset.seqio_dataset.batch_size must be at least 1, got 0",
  ),
  "length": (
    {"train_dataset.seqio_dataset.task_feature_lengths": "(4096,)"},
    "--train_dataset.seqio_dataset.task_feature_lengths: rows of 4096 tokens",
  ),
  "checkpoint kind": ({"load_checkpoint": "weights::x"}, "expects one of params::PATH"),
  "checkpoint path": ({"load_checkpoint": "params::/nowhere"}, "no such folder"),
  "steps": ({"total_steps": "0"}, "--total_steps must be at least 1, got 0"),
  "milestones": (
    {"save_model_freq": "4", "save_milestone_freq": "6"},
    "a multiple of --save_model_freq (4)",
  ),
  "rounding": (
    {"optimizer.bf16_update": "master"},
    "--optimizer.bf16_update has no effect with --param_dtype=f32",
  ),
  "schedule": (
    {
      "optimizer.adamw_optimizer.lr_warmup_steps": "9",
      "optimizer.adamw_optimizer.lr_decay_steps": "8",
    },
    "--optimizer.adamw_optimizer.lr_decay_steps (8) must be larger",
  ),
  "last rate": (
    {"optimizer.adamw_optimizer.end_lr": "1"},
    "end_lr (1.0) must not be above --optimizer.adamw_optimizer.lr (0",
  ),
  "held-out length": (
    {"eval_steps": "1", "eval_dataset.seqio_dataset.task_feature_lengths": "(4096,)"},
    "--eval_dataset.seqio_dataset.task_feature_lengths: rows of 4096 tokens",
  ),
  "no output": ({"logger.output_dir": ""}, "--logger.output_dir must be given"),
  "tokenizer": ({"tokenizer.path": "/nowhere"}, "no tokenizer at '/nowhere'"),
  "no tokenizer": ({"tokenizer.path": None}, "a tokenizer is needed"),
  "vocabulary": (
    {"update_model_config": "vocab_size=100"},
    "larger than the embedding: 258 ids, 100 rows",
  ),
  "no held-out files": (
    JSON | {"eval_steps": "1"},
    "--eval_dataset.json_dataset.path must be given",
  ),
  "no such files": (
    JSON | {"eval_steps": "1", "eval_dataset.json_dataset.path": "/nowhere"},
    "--eval_dataset.json_dataset.path: no file matches '/nowhere'",
  ),
  "nothing to read": (
    {"train_dataset.type": "huggingface", "train_dataset.seqio_dataset.mixture_or_task_name": None},
    "--train_dataset.huggingface_dataset.path must be given for a dataset of type huggingface",
  ),
  "held-out batch": (
    {"eval_steps": "1", "eval_dataset.seqio_dataset.batch_size": "0"},
    "--eval_dataset.seqio_dataset.batch_size must be at least 1, got 0",
  ),
  "data position": ({"load_dataset_state": "/nowhere"}, "no checkpoint at /nowhere"),
  "another optimizer's option": (
    {"optimizer.lion_optimizer.lr": "0.1"},
    "--optimizer.lion_optimizer.lr has no effect with --optimizer.type=adamw",
  ),
  "another dataset's option": (
    {"train_dataset.json_dataset.path": __file__},
    "--train_dataset.json_dataset.path has no effect with --train_dataset.type=seqio",
  ),
  "a mixture beside files": (
    JSON | {"train_dataset.seqio_dataset.mixture_or_task_name": "python_mixture"},
    "--train_dataset.seqio_dataset.mixture_or_task_name has no effect with --train_dataset.type=j",
  ),
  "a split beside files": (
    JSON | {"train_dataset.seqio_dataset.split": "train"},
    "--train_dataset.seqio_dataset.split has no effect with --train_dataset.type=json",
  ),
  "profile beyond the end": (
    {"profile_steps": "3:5", "total_steps": "4"},
    "1..4 (--total_steps), got '3:5'",
  ),
  "strict without rows": (
    {"strict": "true"},
    "--strict has no effect on mixtures",
  ),
  "features beside files": (
    JSON | {"train_dataset.seqio_dataset.task_feature_field": "('targets',)"},
    "--train_dataset.seqio_dataset.task_feature_field has no effect with",
  ),
  "held-out data without evaluation": (
    {"eval_dataset.seqio_dataset.batch_size": "4"},
    "--eval_dataset.seqio_dataset.batch_size has no effect without --eval_steps",
  ),
  "gin without quotes": (
    {"gin_bindings": "data.data_utils.get_default_vocabulary.tokenizer_type=llama"},
    "a value must be a Python literal",
  ),
  "gin": ({"gin_bindings": "data.data_utils.nothing.x=1"}, "gin settings"),
}  # fmt: skip

# Runs many command lines in one new process, to check that they do not import TensorFlow.
DRIVER = """
import io, json, sys
from contextlib import redirect_stderr
from ll3m import train

def stop(*_):
  raise RuntimeError("accepted")

train.make_program = stop  # the first call after the checks
for name, arguments in json.load(sys.stdin).items():
  with redirect_stderr(io.StringIO()) as said:
    code = train.main(arguments)
  print(json.dumps([name, code, said.getvalue()]))
print("tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def outcomes(byte_tokenizer, tmp_path_factory) -> dict[str, tuple[int, str]]:
  folder = tmp_path_factory.mktemp("flags")

  def command(changes):
    values = GOOD | {"tokenizer.path": str(byte_tokenizer), "logger.output_dir": str(folder / "o")}
    return [f"--{name}={value}" for name, value in (values | changes).items()
            if value is not None]  # fmt: skip

  lines = {"good": command({})} | {name: command(changes) for name, (changes, _) in CASES.items()}
  done = subprocess.run(
    [sys.executable, "-c", DRIVER],
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
  )
  assert done.returncode == 0, done.stderr
  *rows, tensorflow = done.stdout.splitlines()
  assert tensorflow == "False"  # a mistake is reported before anything slow is imported
  assert not (folder / "o").exists()
  return {name: (code, said) for name, code, said in map(json.loads, rows)}


def test_the_unchanged_flags_are_accepted(outcomes):
  code, said = outcomes["good"]
  assert code == 1 and said.endswith("RuntimeError: accepted (--debug shows the traceback)\n")


@pytest.mark.parametrize("name", CASES)
def test_wrong_flags_exit_with_one_sentence(outcomes, name):
  code, said = outcomes[name]
  assert said.count("\n") == 1 and said.startswith("error: ") and CASES[name][1] in said
  # The exit code is 2 for errors of a flag, and 1 for errors of what a flag names.
  assert code == (2 if said.startswith(("error: --", "error: flag --")) else 1)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--optimzer.type=adamw", "did you mean --optimizer.type?"),
    ("--optimizer.type=adam", "value should be one of <adamw|"),
    ("--total_steps=many", "total_steps"),
    ("--train_dataset.seqio_dataset.task_feature_lengths=2048)", "expected a Python tuple"),
  ],
)
def test_unparsable_flags_exit_with_one_sentence(capsys, argument, message):
  assert train.main([argument]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line


def test_spaces_around_the_equals_sign_are_refused(capsys):
  assert train.main(["--checkpointer.save_optimizer_state", "=", "False"]) == 2
  assert "unexpected arguments: = False" in capsys.readouterr().err
