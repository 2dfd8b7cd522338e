import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from ll3m.core import flags


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = flags.option(8, "How many.")
  lengths: tuple[int, ...] = flags.option((2048,), "How long, in tokens.")
  fields: tuple[str, ...] = flags.option(("targets",), "Which.")
  name: str | None = flags.option(None, "What it is called.")

  def __post_init__(self):
    if self.size == 6:
      raise ValueError("size must be odd or 8, got 6")


@dataclasses.dataclass(frozen=True)
class Outer:
  kind: str = flags.option("one", "Which kind.", choices=("one", "two"))
  rate: float = flags.option(0.5, "A rate.")
  limit: float | None = flags.option(None, "A limit.")
  quick: bool = flags.option(True, "Hurry.")
  bindings: tuple[str, ...] = flags.option((), "May be repeated.", repeated=True)
  inner: Inner = flags.group(Inner)

  def __post_init__(self):
    if self.rate > 1:
      raise ValueError(f"rate must be at most 1, got {self.rate}")


flags.define("sample", Outer)
flags.define("other", Outer)


def parse(*arguments: str) -> Outer:
  with flagsaver.flagsaver():
    absl_flags.FLAGS(["command", *arguments])
    return flags.read("sample", Outer)


def test_defaults():
  assert parse() == Outer()


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--sample.kind=two"], Outer(kind="two")),
    (["--sample.rate=1e-3"], Outer(rate=0.001)),
    (["--sample.limit=3"], Outer(limit=3.0)),
    (["--sample.quick=False"], Outer(quick=False)),
    (["--nosample.quick"], Outer(quick=False)),
    (["--sample.bindings=a", "--sample.bindings=b=1, c"], Outer(bindings=("a", "b=1, c"))),
    (["--sample.inner.size", "9"], Outer(inner=Inner(size=9))),
    (["--sample.inner.name=x"], Outer(inner=Inner(name="x"))),
    (["--sample.inner.lengths=(2048, )"], Outer(inner=Inner(lengths=(2048,)))),
    (["--sample.inner.lengths=[1, 2]"], Outer(inner=Inner(lengths=(1, 2)))),
    (["--sample.inner.lengths=7"], Outer(inner=Inner(lengths=(7,)))),
    (["--sample.inner.fields=('targets', )"], Outer(inner=Inner(fields=("targets",)))),
  ],
)
def test_values_are_typed(arguments, expected):
  assert parse(*arguments) == expected


@pytest.mark.parametrize(
  "argument",
  [
    "--sample.inner.size=2.5",
    "--sample.rate=fast",
    "--sample.quick=maybe",
    "--sample.kind=three",
    "--sample.inner.lengths=(1, 'a')",
    "--sample.inner.lengths=(1.5,)",
    "--sample.inner.lengths=(True,)",
    "--sample.inner.lengths=(1, 2",
    "--sample.inner.lengths=__import__('os').getpid()",
  ],
)
def test_wrong_values_are_refused(argument):
  with pytest.raises(absl_flags.IllegalFlagValueError, match=argument[2:].partition("=")[0]):
    parse(argument)


def test_the_dataclass_validates():
  with pytest.raises(ValueError, match="^--sample.rate must be at most 1, got 2.0"):
    parse("--sample.rate=2")
  with pytest.raises(ValueError, match="^--sample.inner.size must be odd"):
    parse("--sample.inner.size=6")


def test_misspelt_flag_gets_a_suggestion():
  with pytest.raises(absl_flags.UnrecognizedFlagError, match="sample.inner.size"):
    parse("--sample.inner.sise=3")


def test_every_flag_has_help_and_default():
  help_text = absl_flags.FLAGS.main_module_help()
  assert "--sample.inner.size: How many." in help_text
  assert "(default: '8')" in help_text
  assert "<one|two>" in help_text


def test_given_tells_a_default_from_a_value():
  with flagsaver.flagsaver():
    absl_flags.FLAGS(["command", "--sample.inner.size=8"])
    assert flags.given("sample.inner.size")
    assert not flags.given("sample.rate")


@pytest.mark.parametrize("value", [None, "", ()])
def test_require(value):
  with pytest.raises(ValueError, match="--output_dir must be given"):
    flags.require(value, "output_dir")


def test_require_accepts_zero():
  flags.require(0, "seed")


def test_a_flag_that_was_not_given_falls_back_to_another_prefix():
  with flagsaver.flagsaver():
    absl_flags.FLAGS(
      ["command", "--sample.rate=0.1", "--sample.inner.size=9", "--other.rate=0.5"]
    )  # 0.5 is the default, but it was given
    assert flags.read("other", Outer, fallback="sample") == Outer(rate=0.5, inner=Inner(size=9))
    assert flags.read("other", Outer) == Outer()


