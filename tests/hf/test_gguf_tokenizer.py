"""Oracles: sentencepiece on Mistral's real model, and a tokenizer trained with `tokenizers`."""

import importlib.util
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from ll3m.hf.gguf_tokenizer import tokenizer_files
from ll3m.hf.model_files import open_model

TEXTS = (
  "The capital of France is Paris.",
  "  leading spaces, and  doubled ones \n\n\ttabs\r\n",
  "def f(x):\n    return x ** 2  # 1234567 is 3.14e-05\n",
  "naïve café, 北京, emoji 🙂🤷🏽 and a rare ꙮ",
  "don't we'LL I'm",
  "",
)
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def load(metadata, folder):
  for name, content in tokenizer_files(metadata.get, folder / "model.gguf").items():
    (folder / name).write_bytes(content())
  return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def mistral():
  """The real SentencePiece model of Mistral v0.1, and what a GGUF of it holds."""
  (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
  model = sentencepiece.SentencePieceProcessor(str(Path(package) / "data/tokenizer.model.v1"))
  ids = range(model.vocab_size())

  def kind(i):
    if model.is_byte(i):
      return BYTE
    return UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL

  return model, {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
    "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
    "tokenizer.ggml.token_type": [kind(i) for i in ids],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    "llama.context_length": 128,
  }


def test_sentencepiece_model_is_rebuilt(mistral, tmp_path):
  model, metadata = mistral
  tokenizer = load(metadata, tmp_path)
  text = "\n".join(TEXTS * 3)
  for sample in (*TEXTS[:-1], text):
    expected = model.encode(sample)
    assert tokenizer(sample, add_special_tokens=False).input_ids == expected
    assert tokenizer(sample).input_ids == [1, *expected]
    assert tokenizer.decode(expected) == model.decode(expected)
  assert tokenizer("a<s>b", add_special_tokens=False).input_ids[1] == 1
  assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
  assert tokenizer.pad_token is None
  assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<s>hi"


def test_bos_and_eos_are_added_as_the_file_says(mistral, tmp_path):
  model, metadata = mistral
  metadata = metadata | {
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": True,
  }
  assert load(metadata, tmp_path)("hello").input_ids == [*model.encode("hello"), 2]


@pytest.mark.parametrize(
  ("pre", "digits"), [("gpt-2", False), ("smollm", True), ("starcoder", True)]
)
def test_byte_level_model_is_rebuilt(tmp_path, pre, digits):
  """A tokenizer is trained, taken apart into a GGUF's metadata, and rebuilt."""
  trained = Tokenizer(models.BPE())
  words = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.pre_tokenizer = (
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if digits
    else words
  )
  trained.decoder = decoders.ByteLevel()
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  trained.train_from_iterator(
    [*TEXTS, "1234567 " * 9],
    trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=special,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  model = trained.to_str()
  merges = [" ".join(pair) for pair in json.loads(model)["model"]["merges"]]
  vocab = sorted(trained.get_vocab().items(), key=lambda item: item[1])
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": [piece for piece, _ in vocab],
    "tokenizer.ggml.token_type": [CONTROL if piece in special else NORMAL for piece, _ in vocab],
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "llama.context_length": 128,
  }
  tokenizer = load(metadata, tmp_path)
  for text in (*TEXTS, "a<|im_start|>b 1234567"):
    ids = tokenizer(text).input_ids
    assert ids == trained.encode(text).ids
    assert tokenizer.decode(ids) == text
  assert tokenizer.pad_token == "<|im_end|>"
  assert len(tokenizer("1234567").input_ids) == (7 if digits else 1)


def test_the_real_gguf(smollm2_gguf, tmp_path):
  """Known from transformers 5.23: the prompt's ids, and that its chat template is SmolLM's."""
  model = open_model(smollm2_gguf)
  for name, content in model.tokenizer_files.items():
    (tmp_path / name).write_bytes(content())
  tokenizer = AutoTokenizer.from_pretrained(tmp_path)
  prompt = "The capital of France is"
  ids = tokenizer(prompt).input_ids
  assert ids == [504, 3575, 282, 4649, 314]
  assert [tokenizer.decode(i) for i in ids] == ["The", " capital", " of", " France", " is"]
  assert len(tokenizer("12345").input_ids) == 5
  chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
  )
  assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
  assert tokenizer(chat).input_ids.count(1) == 3
