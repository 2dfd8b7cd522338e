import dataclasses
import json
import logging
import subprocess
import sys
import textwrap

import absl.flags
import pytest
from absl import logging as absl_logging

from ll3m.core import flags, options
from ll3m.core.flags import Flags, UsageError
from ll3m.core.options import Fallback


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = options.option(8, "How many.")
  lengths: tuple[int, ...] = options.option((2048,), "How long, in tokens.")
  fields: tuple[str, ...] = options.option(("targets",), "Which.")
  name: str | None = options.option(None, "What it is called.")

  def __post_init__(self):
    if self.size == 6:
      raise ValueError(f"`size` must be odd or 8, got 6 (`name` is {self.name})")


@dataclasses.dataclass(frozen=True)
class Outer:
  kind: str = options.option("one", "Which kind.", choices=("one", "two"))
  rate: float = options.option(0.5, "A rate.")
  limit: float | None = options.option(None, "A limit.")
  quick: bool = options.option(True, "Hurry.")
  bindings: tuple[str, ...] = options.option((), "May be repeated.", repeated=True)
  inner: Inner = options.group(Inner)

  def __post_init__(self):
    if self.rate > 1:
      raise ValueError(f"`rate` must be at most 1, got {self.rate}")

  def without_effect(self):
    return (
      {"limit": "with `kind`=two", "inner.name": "with `kind`=two"} if self.kind == "two" else {}
    )


GROUPS = {"sample": Outer, "other": Outer}
FALLBACKS = {"other": Fallback("sample", own=("limit", "inner.name"))}


def parse(*arguments: str) -> Flags:
  return Flags(GROUPS, arguments, fallbacks=FALLBACKS)


def test_defaults():
  assert parse()["sample"] == Outer()


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
  assert parse(*arguments)["sample"] == expected


