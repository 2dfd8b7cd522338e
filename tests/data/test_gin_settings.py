"""Gin bindings, as written for the reference program."""

import pytest

from ll3m.data.config import GinConfig, TokenizerConfig
from ll3m.data.gin_settings import apply, split_bindings

REFERENCE = (
  'data.data_utils.get_default_vocabulary.tokenizer_type="llama", '
  "data.data_utils.get_default_vocabulary.has_extra_token=False"
)
TYPE = "data.data_utils.get_default_vocabulary.tokenizer_type"
EXTRA = "data.data_utils.get_default_vocabulary.has_extra_token"


def bound(*bindings, files=(), **options):
  return apply(GinConfig(gin_bindings=bindings, gin_config=files), TokenizerConfig(**options))


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (REFERENCE, [f'{TYPE}="llama"', f"{EXTRA}=False"]),
    ("a.b=1\nc.d=2,\n", ["a.b=1", "c.d=2"]),
    ("a.b='x,\\'y', c.d=[1, (2, 3)], e.f={'k': 1, 'l': 2}",
     ["a.b='x,\\'y'", "c.d=[1, (2, 3)]", "e.f={'k': 1, 'l': 2}"]),
    ("", []),
  ],
)  # fmt: skip
def test_bindings_are_split_outside_quotes_and_brackets(text, expected):
  assert split_bindings(text) == expected


def test_bindings_of_the_reference_choose_the_tokenizer():
  assert bound(REFERENCE, extra_tokens=("<x>",)) == TokenizerConfig(type="llama")
  assert bound(f'{TYPE}="phi"', type="llama").type == "phi"
  assert bound(f"{EXTRA}=True", extra_tokens=("<x>",)).extra_tokens == ("<x>",)
  assert bound(extra_tokens=("<x>",)).extra_tokens == ("<x>",)
  assert bound() == TokenizerConfig()  # bindings of earlier calls are cleared


def test_bindings_override_files(tmp_path):
  (tmp_path / "a.gin").write_text(f'{TYPE} = "gemma"\n')
  assert bound(files=(str(tmp_path / "a.gin"),)).type == "gemma"
  assert bound(f'{TYPE}="phi"', files=(str(tmp_path / "a.gin"),)).type == "phi"


def test_invalid_bindings_are_refused():
  with pytest.raises(ValueError, match="has_extra_token=True .*`tokenizer.extra_tokens`"):
    bound(f"{EXTRA}=True")
  with pytest.raises(ValueError, match="gin settings .*get_default_vocab.*No configurable"):
    bound('data.data_utils.get_default_vocab.tokenizer_type="llama"')
  with pytest.raises(ValueError, match="gin settings"):
    bound(f'{TYPE}="llama')
  with pytest.raises(ValueError, match="gin settings .*config"):
    bound("data.data_utils.get_default_vocabulary.config=1")
  with pytest.raises(FileNotFoundError, match="^`gin_config`: "):
    bound(files=("nowhere.gin",))
