"""Conversion of json and huggingface examples to documents."""

import pytest
import sentencepiece
import transformers

from ll3m.data.config import DatasetConfig, TextProcessorConfig, TokenizerConfig
from ll3m.data.examples import choose_shape
from ll3m.data.text_processor import TextProcessor, Unusable
from ll3m.data.tokenizer import load_tokenizer
from tests.data.opening import processor_for


def document(tokenizer, example, fields="", **options):
  tokens, loss = processor_for(tokenizer, example, fields, **options)(example)
  return tokens.tolist(), loss.tolist()


def overlapping(offsets, start: int, end: int) -> list[int]:
  """Returns 1 for each token that contains one of the characters start..end, else 0."""
  return [int(bool(set(range(a, b)) & set(range(start, end)))) for a, b in offsets]


@pytest.mark.parametrize(
  ("fields", "text", "trained"),
  [
    ("[system+prompt],answer", "if x < 3pass", (8, 12)),
    ("answer,[system+prompt]", "passif x < 3", (0, 4)),
    ("[prompt,system],answer", "x < 3ifpass", (7, 11)),
  ],
)
def test_fields_are_tokenised_as_one_text(tokenizer, folder, fields, text, trained):
  example = {"system": "if", "prompt": "x < 3", "answer": "pass", "text": "other"}
  theirs = transformers.AutoTokenizer.from_pretrained(folder)(text, return_offsets_mapping=True)
  tokens, loss = document(tokenizer, example, fields)
  assert tokens == [*theirs["input_ids"], tokenizer.eos_id]
  last = int(fields.endswith("answer"))
  assert loss == [*overlapping(theirs["offset_mapping"], *trained), last]


def test_no_space_is_added_between_fields(mistral_model):
  tokenizer = load_tokenizer(TokenizerConfig(path=str(mistral_model)))
  model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))
  tokens, loss = document(tokenizer, {"a": "un", "b": "happy"}, "[a],b")
  assert tokens == [1, *model.encode("unhappy"), 2]
  assert loss == [0, 1, 1]  # the single token "unhappy" contains characters of the answer
  # The space between them belongs to the answer's first word, which is trained.
  tokens, loss = document(tokenizer, {"a": "Q: Why?\nA: ", "b": "Because."}, "[a],b")
  assert tokens == [1, *model.encode("Q: Why?\nA: Because."), 2]
  pieces = [model.id_to_piece(t) for t in tokens]
  assert [p for p, learn in zip(pieces, loss, strict=True) if learn] == ["▁Because", ".", "</s>"]


def test_all_bytes_of_a_character_belong_to_its_field(mistral_model):
  tokenizer = load_tokenizer(TokenizerConfig(path=str(mistral_model)))
  model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))
  pieces = model.encode("x Ꮳ!", out_type=str)
  assert pieces == ["▁x", "▁", "<0xE1>", "<0x8F>", "<0xA3>", "!"]
  tokens, loss = document(tokenizer, {"a": "x Ꮳ", "b": "!"}, "a,[b]")
  assert tokens == [1, *model.encode("x Ꮳ!"), 2]
  assert loss == [0, 1, 1, 1, 1, 1, 0, 0]
  assert document(tokenizer, {"a": "x ", "b": "Ꮳ!"}, "[a],b")[1] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_subfields_are_joined_by_the_separator(tokenizer, folder):
  theirs = transformers.AutoTokenizer.from_pretrained(folder)("a--b")["input_ids"]
  example = {"x": "a", "y": "b"}
  tokens, loss = document(tokenizer, example, "x+y", subfield_separator="--")
  assert (tokens, loss) == ([*theirs, tokenizer.eos_id], [1] * (len(theirs) + 1))


def test_a_row_without_trained_tokens_is_unusable(tmp_path):
  from tokenizers import Tokenizer, models, normalizers

  encoder = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
  encoder.normalizer = normalizers.Replace("\u200b", "")  # the answer becomes empty
  encoder.add_special_tokens(["</s>"])
  encoder.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
  with pytest.raises(Unusable, match="no token"):
    document(tokenizer, {"answer": "\u200b", "end": "a"}, "answer,[end]")


def test_by_default_messages_or_else_text_is_used(tokenizer):
  turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
  assert document(tokenizer, {"text": "ho"}) == document(tokenizer, {"text": "ho"}, "text")
  assert document(tokenizer, {"text": "ho", "messages": turns}) == document(
    tokenizer, {"messages": turns}, "messages"
  )
  for nothing in (None, float("nan")):  # in a table whose rows have different columns
    assert document(tokenizer, {"text": "ho", "messages": nothing, "tools": nothing}) == document(
      tokenizer, {"text": "ho"}
    )


@pytest.mark.parametrize(
  ("example", "fields", "reason"),
  [
    ({"prompt": "a"}, "[prompt],answer", "no field 'answer'"),
    ({"prompt": "a", "answer": [3]}, "[prompt],answer", "field 'answer' is a list"),
    ({"prompt": "a", "answer": {"b": 3}}, "[prompt],answer", "field 'answer' is an object"),
    ({"prompt": "a", "answer": None}, "[prompt],answer", "field 'answer' is null"),
    ({"prompt": "a", "answer": ""}, "[prompt],answer", "no text"),
    ({"prompt": "a", "answer": " \n"}, "[prompt],answer", "no text"),
    ({"prompt": "a", "answer": float("nan")}, "[prompt],answer", "field 'answer' is null"),
    ({}, "", "no field 'text'"),
    ({"text": "a\ud800b"}, "", "not Unicode text"),
    ({"messages": [{"role": "assistant", "content": "\udfff"}]}, "", "not Unicode text"),
    ({"messages": []}, "", "messages is not a list of messages"),
  ],
)
def test_unusable_examples_have_a_reason(tokenizer, example, fields, reason):
  shape = "messages" if "messages" in example else "text"
  config = DatasetConfig(
    data_format="auto" if fields else shape, text_processor=TextProcessorConfig(fields)
  )
  processor = TextProcessor(choose_shape(config, None, ""), tokenizer)
  for read in (processor, processor.read):
    with pytest.raises(Unusable, match=reason):
      read(example)


def test_fields_that_the_tokenizer_cannot_render_are_refused(tokenizer, mistral_model):
  with pytest.raises(ValueError, match="fields`: messages .*'messages,text'"):
    processor_for(tokenizer, {}, "messages,text")
  with pytest.raises(ValueError, match="chat template"):
    processor_for(load_tokenizer(TokenizerConfig(path=str(mistral_model))), {}, "messages")
