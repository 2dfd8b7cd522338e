"""Oracles: sentencepiece on Mistral's real model, and a tokenizer trained with `tokenizers`."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
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
HARD = (
  "",
  "<s>a</s>",
  "<0x41>",
  "<unk>",
  "x\x00y",
  "\x00",
  " ",
  "a ",
  "▁a ▁",
  "ᏣᎳᎩᎦᏬᏂᎯᏍᏗ done",
  "\ufeffa\u2028b\x85c\x0cd",
  "x" * 999,
  *(" " * n + "x" + " " * n + "y\n" + " " * n for n in range(1, 66)),
)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED = -1000.0  # llama.cpp's score of tokens added to the model


def load(metadata, folder):
  for name, content in tokenizer_files(metadata.get, folder / "model.gguf").items():
    (folder / name).write_bytes(content())
  return AutoTokenizer.from_pretrained(folder)


def sentencepiece_model(symbols=()):
  """Returns Mistral v0.1's SentencePiece model with extra symbols, and its GGUF metadata."""
  (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
  content = (Path(package) / "data/tokenizer.model.v1").read_bytes()
  proto = sentencepiece_model_pb2.ModelProto.FromString(content)
  for symbol in symbols:
    proto.pieces.add(piece=symbol, score=0.0, type=USER)
  model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  return model, {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
    "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
    "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    "{arch}.context_length": 128,
  }


@pytest.fixture(scope="module")
def mistral():
  return sentencepiece_model()


def test_rebuilds_a_sentencepiece_model(mistral, tmp_path):
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


def plain_encoder(metadata):
  """Returns an encoder of plain text, in which control tokens are ordinary characters."""
  files = tokenizer_files(metadata.get, Path("model.gguf"))
  encoder = Tokenizer.from_str(files["tokenizer.json"]().decode())
  encoder.encode_special_tokens = True
  return lambda text: encoder.encode(text, add_special_tokens=False).ids


def test_tokenises_hard_texts_like_sentencepiece(mistral):
  """Covers runs of spaces (equal scores), NUL, bytes, and the names of control tokens."""
  model, metadata = mistral
  encode = plain_encoder(metadata)
  for text in (*TEXTS, *HARD):
    assert encode(text) == model.encode(text), repr(text)


def test_symbols_of_the_sentencepiece_model_do_not_split_the_text_first():
  model, metadata = sentencepiece_model(("<sep>", "<|im_end|>", "fooz", "a*b(c", "fo\\"))
  encode = plain_encoder(metadata)
  random = np.random.default_rng(0)
  parts = [" ", "  ", "a", "the", "<sep>", "<|im_end|>", "fooz", "a*b(c", "fo\\", "\n", "</s>", "é"]
  texts = ["".join(random.choice(parts, n)) for n in random.integers(2, 12, 300)]
  for text in ("<sep>hello", "a<sep>b", "a <sep> b", "<sep><sep>", "fooz foozfooz", *texts):
    assert encode(text) == model.encode(text), repr(text)


def test_unused_pieces_are_padding_or_rejected(mistral):
  model, metadata = mistral
  parts = ("tokens", "scores", "token_type")
  changed = {f"tokenizer.ggml.{name}": list(metadata[f"tokenizer.ggml.{name}"]) for name in parts}
  for name, value in zip(parts, ("[PAD32000]", -1000.0, UNUSED), strict=True):
    changed[f"tokenizer.ggml.{name}"].append(value)
  encode = plain_encoder(metadata | changed)
  for text in (*TEXTS, "a [PAD32000] b"):
    assert encode(text) == model.encode(text)
  changed["tokenizer.ggml.token_type"][model.piece_to_id("▁the")] = UNUSED
  with pytest.raises(NotImplementedError, match="has unused pieces .* such as '▁the"):
    plain_encoder(metadata | changed)


def tied_model(words, ranked=False):
  """Returns a SentencePiece model whose pieces all have the same score, as hand-made ones do.

  If `ranked`, the score falls from piece to piece.
  """
  characters = sorted(set("▁unhappyingthe"))
  proto = sentencepiece_model_pb2.ModelProto()
  proto.trainer_spec.model_type = proto.trainer_spec.BPE
  proto.trainer_spec.byte_fallback = True
  proto.normalizer_spec.remove_extra_whitespaces = False
  for piece, kind in (
    ("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL),
    *((f"<0x{i:02X}>", BYTE) for i in range(256)),
    *((piece, NORMAL) for piece in (*words, *characters)),
  ):  # fmt: skip
    score = -float(len(proto.pieces)) if ranked else 0.0
    proto.pieces.add(piece=piece, score=score, type=kind)
  return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
    "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
    "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
  }


def test_pieces_with_equal_scores_are_merged_like_sentencepiece_or_rejected():
  random = np.random.default_rng(0)
  pieces = ("un", "hap", "py", "happy", "th", "the", "he", "in", "ing", "▁u", "▁un", "▁t", "▁th")
  parts = ["un", "happy", "the", " ", "in", "g", "h", "p"]
  refused = 0
  for _ in range(60):
    model, metadata = tied_model(random.choice(pieces, random.integers(2, 7), replace=False))
    try:
      encode = plain_encoder(metadata)
    except NotImplementedError as error:
      assert "score to pieces that overlap" in str(error)
      refused += 1
      continue
    for text in ("".join(random.choice(parts, 8)) for _ in range(40)):
      assert encode(text) == model.encode(text), (metadata["tokenizer.ggml.tokens"][259:], text)
  assert 0 < refused < 40


def test_pieces_that_overlap_themselves_are_merged_like_sentencepiece():
  """Gemma 3 has such pieces: `ahaha`, `|.|.|` and `../../../`."""
  random = np.random.default_rng(0)
  texts = ["aha" * 5, "ah" * 9, *("".join(random.choice(["a", "ha"], 12)) for _ in range(9))]
  for _ in range(100):
    parts = random.permutation(["ah", "ha", "aha", "hah", "haha", "ahah"])
    model, metadata = tied_model([*parts, "ahaha"], ranked=True)
    encode = plain_encoder(metadata)
    for text in texts:
      assert encode(text) == model.encode(text), (parts, text)


def test_rejects_a_vocabulary_without_scores(mistral):
  """llama.cpp's converter writes such a file from a tokenizer.json."""
  metadata = mistral[1] | {"tokenizer.ggml.scores": [ADDED] * 32000}
  with pytest.raises(NotImplementedError, match="the tokenizer of .* score to pieces that overlap"):
    plain_encoder(metadata)


def test_added_tokens_split_the_text_before_normalisation():
  """Expects the result of transformers' legacy Llama tokenizer and of llama.cpp.

  The expected ids are assembled from those of SentencePiece.
  """
  model, metadata = sentencepiece_model()
  names = ["tokens", "scores", "token_type"]
  for name, value in zip(names, ("<|im_start|>", ADDED, USER), strict=True):
    metadata[f"tokenizer.ggml.{name}"].append(value)
  encode = plain_encoder(metadata)
  for text in ("<|im_start|>user", "a<|im_start|>b", "x <|im_start|> y", "<|im_start|>"):
    first, *others = text.split("<|im_start|>")
    expected = model.encode(first)
    for other in others:
      expected += [32000, *model.encode(other)]
    assert encode(text) == expected


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_added_tokens_of_phi_3_take_the_white_space_after_them(arch):
  """Expects the result of transformers with Phi-3's `rstrip`; the ids are SentencePiece's."""
  model, metadata = sentencepiece_model()
  metadata["general.architecture"] = arch
  for token, kind in (("<|user|>", USER), ("<|end|>", CONTROL), ("<|endoftext|>", CONTROL)):
    for name, value in (("tokens", token), ("scores", ADDED), ("token_type", kind)):
      metadata[f"tokenizer.ggml.{name}"].append(value)
  encoder = Tokenizer.from_str(
    tokenizer_files(metadata.get, Path("m"))["tokenizer.json"]().decode()
  )
  ids = encoder.encode("<|user|>\nHi<|end|>\n  x<|endoftext|>\ny", add_special_tokens=False).ids
  first, second = ("Hi", "x") if arch == "phi3" else ("\nHi", "\n  x")
  expected = [
    32000,
    *model.encode(first),
    32001,
    *model.encode(second),
    32002,
    *model.encode("\ny"),
  ]
  assert ids == expected


def test_the_space_prefix_can_be_disabled(mistral):
  model, metadata = mistral
  encode = plain_encoder(metadata | {"tokenizer.ggml.add_space_prefix": False})
  for text in ("hello", "the cat", "x  y"):
    # SentencePiece adds no prefix after a line break either.
    assert encode(text) == model.encode(f"\n{text}")[2:]


def test_bos_and_eos_are_added_according_to_the_metadata(mistral, tmp_path):
  model, metadata = mistral
  metadata = metadata | {
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": True,
  }
  assert load(metadata, tmp_path)("hello").input_ids == [*model.encode("hello"), 2]


@pytest.mark.parametrize(
  ("pre", "digits"), [("gpt-2", False), ("smollm", True), ("starcoder", True)]
)
def test_rebuilds_a_byte_level_model(tmp_path, pre, digits):
  """Trains a tokenizer, converts it to GGUF metadata, and rebuilds it."""
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
    "{arch}.context_length": 128,
  }
  tokenizer = load(metadata, tmp_path)
  for text in (*TEXTS, "a<|im_start|>b 1234567"):
    ids = tokenizer(text).input_ids
    assert ids == trained.encode(text).ids
    assert tokenizer.decode(ids) == text
  assert tokenizer.pad_token == "<|im_end|>"
  assert len(tokenizer("1234567").input_ids) == (7 if digits else 1)


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre, *, merges=("Ġ V",), tokens=("ĠV", "ĠViá»ĩt"), **others):
  """Returns the metadata of byte-level BPE: 256 bytes, some tokens, BOS and EOS."""
  pieces = [*ALPHABET, *tokens, "<bos>", "<eos>"]
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": pieces,
    "tokenizer.ggml.token_type": [NORMAL] * (len(pieces) - 2) + [CONTROL] * 2,
    "tokenizer.ggml.merges": list(merges),
    "tokenizer.ggml.bos_token_id": len(pieces) - 2,
    "tokenizer.ggml.eos_token_id": len(pieces) - 1,
    "{arch}.context_length": 128,
  } | others


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3_ignores_merges_for_a_word_that_is_a_token(tmp_path, pre):
  """Expected ids are worked out by hand; merges alone split the word differently (gpt-2)."""
  tokenizer = load(byte_level(pre), tmp_path)
  assert tokenizer(" Việt", add_special_tokens=False).input_ids == [257]
  assert tokenizer(" Việt").input_ids == [258, 257]  # llama.cpp adds BOS by default
  assert tokenizer.decode([257]) == " Việt"
  silent = byte_level(pre, **{"tokenizer.ggml.add_bos_token": False})
  assert load(silent, tmp_path)(" Việt").input_ids == [257]


