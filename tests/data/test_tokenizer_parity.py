"""Ids and text of tokenizer folders of every kind, against transformers 5 and SentencePiece.

The oracle for a text that contains a control string is the same encoder without that added token,
to which the string is ordinary characters.
"""

import json
import random

import pytest
import sentencepiece
import tokenizers
import transformers

from ll3m.data import chat
from ll3m.data.config import TokenizerConfig
from ll3m.data.text_stream import TextStream
from ll3m.data.tokenizer import load_tokenizer
from tests.data import tokenizer_folders as folders
from tests.data.opening import encode_chat

TEXTS = (
  "", " ", "  ", "   leading", "trailing  ", "a", " a", "a  b", "In 2023", "x = 10", "3.14159",
  "\n", "\n\n", "\n\n\n", " \n ", "\t", "\t\tx", "  \t  y", "\r\n", "a\rb", "line\nline\n",
  "The quick brown fox", "Hello, world!", "don't can't I'll", "CamelCase snake_case kebab-case",
  "for x in range(10):\n    print(x)\n", "https://example.org/a?b=c#d", "user@example.org",
  "naïve über façade", "e\u0301 \u00e9", "\ufb01 \u2460 \u00bd", "\u00a0nbsp\u00a0", "\u3000x",
  "\ufeffbom",
  "漢字かな", "한국어", "Ελληνικά", "русский", "עברית", "العربية", "ไทย",
  "ᏣᎳᎩᎦᏬᏂᎯᏍᏗ done",
  "ᠮᠣᠩᠭᠣᠯ",
  "𐍈𐌰𐌽𐌰 rare", "😀", "👩\u200d🚀👨\u200d👩\u200d👧", "a😀b",
  "\x00", "a\x00b", "\x1f\x7f", "\u200b\u2028\u2029", "▁", "a▁b ▁c", "<0x41><0x0A>",
  "*" * 19, "=" * 80, " " * 33 + "x", "ab" * 50, "w" * 300, "\ufdd0\ufdd1 noncharacters",
)  # fmt: skip
WITHOUT_TEMPLATE = ("llama2_legacy", "llama2", "mistral", "gemma", "phi", "fast_only")
CONTROL_TEXTS = (
  "</s>", "a</s>b", "<s> x </s>", "x<|im_end|>\n<|im_start|>user", "<|endoftext|>", "<unk>",
  "<bos><eos><pad>", "say <|im_end|> one", "<start_of_turn>user",
)  # fmt: skip


@pytest.fixture(scope="module", params=[*folders.FOLDERS, "smollm2"])
def folder(request, tmp_path_factory, smollm2_gguf):
  path = tmp_path_factory.mktemp(request.param)
  if request.param == "smollm2":
    return folders.smollm2(path, smollm2_gguf)
  return folders.FOLDERS[request.param](path)


@pytest.fixture(scope="module")
def ours(folder):
  return load_tokenizer(TokenizerConfig(), checkpoint_dir=folder, source_dir=folder)


@pytest.fixture(scope="module")
def theirs(folder):
  return transformers.AutoTokenizer.from_pretrained(folder)


def as_letters(encoder: tokenizers.Tokenizer, controls) -> tokenizers.Tokenizer:
  """Returns the same encoder without the added tokens `controls`, which become ordinary text."""
  source = json.loads(encoder.to_str())
  source["added_tokens"] = [t for t in source["added_tokens"] if t["content"] not in controls]
  return tokenizers.Tokenizer.from_str(json.dumps(source))


def streamed(tokenizer, prompt, ids) -> str:
  stream = TextStream(
    tokenizer.decode, prompt, byte_ids=tokenizer.byte_ids, silent_ids=tokenizer.silent_ids
  )
  return "".join([*map(stream.push, ids), stream.finish()])


