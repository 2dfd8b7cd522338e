"""All commands on gs://: prepare, convert, train, evaluate, generate, export.

The objects in the store are compared, byte for byte, with the files that the same commands write to
a disk.
"""

import collections
import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from ll3m.core.checkpoint import open_checkpoint
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.decoding.engine import Engine
from ll3m.hf.conversion import convert_model
from ll3m.hf.exporting import export_checkpoint
from ll3m.hf.model_files import open_model
from ll3m.hf.model_source import open_source
from ll3m.training.logger import read_metrics
from tests.faults.causing import files
from tests.tiny_runs import arrays
from tests.traces import traced_steps
from tests.waiting import wait_for

RUN = "gs://bucket/runs/one"
OFTEN = 200  # steps between saves


def data(name: str, data_dir: str | Path) -> list[str]:
  flags = (
    "mixture_or_task_name=wikipedia_mixture",
    "batch_size=2",
    "task_feature_lengths=(32,)",
    "num_shards=2",
  )
  return [*(f"--{name}.seqio_dataset.{flag}" for flag in flags), f"--data_dir={data_dir}"]


def training(model: str | Path, data_dir: str | Path, output: str | Path) -> list[str]:
  return [
    f"--load_checkpoint=params::{model}",
    *data("train_dataset", data_dir),
    "--optimizer.adamw_optimizer.lr=0.01",
    "--optimizer.adamw_optimizer.lr_decay_steps=1000",  # the default, --total_steps, varies
    f"--save_model_freq={OFTEN}",
    "--log_freq=50",
    "--eval_steps=2",
    f"--logger.output_dir={output}",
  ]


ON_GCS = training("gs://bucket/models/tiny", "gs://bucket/data", RUN)


@pytest.fixture(scope="module")
def prepared(gcs, start, end, text, tmp_path_factory) -> Path:
  """Folder of data on a disk; the store has the same data."""
  local = tmp_path_factory.mktemp("data")
  jobs = [
    start(
      "tools/prepare_text.py", f"--input={text}", f"--output_dir={place}/wiki", "--num_shards=2",
      "--validation_fraction=0.2", "--workers=1",
    )
    for place in ("gs://bucket/data", local)
  ]  # fmt: skip
  for code, printed, said in map(end, jobs):
    assert code == 0, said
    assert "train: 48 documents, validation: 12 documents" in printed
  shutil.copytree(local / "wiki", local / "cc_en")  # the mixture's other source
  for name, content in gcs.store.files("data/wiki").items():
    gcs.store.put("bucket", f"data/cc_en/{name}", content, {})
  return local


@pytest.fixture(scope="module")
def converted(gcs, start, end, published, tmp_path_factory) -> Path:
  """Folder of a model on a disk; the store has the same model."""
  local = tmp_path_factory.mktemp("models") / "tiny"
  convert_model(open_model(published), local)
  flags = (f"--checkpoint_dir={published}", "--output_dir=gs://bucket/models/tiny")
  code, printed, said = end(start("convert", *flags))
  assert code == 0, said
  assert "to gs://bucket/models/tiny\n" in printed
  assert "cuda" not in said and "oneDNN" not in said  # TensorFlow's start-up messages
  return local


def test_prepared_data_equals_that_on_a_disk(gcs, prepared):
  assert gcs.store.files("data") == files(prepared)


def test_converted_model_equals_that_on_a_disk(gcs, converted):
  assert gcs.store.files("models/tiny") == files(converted)


def finished_steps(gcs) -> list[int]:
  found = (name.split("/") for name in gcs.store.files("runs/one/checkpoints"))
  return sorted(int(step) for step, *rest in found if rest == ["commit_success.txt"])


class Runs(NamedTuple):
  """The output of a run in the store, and of the same run on a disk."""

  total: int
  resumed_at: int
  said: str  # stderr of the process that finished the run
  stored: Path  # a copy
  local: Path
  asked: list[str]  # that process's requests to the store before its first save


@pytest.fixture(scope="module")
def runs(gcs, start, end, prepared, converted, tmp_path_factory) -> Runs:
  """A run that two simultaneous jobs begin (one is refused, one killed) and a third one finishes.

  The latest saved step is damaged before the third job starts, which must set it aside.
  """
  gcs.store.put("bucket", "runs/one/checkpoints/best/note", b"mine", {})
  jobs = [start("train", *ON_GCS, "--total_steps=1000000") for _ in range(2)]
  wait_for(
    lambda: any(job.poll() is not None for job in jobs) and len(finished_steps(gcs)) > 1, 240
  )
  (refused,) = [job for job in jobs if job.poll() is not None]
  (holder,) = [job for job in jobs if job is not refused]
  _, _, said = end(refused)
  who = f"error: another job writes to {RUN} (process {holder.pid} on "
  assert said.splitlines()[-1].startswith(who)
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  *_, before, last = finished_steps(gcs)
  total = last + 2 * OFTEN
  gcs.store.put("bucket", f"runs/one/checkpoints/{last}/params/_METADATA", b"damaged", {})
  damaged = gcs.store.files(f"runs/one/checkpoints/{last}")
  gcs.store.put(
    "bucket", f"runs/one/checkpoints/{total + OFTEN}/params/left", b"by a killed save", {}
  )
  local = tmp_path_factory.mktemp("runs") / "local"
  more = (f"--total_steps={total}", f"--profile_steps={total - 1}:{total}")
  begun = len(gcs.requests)
  ours = start("train", *ON_GCS, *more)
  theirs = start("train", *training(converted, prepared, local), *more)
  (code, _, told), (their_code, _, their_told) = end(ours), end(theirs)
  assert code == 0, told
  assert their_code == 0, their_told
  stored = gcs.store.download("runs/one", tmp_path_factory.mktemp("runs") / "stored")
  assert files(stored / "damaged" / str(last)) == damaged
  uploads = "POST /upload/storage/v1/b/bucket/o?uploadType=resumable&name=runs%2Fone%2Fcheckpoints"
  asked = itertools.takewhile(lambda request: not request.startswith(uploads), gcs.requests[begun:])
  return Runs(total, before, told, stored, local, list(asked))


