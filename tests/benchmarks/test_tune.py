"""The tuner's command line; the search itself is tested in tuning/."""

import json

import pytest

from benchmarks import tune
from ll3m_kernels import block_tables


@pytest.mark.parametrize(
  "shape, message",
  [
    ("H=128,Q=3", "'Q=3' is none of H=, T=, dtype=, mask="),
    ("T=128", "H= is missing"),
    ("H=0", "H must be a positive number, got '0'"),
    ("H=300", "H must be at most 256, got 300"),
    ("H=64,T=x", "T must be a positive number, got 'x'"),
    ("H=64,mask=diagonal", "mask must be one of causal, full, window, got 'diagonal'"),
    ("H=64,dtype=int8", "dtype must be one of bfloat16, float32, got 'int8'"),
    ("H", "'H' is none of"),
  ],
)
def test_bad_shapes_are_refused_before_any_work(shape, message, capsys, tmp_path):
  output = tmp_path / "table.json"
  arguments = ["--op=flash_attention", "--generation=v5e", f"--shape={shape}"]
  assert tune.main([*arguments, f"--output={output}"]) == 2
  assert message in capsys.readouterr().err
  assert not output.exists()


def test_a_table_that_cannot_be_read_is_not_overwritten(tmp_path, capsys):
  output = tmp_path / "table.json"
  output.write_text("mine")
  arguments = ["--op=norm_forward", "--generation=v5e", "--shape=D=256", f"--output={output}"]
  assert tune.main(arguments) == 2
  assert "is not a table" in capsys.readouterr().err
  assert output.read_text() == "mine"


@pytest.mark.parametrize("argument", ["--generation=v4", "--op=conv", "--workers=0"])
def test_bad_options_are_refused(argument, capsys):
  with pytest.raises(SystemExit) as stop:
    tune.main(["--op=norm_forward", "--generation=v5e", "--output=unused.json", argument])
  assert stop.value.code == 2
  assert argument.split("=")[0] in capsys.readouterr().err


def test_a_norm_is_tuned_by_the_real_compiler(tmp_path, capsys):
  """Other entries of the table are kept; a second run compiles nothing."""
  output, estimates = tmp_path / "table.json", tmp_path / "estimates.jsonl"
  other = block_tables.Key("flash_attention", "v5e", "bfloat16", 128, "full", 4096)
  block_tables.write(output, {other: {"limits": {"block_q": 1}, "cycles": {}}})
  arguments = ["--op=norm_forward", "--generation=v5e", "--shape=D=256,T=2048"]
  arguments += [f"--output={output}", f"--estimates={estimates}"]
  assert tune.main(arguments) == 0
  assert "of the rule's" in capsys.readouterr().out
  entries = block_tables.read(output)
  key = block_tables.Key("norm_forward", "v5e", "bfloat16", 256, "", 2048)
  assert set(entries) == {other, key}
  priced = [json.loads(line) for line in estimates.read_text().splitlines()]
  cycles = [kernels[0][1] for _, kernels in priced]
  assert entries[key]["cycles"]["norm_forward"]["tuned"] == min(cycles)
  assert len(cycles) >= 8
  assert tune.main(arguments) == 0
  assert len(estimates.read_text().splitlines()) == len(priced)
