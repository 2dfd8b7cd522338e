"""`--data` in the commands: what a run says before it starts, epochs, and `ll3m.inspect`."""

import json

import numpy as np
import pytest

from ll3m import data
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.training.logger import read_metrics

ROWS = [
  {
    "instruction": f"Name number {i}.",
    "input": "in words" if i % 3 else "",
    "output": f"It is {i}.",
  }
  for i in range(40)
]
BATCH = ("--batch_size=2", "--max_length=256")


@pytest.fixture
def alpaca(tmp_path):
  (tmp_path / "alpaca.json").write_text(json.dumps(ROWS, indent=1))
  return str(tmp_path / "alpaca.json")


@pytest.fixture
def model(byte_tokenizer):
  """Flags of a random model of two layers."""
  sizes = "vocab_size=258,d_model=16,d_ff=24,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8"
  return (
    "--load_model_config=smollm2_135m",
    f"--update_model_config={sizes}",
    f"--tokenizer.path={byte_tokenizer}",
  )


@pytest.fixture
def encoder(byte_tokenizer):
  return load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))


def test_inspect_reports_what_tokenising_row_by_row_finds(
  alpaca, byte_tokenizer, encoder, run_command, tmp_path
):
  tokenizer = f"--tokenizer.path={byte_tokenizer}"
  done = run_command("inspect", f"--data={alpaca}", tokenizer, *BATCH, "--json",
                     f"--plot={tmp_path}/lengths.png")  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  (source,) = found["sources"]
  assert source["data_format"] == "instruction" and source["rows"] == found["rows"] == len(ROWS)
  assert source["columns"] == ["instruction", "input", "output"]
  lengths, trained = [], 0
  for row in ROWS:
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    paired = ", paired with an input that provides further context" if given else ""
    prompt = (
      f"Below is an instruction that describes a task{paired}. Write a response that appropriately "
      f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    )
    whole = [*encoder.prefix, *encoder.encode(prompt + row["output"]), encoder.eos_id]
    lengths.append(len(whole))
    trained += len(encoder.encode(row["output"])) + 1  # bytes: no token spans prompt and answer
  kept = np.minimum(lengths, 256)
  assert found["tokens_per_epoch"] == kept.sum()
  assert found["longer"] == found["cut"] + found["dropped"] == np.sum(np.array(lengths) > 256)
  assert found["percentiles"]["p50"] == sorted(lengths)[len(lengths) // 2 - 1]
  assert found["percentiles"]["max"] == max(lengths)
  assert found["duplicates"] == 0 and found["unusable"]["reasons"] == {}
  assert found["trained_per_epoch"] == trained - sum(
    max(0, n - 256) for n in lengths
  )  # what is cut off is the end of an answer
  assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
  batches = list(data.load(alpaca, encoder, batch_size=2, length=256, epochs=1))
  assert found["batches_per_epoch"] == len(batches)
  done = run_command("inspect", f"--data={alpaca}", tokenizer, *BATCH, "--show=1")
  assert done.returncode == 0, done.stderr
  assert "recognised as instruction/input/output, with Alpaca's prompts" in done.stdout
  assert "tokens per document" in done.stdout and "-- document 1: " in done.stdout
  assert "[I]|[t]|[ ]|[i]|[s]|[ ]|[0]|[.]" in done.stdout


def test_a_run_of_steps_estimates_its_epochs(alpaca, model, encoder, run_command, tmp_path):
  """All of so few rows are read, so that the estimate is the size of the epoch, rounded."""
  done = run_command("train", *model, f"--data={alpaca}", *BATCH, "--total_steps=40", "--dry_run",
                     "--optimizer.accumulate_gradient_steps=2",
                     f"--logger.output_dir={tmp_path}/run")  # fmt: skip
  assert done.returncode == 0, done.stderr
  batches = list(data.load(alpaca, encoder, batch_size=2, length=256, epochs=1))
  tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
  share = sum(batch.mask.sum() for batch in batches) / tokens
  assert f"tokens      about {float(f'{tokens:.2g}'):,.0f} per epoch, {share:.0%} of" in done.stdout
  assert f"about {float(f'{tokens / 40:.2g}'):,.0f} per document\n" in done.stdout
  each = len(batches) / 2
  epochs = f"{40 / each:.2g}"
  assert f"steps       40, about {epochs} epochs of {each:.2g} steps\n" in done.stdout


def test_inspect_counts_duplicates_and_names_unusable_rows(
  alpaca, byte_tokenizer, run_command, tmp_path
):
  rows = [*ROWS[:5], ROWS[1], ROWS[1], {"instruction": "x", "output": None}]
  (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  done = run_command("inspect", f"--data={tmp_path}/b.jsonl", f"--tokenizer.path={byte_tokenizer}",
                     "--json")  # fmt: skip
  found = json.loads(done.stdout)
  assert found["duplicates"] == 2
  assert found["unusable"] == {
    "reasons": {"field 'output' is null": 1},
    "first": [f"{tmp_path}/b.jsonl:8: field 'output' is null"],
  }


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--data=mixture:python_mixture"], "--data: files and datasets are inspected"),
    ([], "--data must be given"),
    (["--data=alpca.json"], "--data: no such file or folder: alpca.json"),
    (["--dataset.data="], "--dataset.data must be given"),
    (["--data=x", "--show=-1"], "--show must be at least 0"),
  ],
)
def test_wrong_flags_of_inspect(flags, message, byte_tokenizer, run_command):
  done = run_command("inspect", f"--tokenizer.path={byte_tokenizer}", *flags)
  assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr


def test_a_run_of_epochs_says_what_it_does_and_evaluates_after_each(
  alpaca, model, run_command, tmp_path
):
  output = tmp_path / "run"
  flags = (*model, f"--data={alpaca}", *BATCH,
           f"--logger.output_dir={output}", "--eval_fraction=0.1", "--log_freq=100",
           "--logger.tensorboard=False", "--save_model_freq=2")  # fmt: skip
  done = run_command("train", *flags, "--epochs=2")
  assert done.returncode == 0, done.stderr
  said = done.stderr
  assert "recognised as instruction/input/output, with Alpaca's prompts" in said
  assert "4 rows for evaluation" in said
  tokenizer = load_tokenizer(TokenizerConfig(path=str(output / "tokenizer")))
  options = {"batch_size": 2, "length": 256, "eval_fraction": 0.1}
  steps = data.load(alpaca, tokenizer, epochs=2, seed=42, **options).num_batches
  assert f"steps       {steps}, 2 epochs of {steps / 2:.1f} steps" in said
  assert f"step 1/{steps}  loss " in said and "s per step" in said
  assert "memory      " in said
  records = read_metrics(output / "metrics.jsonl")
  evaluated = [record["step"] for record in records if "eval_loss" in record]
  assert evaluated == sorted({0, steps // 2, steps // 2 * 2, steps})
  held_out = data.load(alpaca, tokenizer, held_out=True, **options)
  targets = sum(batch.mask.sum() for batch in held_out)
  assert {r["eval_targets"] for r in records if "eval_loss" in r} == {targets}
  # The same command has nothing to do; more epochs continue the run.
  done = run_command("train", *flags, "--epochs=2")
  assert done.returncode == 0 and f"already at step {steps} of {steps}" in done.stdout
  done = run_command("train", *flags, "--epochs=3")
  assert done.returncode == 0, done.stderr
  assert f"resuming from step {steps}" in done.stderr
  # ll3m.evaluate measures the same held-out rows.
  done = run_command("evaluate", f"--checkpoint={output}", f"--data={alpaca}", *BATCH,
                     "--eval_fraction=0.1", "--json")  # fmt: skip
  assert done.returncode == 0, done.stderr
  last = [r for r in read_metrics(output / "metrics.jsonl") if "eval_loss" in r][-1]
  assert json.loads(done.stdout)["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--epochs=2", "--total_steps=3"], "--epochs cannot be combined with --total_steps"),
    (["--data_format=text", "--completion={a}"], "--data_format cannot be combined with"),
    (["--train_dataset.type=json"], "--train_dataset.type has no effect with --data"),
    (["--eval_fraction=0.9"], "--eval_fraction must lie between 0 and 0.5"),
    (["--eval_fraction=0.1", "--eval_data=x"], "--eval_data has no effect with --eval_fraction"),
    (["--eval_steps=2"], "--eval_data (or --eval_fraction) must be given"),
    (["--overflow=cut"], "flag --train_dataset.overflow=cut: value should be one of"),
    (
      ["--optimizer.adamw_optimizer.lr_warmup_fraction=1"],
      "--optimizer.adamw_optimizer.lr_warmup_fraction must be at least 0 and below 1",
    ),
  ],
)
def test_wrong_flags_of_train(flags, message, alpaca, model, run_command, tmp_path):
  done = run_command("train", *model, f"--data={alpaca}",
                     f"--logger.output_dir={tmp_path / 'run'}", *flags)  # fmt: skip
  assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
  assert not (tmp_path / "run").exists()