def test_killed_run_has_the_same_result_as_one_on_a_disk(runs):
  assert f"resuming from step {runs.resumed_at} in {RUN}\n" in runs.said
  last = Path("checkpoints") / str(runs.total)
  assert arrays(runs.stored / last) == arrays(runs.local / last)


def test_two_steps_and_a_foreign_folder_are_kept(runs):
  steps = {str(runs.total), str(runs.total - OFTEN), "best"}
  assert {folder.name for folder in (runs.stored / "checkpoints").iterdir()} == steps
  assert (runs.stored / "checkpoints" / "best" / "note").read_text() == "mine"
  assert not (runs.stored / ".claim").exists()


def test_metrics_plot_and_trace_are_written(runs):
  def losses(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]

  assert losses(runs.stored) == losses(runs.local)
  assert (runs.stored / "loss.png").read_bytes().startswith(b"\x89PNG")
  events = b"".join(file.read_bytes() for file in (runs.stored / "tensorboard").iterdir())
  assert b"gradient_norm" in events and "from here on" not in runs.said
  assert traced_steps(runs.stored) == [runs.total - 1, runs.total]


def test_opening_the_run_lists_each_folder_once(runs):
  queries = [parse_qs(urlsplit(r.removeprefix("GET ")).query) for r in runs.asked if "/o?" in r]
  listed = collections.Counter(
    query["prefix"][0]
    for query in queries
    # A request for one name checks whether a folder exists; a page continues a listing.
    if "prefix" in query and not {"maxResults", "pageToken"} & query.keys()
  )
  ours = {prefix: count for prefix, count in listed.items() if prefix.startswith("runs/one/")}
  # We list the steps once. Orbax's manager also lists them, and again after one is set aside.
  assert ours.pop("runs/one/checkpoints/") == 3
  assert f"runs/one/checkpoints/{runs.resumed_at}/dataset/" in ours
  assert set(ours.values()) == {1}, ours


def test_step_is_marked_as_complete_after_all_other_files(gcs, runs):
  """Only Orbax's own two files follow the digests of the last step."""
  start = "/upload/storage/v1/b/bucket/o?uploadType=resumable&name=runs%2Fone%2Fcheckpoints%2F"
  start = f"POST {start}{runs.total}%2F"
  written = [r.removeprefix(start) for r in gcs.requests if r.startswith(start)]
  assert written[-3:] == ["digests.json", "_CHECKPOINT_METADATA", "commit_success.txt"]


def test_run_can_be_evaluated_exported_and_used_for_generation(runs, start, end, tmp_path):
  given = f"--checkpoint={RUN}"
  exported = tmp_path / "exported"
  jobs = [
    start("evaluate", given, *data("eval_dataset", "gs://bucket/data"), "--eval_steps=2", "--json"),
    start("generate", given, "--prompt=The with", "--max_new_tokens=8"),
    start("export", given, f"--output_dir={exported}"),
  ]
  (_, evaluated, _), (_, generated, _), _ = ended = [end(job) for job in jobs]
  assert [code for code, _, _ in ended] == [0, 0, 0], ended
  last = read_metrics(runs.local / "metrics.jsonl")[-1]
  assert json.loads(evaluated)["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
  source = open_source(str(runs.local))
  tokenizer = load_tokenizer(TokenizerConfig(), checkpoint_dir=source.tokenizer_dir)
  engine = Engine(source.config, source.load_params(), num_tokens=tokenizer.vocab_size)
  prompt = [*tokenizer.prefix, *tokenizer.encode("The with")]
  (row,) = engine.generate([prompt], max_new_tokens=8, stop_tokens={tokenizer.eos_id})
  assert generated == tokenizer.decode(row) + "\n"
  export_checkpoint(open_checkpoint(runs.local), tmp_path / "expected")
  assert files(exported) == files(tmp_path / "expected")


def test_missing_or_forbidden_paths_are_reported_in_a_sentence(start, end, published, converted):
  refusal = "no access to the Google Cloud Storage bucket forbidden (HTTP 403)"
  jobs = {
    "there is no bucket gs://nobody": start(
      "convert", f"--checkpoint_dir={published}", "--output_dir=gs://nobody/model"
    ),
    "no checkpoint at gs://bucket/none: there is no such folder": start(
      "generate", "--checkpoint=gs://bucket/none", "--prompt=x"
    ),
    f"Google Cloud Storage failed: {refusal}": start(
      "train", *ON_GCS, "--total_steps=2", "--logger.output_dir=gs://forbidden/run"
    ),
  }
  for sentence, job in jobs.items():
    code, _, said = end(job)
    assert code == 1, said
    assert said.splitlines()[-1] == f"error: {sentence}"
    assert "Traceback" not in said