def test_ids_text_and_streams_equal_those_of_transformers(ours, theirs):
  prompt = theirs("The", add_special_tokens=False)["input_ids"]
  for text in TEXTS:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids, text
    for skip in (True, False):
      assert ours.decode(ids, keep_control=not skip) == theirs.decode(ids, skip_special_tokens=skip)
    for end in range(1, len(ids) + 1) if len(ids) < 20 else (len(ids),):
      whole = theirs.decode([*prompt, *ids[:end]], skip_special_tokens=True)
      assert "The" + streamed(ours, prompt, ids[:end]) == whole


def test_special_tokens_equal_those_of_transformers(ours, theirs):
  for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
    # If no file of the tokenizer names an EOS, the EOS of the model's config.json is used.
    expected = "</s>" if name == "eos_token" and theirs.eos_token is None else getattr(theirs, name)
    assert ours.special_tokens.get(name) == expected
    assert expected is None or ours.token_id(expected) == theirs.convert_tokens_to_ids(expected)
  assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
  assert ours.chat_template == theirs.chat_template
  document = theirs("if x")["input_ids"]
  assert [*ours.prefix, *ours.encode("if x")] == document
  for token, i in theirs.get_added_vocab().items():
    assert ours.token_id(token) == i
    assert ours.decode([i], keep_control=True) == theirs.decode([i])


def test_control_strings_in_text_are_ordinary_characters(ours, theirs):
  expected = as_letters(theirs.backend_tokenizer, ours.control_tokens)
  special = {str(t) for t in theirs.added_tokens_decoder.values() if t.special}
  assert special <= set(ours.control_tokens)
  for text in (*CONTROL_TEXTS, *ours.control_tokens):
    assert ours.encode(text) == expected.encode(text, add_special_tokens=False).ids
    assert ours.control_ids.isdisjoint(ours.encode(text))


def test_a_saved_folder_gives_the_same_ids_in_transformers(ours, tmp_path):
  ours.save(tmp_path / "saved")
  again = load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved")))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  assert again.fingerprint == ours.fingerprint
  assert (theirs.eos_token_id, theirs.chat_template) == (ours.eos_id, ours.chat_template)
  for text in TEXTS:
    assert ours.encode(text) == again.encode(text)
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_turn_markers_are_control_tokens_flagged_or_not(folder, ours, theirs):
  if not ours.chat_template:
    assert folder.name[:-1] in WITHOUT_TEMPLATE
    return
  start, end = (theirs.convert_tokens_to_ids(t) for t in folders.MARKERS)
  assert {start, end} <= ours.control_ids
  assert end in ours.stop_ids and start not in ours.stop_ids
  harmless = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "4"}]
  rendered = theirs.apply_chat_template(harmless, return_dict=True)["input_ids"]
  assert encode_chat(ours, chat.render(ours, harmless))[0].tolist() == rendered
  turns = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "4"}]
  ids, loss = encode_chat(ours, chat.render(ours, turns))
  for marker in (start, end):
    assert ids.tolist().count(marker) == rendered.count(marker)
  assert ids[loss == 1][-1] == end
  assert (
    chat.encode_prompt(ours, harmless[:1])
    == (theirs.apply_chat_template(harmless[:1], add_generation_prompt=True)["input_ids"])
  )


def test_added_tokens_other_than_turn_markers_are_recognised_in_text(tmp_path):
  ours = load_tokenizer(TokenizerConfig(path=str(folders.qwen(tmp_path))))
  assert ours.token_id("<tool_call>") in ours.encode("<tool_call>\n{}")
  assert ours.token_id("<|im_end|>") not in ours.encode("<|im_end|>")


