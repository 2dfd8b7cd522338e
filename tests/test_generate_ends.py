"""The end and the text of generated sequences, on models with a fixed next token."""

import json

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.calling import call
from tests.data.tokenizer_folders import MARKERS
from tests.successor_model import write_successor_model

WORDS = ["<unk>", "<s>", "</s>", "▁go", "▁one", "▁", "▁two", "▁three", "▁user", "▁assistant"]
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def write_words(folder, *, words=WORDS, markers=(), settings=None):
  """Writes a tokenizer of whole words, one of which is a single space."""
  encoder = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
  encoder.pre_tokenizer = pre_tokenizers.Metaspace()
  encoder.decoder = decoders.Metaspace()
  encoder.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  encoder.add_special_tokens(["<unk>", "<s>", "</s>"])
  encoder.add_tokens([AddedToken(t, normalized=False, special=False) for t in markers])
  folder.mkdir(parents=True, exist_ok=True)
  encoder.save(str(folder / "tokenizer.json"))
  named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | (settings or {})
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named)
  )
  return encoder


def write_byte_fallback(folder):
  """Writes a tokenizer with byte fallback, like Llama 2's.

  Characters without a piece are encoded byte by byte.
  """
  pieces = ["<unk>", "<s>", "</s>", "▁go", "▁done"]
  text = "ᏣᎳᎩᎦᏬᏂ"
  used = list(dict.fromkeys(text.encode()))
  pieces += [f"<0x{byte:02X}>" for byte in used]
  encoder = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
  encoder.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  encoder.add_special_tokens(["<unk>", "<s>", "</s>"])
  encoder.add_tokens([AddedToken("go", normalized=False)])
  folder.mkdir(parents=True)
  encoder.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
  )
  return encoder


def chain(*tokens):
  return dict(zip(tokens, tokens[1:], strict=False))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """The command's output for each case; all cases run in one process."""
  root = tmp_path_factory.mktemp("models")
  go, one, space, two, three, eos = 3, 4, 5, 6, 7, 2
  write_words(root / "lone_space")
  write_successor_model(root / "lone_space", 16, chain(go, one, space, two, three, eos))
  write_words(root / "second_end")
  write_successor_model(
    root / "second_end", 16, chain(go, one, two, three, one), eos_token_id=[eos, three]
  )
  write_words(root / "markers", markers=MARKERS, settings={"chat_template": TEMPLATE})
  write_successor_model(root / "markers", 16, chain(go, one, 11) | chain(9, two, 11, three))
  write_words(root / "old")
  write_successor_model(root / "old", 16, chain(go, one, two, three, 8), eos_token_id=two)
  write_words(
    root / "new", words=[*WORDS[:8], "<eot>", "▁assistant"], settings={"eos_token": "<eot>"}
  )
  encoder = write_byte_fallback(root / "bytes")
  end = encoder.token_to_id("▁done")
  ids = [encoder.token_to_id(f"<0x{byte:02X}>") for byte in "Ꮳ".encode()]
  write_successor_model(
    root / "bytes",
    32,
    chain(encoder.token_to_id("go"), *ids, end, eos),
    max_position_embeddings=128,
  )
  cases = {
    "lone_space": {"config": {"prompt": "go"}},
    "second_end": {"config": {"prompt": "go"}},
    "markers": {"config": {"prompt": "go", "chat": True}},
    "markers_in_text": {"model": "markers", "config": {"prompt": "<|im_end|>go go"}},
    "old": {"config": {"prompt": "go"}, "tokenizer": {"path": str(root / "new")}},
    "bytes": {"config": {"prompt": "go"}},
  }
  for name, case in cases.items():
    case["config"]["checkpoint"] = f"hf::{root / case.pop('model', name)}"
  records = {}
  for name, case in cases.items():
    flags = case["config"] | {f"tokenizer.{k}": v for k, v in case.get("tokenizer", {}).items()}
    done = call("generate", *(f"--{k}={v}" for k, v in flags.items()), "--json",
                "--max_new_tokens=12")  # fmt: skip
    assert done.returncode == 0, done.stderr
    records[name] = json.loads(done.stdout)
  return root, records


def test_a_token_without_visible_text_does_not_end_the_text(said):
  root, records = said
  theirs = transformers.AutoTokenizer.from_pretrained(root / "lone_space")
  record = records["lone_space"]
  assert "go" + record["completion"] == theirs.decode([3, 4, 5, 6, 7]) == "go one  two three"
  assert (record["tokens"], record["ended"]) == (5, True)


def test_a_stop_token_of_config_json_ends_the_text(said):
  record = said[1]["second_end"]
  assert (record["completion"], record["tokens"], record["ended"]) == (" one two three", 3, True)


def test_markers_that_are_not_flagged_as_special_end_a_turn(said):
  record = said[1]["markers"]
  assert (record["completion"], record["tokens"], record["ended"]) == (" two", 2, True)


def test_a_marker_in_a_prompt_is_plain_text(said):
  record = said[1]["markers_in_text"]
  assert (record["completion"], record["tokens"], record["ended"]) == (" one", 2, True)


def test_another_tokenizer_uses_its_own_stop_token(said):
  record = said[1]["old"]
  assert (record["completion"], record["tokens"], record["ended"]) == (" one two three", 4, True)


def test_characters_encoded_as_bytes_are_decoded(said):
  assert said[1]["bytes"]["completion"] == "Ꮳ done"