@pytest.mark.parametrize(
  "argument",
  [
    "--sample.inner.size=2.5",
    "--sample.inner.size=99999999999",
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
  with pytest.raises(UsageError, match=argument[2:].partition("=")[0]):
    parse(argument)


def test_errors_of_a_dataclass_name_the_whole_option():
  with pytest.raises(UsageError, match="^`sample.rate` must be at most 1, got 2.0"):
    _ = parse("--sample.rate=2")["sample"]
  with pytest.raises(UsageError, match="^`sample.inner.size` must .* .`sample.inner.name` is None"):
    _ = parse("--sample.inner.size=6")["sample"]


def test_misspelt_flag_gets_a_suggestion():
  with pytest.raises(
    UsageError, match=r"--sample.inner.sise \(did you mean --sample.inner.size\?\)"
  ):
    parse("--sample.inner.sise=3")


def test_short_names_are_suggested():
  for name, expected in (
    ("rat", "rate"),
    ("sample.rat", "sample.rate"),
    ("other.lim", "other.limit"),
  ):
    with pytest.raises(UsageError, match=rf"^unknown flag --{name} \(did you mean --{expected}\?"):
      Flags(GROUPS, [f"--{name}=1"], short={"rate": "sample.rate"})


@pytest.mark.parametrize(
  "twice", [["--rate=1", "--sample.rate=0"], ["-sample.rate=1", "--rate", "1"]]
)
def test_both_names_of_a_flag_are_refused(twice):
  with pytest.raises(UsageError, match="^--rate and --sample.rate are the same flag"):
    Flags(GROUPS, twice, short={"rate": "sample.rate"})
  assert Flags(GROUPS, twice[:1], short={"rate": "sample.rate"})["sample"].rate == 1


def test_help_lists_every_flag_with_its_default():
  text = parse().help()
  assert "--sample.inner.size=N\n      How many. (default: 8)\n" in text
  assert "--config=TEXT" in text and "=one|two\n" in text
  assert max(map(len, text.splitlines())) <= 80


def test_flag_set_to_its_default_counts_as_given():
  found = parse("--sample.inner.size=8")
  assert found.given("sample.inner.size") and not found.given("sample.rate")


def test_parsing_defines_no_global_flags():
  before = set(absl.flags.FLAGS)
  parse("--sample.rate=0.1")
  assert set(absl.flags.FLAGS) == before
  assert parse()["sample"].rate == 0.5


@pytest.mark.parametrize("value", [None, "", ()])
def test_require(value):
  @dataclasses.dataclass(frozen=True)
  class Config:
    output_dir: object = value

  with pytest.raises(ValueError, match="^`output_dir` must be given$"):
    options.require(Config(), "output_dir")


def test_require_accepts_zero():
  options.require(Inner(size=0), "size")


def test_flag_that_was_not_given_falls_back_to_another_group():
  found = parse("--sample.rate=0.1", "--sample.inner.size=9", "--sample.limit=3",
                "--sample.inner.name=x", "--other.rate=0.5")  # fmt: skip
  # 0.5 is the default, but it was given; `limit` and `inner.name` keep their own defaults.
  assert found["other"] == Outer(rate=0.5, inner=Inner(size=9))


@pytest.mark.parametrize("name", ["other.inner", "other.inner.size"])
def test_flag_without_effect_is_refused_if_it_was_given(name):
  parse("--sample.inner.size=9").refuse({name: "without `other.kind`=two"})
  with pytest.raises(
    UsageError, match="^`other.inner.size` has no effect without `other.kind`=two"
  ):
    # Its default, but given.
    parse("--other.inner.size=8").refuse({name: "without `other.kind`=two"})


def test_options_without_effect_are_refused_when_the_group_is_read():
  assert parse("--sample.kind=two")["sample"].kind == "two"
  with pytest.raises(UsageError, match="^`sample.limit` has no effect with `sample.kind`=two$"):
    _ = parse("--sample.kind=two", "--sample.limit=1")["sample"]


def test_within_adds_the_prefix_to_option_names_in_errors():
  found = parse()
  with (
    pytest.raises(FileNotFoundError, match="^`sample.inner.size` and `else`$"),
    found.within("sample.inner"),
  ):
    raise FileNotFoundError("`size` and `else`")


def test_to_dict_is_flat_and_dotted():
  flat = options.to_dict(Outer(rate=0.25, inner=Inner(name="x")))
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
    table: dict = options.option(None, "No flag can have this type.")

  with pytest.raises(TypeError, match="odd.table"):
    Flags({"odd": Odd}, [])


# Files of --config.


@pytest.fixture
def write(tmp_path):
  def write(text: str, name: str = "run.yaml") -> str:
    (tmp_path / name).write_text(textwrap.dedent(text))
    return str(tmp_path / name)

  return write


NESTED = """
  sample:
    kind: one
    rate: 1e-1
    quick: no   # a boolean in YAML, but text for --sample.quick here
    bindings: [a, "b=1, c"]
    inner:
      lengths: [1, 2]
      fields: ('x', 'y')
      name: null
  other.inner.name: 1:30
"""


def test_file_has_nested_and_dotted_names_and_values_in_flag_syntax(write):
  found = parse(f"--config={write(NESTED.replace('no ', 'False'))}")
  assert found["sample"] == Outer(
    rate=0.1,
    quick=False,
    bindings=("a", "b=1, c"),
    inner=Inner(lengths=(1, 2), fields=("x", "y")),
  )
  assert found["other"].inner.name == "1:30"


def test_later_file_overrides_earlier_one_and_flags_override_files(write):
  first = write("sample: {rate: 0.1, limit: 1, inner.size: 3, bindings: [a]}", "first.yaml")
  second = write("sample: {limit: 2, inner.size: 4, bindings: [b]}", "second.yaml")
  found = parse("--sample.inner.size=5", f"--config={first}", f"--config={second}")["sample"]
  assert found == Outer(rate=0.1, limit=2, inner=Inner(size=5), bindings=("b",))


def test_settings_given_as_a_file_repeat_the_call(write):
  arguments = ["--sample.rate=0.1", "--sample.bindings=a, b", "--sample.inner.name=x",
               "--sample.inner.lengths=(3, 4)", "--nosample.quick", "--other.inner.size=8",
               "--sample.inner.size=9"]  # fmt: skip
  first = parse(*arguments)
  assert first.settings()["other.rate"] is None  # borrowed from sample.rate
  file = write(json.dumps(first.settings(), indent=2), "flags.json")
  again = parse(f"--config={file}")
  assert {prefix: again[prefix] for prefix in GROUPS} == {p: first[p] for p in GROUPS}
  assert again["other"].inner.size == 8
  assert again.settings() == first.settings()


def test_default_in_a_file_is_not_refused_for_having_no_effect(write):
  file = write(json.dumps(parse("--sample.kind=two").settings()))
  assert parse(f"--config={file}")["sample"].kind == "two"
  with pytest.raises(UsageError, match="^`sample.limit` has no effect"):
    _ = parse(f"--config={write('sample: {kind: two, limit: 2}')}")["sample"]


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("sample:\n  rate: 1\nsamble:\n  rate: 2\n", ("run.yaml:4: unknown key samble.rate",
                                                   "did you mean 'sample.rate'")),
    ("sample: 3\n", ("run.yaml:1: unknown key sample, which is a group",)),
    ("sample:\n  rate:\n    much: 1\n", ("run.yaml:3: unknown key sample.rate.much",)),
    ("config: x.yaml\n", ("run.yaml:1: unknown key config",)),
    ("sample.rate: 1\nsample:\n  rate: 2\n", ("run.yaml:3: sample.rate is set twice",
                                               "run.yaml:1")),
    ("sample.inner.size: 2.5\n", ("run.yaml:1: sample.inner.size: ", "2.5")),
    ("sample.kind: three\n", ("run.yaml:1: sample.kind: ", "<one|two>", "three")),
    ("sample.rate: [1, 2]\n", ("run.yaml:1: sample.rate must be one value, got the list",)),
    ("sample.inner.lengths: [1, x]\n", ("run.yaml:1: sample.inner.lengths: ", "type int")),
    ("sample.bindings: [[1]]\n", ("run.yaml:1: sample.bindings must be a value or a list",)),
    ("sample: [\n", ("run.yaml:2 is not YAML",)),
    ("- 1\n", ("run.yaml must be a mapping",)),
  ],
)  # fmt: skip
def test_mistake_in_a_file_is_reported_with_its_line(write, text, parts):
  with pytest.raises(ValueError, match=r"^`config`: ") as caught:
    parse(f"--config={write(text)}")
  assert all(part in str(caught.value) for part in parts), caught.value


