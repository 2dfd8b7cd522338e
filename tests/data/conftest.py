"""A small real tokenizer (byte-level BPE, trained here) and JSON Lines files."""

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from ll3m.data import config
from ll3m.data.tokenizer import Tokenizer, load_tokenizer

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _train_tokenizer(folder: Path, *, bos: str | None = None, **settings) -> Path:
  """Writes a tokenizer folder; its post-processor puts `bos` before every text."""
  from tokenizers import Tokenizer as Encoder
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  encoder = Encoder(models.BPE())
  encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoder.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  encoder.train_from_iterator([topics["if"], topics["assert"], topics["for"]], trainer)
  if bos:
    encoder.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, encoder.token_to_id(bos))]
    )
  # A published file may have these settings, which must not shorten or pad our documents.
  encoder.enable_truncation(8)
  encoder.enable_padding(length=8)
  folder.mkdir(parents=True, exist_ok=True)
  encoder.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "chat_template": CHATML,
      }
      | settings
    )
  )
  return folder


@pytest.fixture(scope="session")
def train_tokenizer():
  return _train_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
  """A tokenizer folder without BOS."""
  return _train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(folder) -> Tokenizer:
  return load_tokenizer(config.TokenizerConfig(path=str(folder)))


@pytest.fixture(scope="session")
def mistral_model() -> Path:
  """The real SentencePiece model of Mistral v0.1, from the package mistral-common."""
  (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
  return Path(package) / "data" / "tokenizer.model.v1"


@pytest.fixture
def write_jsonl(tmp_path):
  """Returns a function that writes objects (or raw lines) and returns the path."""

  def write(*lines, name: str = "data.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return str(path)

  return write
