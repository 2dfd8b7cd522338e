"""`import ll3m` loads nothing else, and the programs of README and docs/python.md run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.successor_model import write_successor_model
from tests.test_generate_ends import write_words

DOCS = Path(__file__).parents[2] / "docs"
HEAVY = ("tensorflow", "transformers", "orbax", "seqio", "absl", "jax", "haiku")


def test_importing_the_package_loads_no_heavy_library():
  program = (
    f"import sys, ll3m; found = set({HEAVY!r}) & {{m.split('.')[0] for m in sys.modules}}; "
    "assert not found, found; assert 'load' in dir(ll3m)"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_a_misspelt_name_raises_attribute_error():
  import ll3m

  with pytest.raises(AttributeError, match="'ll3m' has no attribute 'laod'"):
    ll3m.laod  # noqa: B018
  with pytest.raises(AttributeError, match="'ll3m.data' has no attribute 'json'"):
    ll3m.data.json  # noqa: B018


@pytest.fixture
def folder(tmp_path):
  """A folder with a model and data under the names that the documents use."""
  smol = tmp_path / "checkpoints" / "smol"
  write_words(smol)
  write_successor_model(smol, 16, {3: 4, 4: 6, 6: 7, 7: 2}, max_position_embeddings=512)
  (tmp_path / "my").mkdir()
  rows = "".join(json.dumps({"text": "go one two three " * (i % 3 + 1)}) + "\n" for i in range(30))
  (tmp_path / "my" / "rows.jsonl").write_text(rows)
  return tmp_path


@pytest.mark.parametrize(
  ("document", "least"), [(DOCS.parent / "README.md", 1), (DOCS / "python.md", 7)]
)
def test_documented_programs_run(folder, document, least):
  """Runs all unchanged code blocks of a document in a new interpreter."""
  blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
  assert len(blocks) >= least
  program = "\n".join(blocks)
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  saved = folder / ("out" if document.name == "README.md" else "saved")
  assert (saved / "ll3m.json").exists()