def test_gpt_2_applies_merges_to_a_word_that_is_a_token(tmp_path):
  ids = load(byte_level("gpt-2"), tmp_path)(" Việt").input_ids
  assert ids == [256, *(ALPHABET.index(c) for c in "iá»ĩt")]


def test_merges_may_contain_pieces_with_spaces(tmp_path):
  metadata = byte_level("gpt-2", tokens=["a b", "a bc", "de"], merges=["a b c", "d e"])
  state = json.loads(tokenizer_files(metadata.get, tmp_path)["tokenizer.json"]())
  assert state["model"]["merges"] == [["a b", "c"], ["d", "e"]]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tokenizer.ggml.merges": ["x yy"]}, "the merge 'x yy'"),
    ({"tokenizer.ggml.eot_token_id": 260}, "eot_token_id=260, .* 260 tokens"),
    ({"tokenizer.ggml.token_type": [0] * 260}, r"\[0\] .*token_type, expected 1 to 6"),
  ],
)
def test_rejects_inconsistent_parts(changes, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_files(byte_level("gpt-2", **changes).get, Path("model.gguf"))


def test_keeps_named_chat_templates(tmp_path):
  templates = {
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    "tokenizer.chat_templates": ["tool_use"],
    "tokenizer.chat_template.tool_use": "tools: {{ messages[0]['content'] }}",
  }
  tokenizer = load(byte_level("gpt-2", **templates), tmp_path)
  chat = [{"role": "user", "content": "hi"}]
  for name, said in ((None, "hi"), ("default", "hi"), ("tool_use", "tools: hi")):
    assert tokenizer.apply_chat_template(chat, chat_template=name, tokenize=False) == said
  assert (
    load_tokenizer(TokenizerConfig(path=str(tmp_path))).chat_template
    == (templates["tokenizer.chat_template"])
  )


def test_tokenizer_of_the_smollm2_gguf(smollm2_gguf, tmp_path):
  """The expected ids and chat template are those of transformers 5.23."""
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