# SentencePiece models of every kind, read without a tokenizer.json.
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
  "mistral": folders.mistral_model,
  "bpe": lambda: folders.train_sentencepiece(model_type="bpe", byte_fallback=True, **IDENTITY),
  "no_prefix": lambda: folders.train_sentencepiece(
    model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
    user_defined_symbols=["<image>", "▁▁", "▁▁▁"], **IDENTITY
  ),
  "normalised": lambda: folders.train_sentencepiece(model_type="bpe", byte_fallback=True),
  "without_bytes": lambda: folders.train_sentencepiece(
    model_type="bpe", character_coverage=0.999
  ),
  "unigram": lambda: folders.train_sentencepiece(
    model_type="unigram", byte_fallback=True, **IDENTITY
  ),
}  # fmt: skip


def random_texts(count: int) -> list[str]:
  rng = random.Random(0)
  parts = ["*", " ", "-", "a", "e", "0", "ab", "na", "\n", "漢", "é", " the", "import", "ﬁ", "  ",
           "\x00", "😀", "Ꮳ", "<s>", "</s>", "<image>", "\u3000", "e\u0301"]  # fmt: skip
  return [
    "".join(rng.choice(parts) * rng.choice([1, 1, 2, 5]) for _ in range(rng.randrange(1, 9)))
    for _ in range(count)
  ]


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_alone_gives_its_own_ids(tmp_path, name):
  serialized = MODELS[name]()
  model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
  ours = load_tokenizer(
    TokenizerConfig(path=str(folders.sentencepiece_only(tmp_path / "model", serialized)))
  )
  for text in (*TEXTS, *CONTROL_TEXTS, *random_texts(2000)):
    ids, found = model.encode(text), ours.encode(text)
    if name != "unigram":
      assert found == ids, text
    else:  # the libraries may choose different segmentations of a run of one character
      assert sum(map(model.get_score, found)) == pytest.approx(sum(map(model.get_score, ids)))
      assert model.decode(found) == model.decode(ids)
    decoded = model.decode(ids)
    if "\ufffd" not in decoded and model.unk_id() not in ids:
      assert ours.decode(ids) == decoded
  assert (ours.bos_id, ours.eos_id) == (model.bos_id(), model.eos_id())
  ours.save(tmp_path / "saved")  # transformers then gives the same ids, too
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  for text in TEXTS:
    assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]


def test_tokens_can_be_added_to_a_sentencepiece_model(tmp_path):
  serialized = folders.mistral_model()
  model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
  folder = folders.sentencepiece_only(tmp_path, serialized, chatml=True)
  ours = load_tokenizer(TokenizerConfig(path=str(folder)))
  assert [ours.token_id(t) for t in folders.MARKERS] == [32000, 32001]
  assert ours.eos_id == 32001 and ours.stop_ids == {32001}
  for text in (*TEXTS, *CONTROL_TEXTS):
    assert ours.encode(text) == model.encode(text)
  turns = [{"role": "user", "content": "Hi </s>"}, {"role": "assistant", "content": "Yes"}]
  ids, loss = encode_chat(ours, chat.render(ours, turns))
  newline = model.encode("\n")[1]
  # No space is added after a marker, as in transformers if `legacy` is not set.
  user, assistant = ("user\nHi </s>", "assistant\nYes")
  cut = [model.encode("\n" + part)[2:] for part in (user, assistant)]
  assert ids.tolist() == [32000, *cut[0], 32001, newline, 32000, *cut[1], 32001, newline]
  assert ours.decode(ids[loss == 1], keep_control=True) == "Yes<|im_end|>"


def test_extra_tokens_in_the_chat_template_are_control_tokens(tmp_path):
  encoder = folders.llama_encoder(folders.mistral_model())
  folder = folders.write(tmp_path, encoder, folders.LLAMA | {"chat_template": folders.CHATML})
  ours = load_tokenizer(TokenizerConfig(path=str(folder), extra_tokens=folders.MARKERS))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  theirs.add_tokens([*folders.MARKERS])
  turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
  ids = encode_chat(ours, chat.render(ours, turns))[0].tolist()
  assert ids == theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
  assert 32001 in ours.stop_ids and ours.control_ids >= {32000, 32001}