def test_missing_file_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="`config`: no such file: .*none.yaml"):
    parse(f"--config={tmp_path / 'none.yaml'}")


def test_empty_file_sets_nothing(write):
  assert parse(f"--config={write('# nothing')}")["sample"] == Outer()


# Calling a command.


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = options.option(3, "How many steps.")
  online: bool = options.option(False, "Report.")
  fail: str | None = options.option(None, "How to fail.")

  def __post_init__(self):
    if self.steps == 0:
      raise ValueError("`steps` must be at least 1, got 0")


def _run(found: Flags) -> int | None:
  config = found["run"]
  match config.fail:
    case "value":
      raise ValueError("expected 3 layers,\n  got 4; `run.steps` says so")
    case "flag":
      raise ValueError("`run.steps` is too large for `this`")
    case "interrupt":
      raise KeyboardInterrupt
    case "bug":
      _ = {}["missing"]
    case "file":
      raise FileNotFoundError("no such folder: x")
    case "code":
      return 75
    case "softly":
      absl_logging.warning("step %d is\n  damaged", 3)
      logging.getLogger("library.part").error("no such id", exc_info=ValueError("inner"))
      chatty = logging.getLogger("chatty")
      chatty.addHandler(logging.StreamHandler(sys.stderr))
      logging.getLogger("chatty.part").warning("printed by itself")
      chatty.handlers.clear()
      absl_logging.info("progress")
  print(json.dumps(options.to_dict(config)))
  return None


def main(argv=None) -> int:
  """A command for the tests."""
  return flags.call(_run, {"run": Config}, argv, doc="What it does.")


def test_call_runs_the_command(capsys):
  assert main(["--run.steps=5", "--run.online=True"]) == 0
  out, err = capsys.readouterr()
  assert (json.loads(out), err) == ({"steps": 5, "online": True, "fail": None}, "")


def test_log_messages_are_printed_as_sentences_and_only_once(capsys):
  handlers = list(logging.getLogger().handlers)
  assert main(["--run.fail=softly"]) == 0
  assert capsys.readouterr().err.splitlines() == [
    "warning: step 3 is damaged",
    "warning: no such id",
    "printed by itself",
  ]
  assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
  ("arguments", "status", "sentence"),
  [
    (["--run.fail=value"], 1, "error: expected 3 layers, got 4; --run.steps says so"),
    (["--run.fail=flag"], 2, "error: --run.steps is too large for `this`"),
    (["--run.steps=0"], 2, "error: --run.steps must be at least 1, got 0"),
    (["--run.fail=file"], 1, "error: no such folder: x"),
    (["--run.fail=interrupt"], 130, "error: interrupted"),
    (["--run.fail=bug"], 1, "error: KeyError: 'missing' (--debug shows the traceback)"),
    (
      ["--run.online", "=", "False"],  # absl alone reads this as True and two positional arguments
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
      "error: unknown flag --run.step (did you mean --run.steps?)",
    ),
    (
      ["--run.steps=1.5"],
      2,
      "error: flag --run.steps=1.5: invalid literal for int() with base 10: '1.5'",
    ),
  ],
)
def test_error_is_one_sentence_with_an_exit_code(capsys, arguments, status, sentence):
  assert main(arguments) == status
  out, err = capsys.readouterr()
  assert (out, err.splitlines()) == ("", [sentence])


def test_debug_shows_the_traceback_first(capsys):
  assert main(["--run.fail=bug", "--debug"]) == 1
  err = capsys.readouterr().err
  assert err.startswith("Traceback")
  assert err.splitlines()[-1].startswith("error: KeyError: 'missing'")


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_is_printed(capsys, flag):
  assert main([flag]) == 0
  out, err = capsys.readouterr()
  assert "What it does." in out and "--run.steps=N\n      How many steps." in out
  assert not err


def test_exit_code_of_the_command_is_returned():
  assert main(["--run.fail=code"]) == 75


def test_error_ends_the_process_despite_running_threads():
  script = textwrap.dedent("""
    import sys, threading, time
    from ll3m.core import flags
    def run(found):
      threading.Thread(target=time.sleep, args=(600,)).start()
      raise ValueError("it ends")
    sys.exit(flags.call(run, {}))
  """)
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: it ends\n")