@pytest.mark.parametrize("name", ["other.inner", "other.inner.size"])
def test_a_flag_without_effect_is_refused_if_it_was_given(name):
  with flagsaver.flagsaver():
    absl_flags.FLAGS(["command", "--sample.inner.size=9"])
    flags.refuse(name, "without --other.kind=two")
    absl_flags.FLAGS(["command", "--other.inner.size=8"])  # its default, but given
    with pytest.raises(ValueError, match="^--other.inner.size has no effect without --other.kind"):
      flags.refuse(name, "without --other.kind=two")


def test_to_dict_is_flat_and_dotted():
  flat = flags.to_dict(Outer(rate=0.25, inner=Inner(name="x")))
  assert flat == {
    "kind": "one",
    "rate": 0.25,
    "limit": None,
    "quick": True,
    "bindings": (),
    "inner.size": 8,
    "inner.lengths": (2048,),
    "inner.fields": ("targets",),
    "inner.name": "x",
  }


def test_unsupported_types_are_refused():
  @dataclasses.dataclass(frozen=True)
  class Odd:
    table: dict = flags.option(None, "No flag can say this.")

  with pytest.raises(TypeError, match="odd.table"):
    flags.define("odd", Odd)


COMMAND = textwrap.dedent("""
  import dataclasses
  import json
  import logging

  from absl import logging as absl_logging

  from ll3m.core import flags

  @dataclasses.dataclass(frozen=True)
  class Config:
    steps: int = flags.option(3, "How many steps.")
    online: bool = flags.option(False, "Report.")
    fail: str | None = flags.option(None, "How to fail.")

  flags.define("run", Config)

  def main():
    config = flags.read("run", Config)
    if config.fail == "value":
      raise ValueError("expected 3 layers,\\n  got 4")
    if config.fail == "interrupt":
      raise KeyboardInterrupt
    if config.fail == "bug":
      {}["missing"]
    if config.fail == "file":
      raise FileNotFoundError("no such folder: x")
    if config.fail == "softly":
      absl_logging.warning("step %d is\\n  damaged", 3)
      logging.getLogger("library.part").error("no such id", exc_info=ValueError("inner"))
      chatty = logging.getLogger("chatty")
      chatty.addHandler(logging.StreamHandler())
      logging.getLogger("chatty.part").warning("printed by itself")
      absl_logging.info("progress")
    print(json.dumps(flags.to_dict(config)))

  if __name__ == "__main__":
    flags.run(main)
""")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  path = tmp_path_factory.mktemp("command") / "command.py"
  path.write_text(COMMAND)

  def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=60
    )

  return run


def test_run_calls_main(command):
  done = command("--run.steps=5", "--run.online=True")
  assert (done.returncode, done.stderr) == (0, "")
  assert json.loads(done.stdout) == {"steps": 5, "online": True, "fail": None}


def test_what_is_logged_looks_like_an_error_and_is_printed_once(command):
  done = command("--run.fail=softly")
  assert done.stderr.splitlines() == [
    "warning: step 3 is damaged",
    "warning: no such id",
    "printed by itself",
  ]


@pytest.mark.parametrize(
  ("arguments", "status", "sentence"),
  [
    (["--run.fail=value"], 1, "error: expected 3 layers, got 4"),
    (["--run.fail=file"], 1, "error: no such folder: x"),
    (["--run.fail=interrupt"], 130, "error: interrupted"),
    (["--run.fail=bug"], 1, "error: KeyError: 'missing' (--debug shows the traceback)"),
    (
      ["--run.online", "=", "False"],  # absl alone reads this as True and two stray words
      2,
      "error: unexpected arguments: = False (flags are written --name=value, without spaces)",
    ),
    (
      ["--run.steps=1", "two"],
      2,
      "error: unexpected arguments: two (flags are written --name=value, without spaces)",
    ),
    (
      ["--run.step=1"],
      2,
      "error: Unknown command line flag 'run.step'. Did you mean: run.steps ?",
    ),
    (
      ["--run.steps=1.5"],
      2,
      "error: flag --run.steps=1.5: invalid literal for int() with base 10: '1.5'",
    ),
  ],
)
def test_run_ends_an_error_as_one_sentence(command, arguments, status, sentence):
  done = command(*arguments)
  assert done.returncode == status
  assert done.stderr.splitlines() == [sentence]
  assert done.stdout == ""


def test_debug_shows_the_traceback_first(command):
  done = command("--run.fail=bug", "--debug")
  assert done.returncode == 1
  assert done.stderr.startswith("Traceback")
  assert done.stderr.splitlines()[-1].startswith("error: KeyError: 'missing'")


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_lists_every_flag(command, flag):
  done = command(flag)
  assert done.returncode == 0
  assert "--run.steps: How many steps." in done.stdout
  assert "Traceback" not in done.stderr
