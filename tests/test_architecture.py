"""The dependency rules of the packages, read from their imports."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("api", "core", "families", "hf", "models", "data", "training", "decoding", "planning")
VERBS = {path.stem for path in (ROOT / "ll3m").glob("*.py")} - {"__init__"}

# The packages of ours that each package may import, beside itself.
ALLOWED = {
  "api": {"core", "families", "hf", "models", "data", "training", "decoding"},
  "core": set(),
  "families": {"core"},
  "hf": {"core", "families", "data"},
  "models": {"core"},
  "data": {"core"},
  "training": {"core", "families", "hf", "models", "data"},
  "decoding": {"core", "models", "data"},
  "planning": {"core", "families", "models", "training", "decoding"},
}
# Heavy packages that only `ll3m.data` may import.
TENSORFLOW = {"tensorflow", "seqio", "tensorflow_text"}


def imports(path: Path) -> set[str]:
  """Returns the dotted names of all modules that a file imports, lazily or not."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def packages_of(names: set[str]) -> set[str]:
  """Returns the ll3m sub-packages and commands among imported names."""
  return {name.split(".")[1] for name in names if name.startswith("ll3m.")}


@pytest.mark.parametrize("package", LIBRARIES)
def test_libraries_import_only_packages_below_them(package):
  files = sorted((ROOT / "ll3m" / package).rglob("*.py"))
  assert files
  for path in files:
    forbidden = packages_of(imports(path)) - ALLOWED[package] - {package}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_nothing_imports_a_command():
  assert {"convert", "train", "evaluate", "generate", "export", "plan"} <= VERBS
  for path in [*(ROOT / "ll3m").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
    assert not packages_of(imports(path)) & VERBS, path


def library_files() -> list[Path]:
  """Returns the files of the libraries, except those that define flags."""
  flag_layer = {"flags.py", "flag_types.py", "library_logs.py", "config_files.py"}
  return [
    path
    for library in LIBRARIES
    for path in sorted((ROOT / "ll3m" / library).rglob("*.py"))
    if not (library == "core" and path.name in flag_layer)
  ]


def messages(tree: ast.Module) -> Iterator[str]:
  """Yields a file's strings except documentation; X stands for expressions in f-strings."""
  skipped = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      texts = [part for part in node.values if isinstance(part, ast.Constant)]
      skipped |= {id(part) for part in texts}  # ast.walk visits them after their parent
      yield "X".join(part.value for part in texts)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
      yield node.value


def test_libraries_mention_no_flags():
  """Libraries name options in backticks; only a suggested command line may contain flags."""
  for path in library_files():
    assert not {n for n in imports(path) if n.startswith(("ll3m.core.flags", "absl.flags"))}, path
    for text in messages(ast.parse(path.read_text())):
      named = re.search(r"(?<![\w-])--[a-z]", text)
      assert not named or "python -m ll3m" in text or "gguf_new_metadata" in text, (path, text)


def test_kernels_import_only_jax_jaxtyping_and_numpy():
  for path in (ROOT / "kernels").rglob("*.py"):
    top = {name.split(".")[0] for name in imports(path)}
    ours = {"jax", "jaxtyping", "numpy", "ll3m_kernels"}
    foreign = top - ours - set(sys.stdlib_module_names)
    assert not foreign, f"{path.name} imports {foreign}"


def test_only_the_data_package_imports_tensorflow():
  users = {
    path.relative_to(ROOT).parts[:2]
    for path in [*(ROOT / "ll3m").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    if {name.split(".")[0] for name in imports(path)} & TENSORFLOW
  }
  assert users == {("ll3m", "data")}


def test_model_config_imports_only_the_standard_library():
  for file in ("model_config.py", "field_types.py", "layer_stacks.py"):
    found = imports(ROOT / "ll3m" / "core" / file)
    outside = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(n.startswith(("ll3m.core.field_types.", "ll3m.core.layer_stacks.")) for n in outside)


def test_models_do_not_know_the_families():
  names = ("llama", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "qwen2", "qwen3")
  for path in (ROOT / "ll3m" / "models").glob("*.py"):
    code = ast.parse(path.read_text())
    strings = {n.value for n in ast.walk(code) if isinstance(n, ast.Constant)}
    assert not strings & set(names), path


def test_every_file_is_short():
  for path in (ROOT / "ll3m").rglob("*.py"):
    assert len(path.read_text().splitlines()) <= 350, f"{path} should be split by topic"
