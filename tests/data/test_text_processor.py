"""Examples of json and huggingface datasets as documents."""

import pytest

from ll3m.data.config import TextProcessorConfig, TokenizerConfig
from ll3m.data.text_processor import TextProcessor, Unusable, parse_json
from ll3m.data.tokenizer import load_tokenizer


def document(tokenizer, example, fields="", **options):
  tokens, loss = TextProcessor(TextProcessorConfig(fields, **options), tokenizer)(example)
  return tokens.tolist(), loss.tolist()


def test_fields_with_and_without_loss(tokenizer, mistral_model):
  example = {"system": "if", "prompt": "x < 3", "answer": "pass", "text": "other"}
  for encoder in (tokenizer, load_tokenizer(TokenizerConfig(path=str(mistral_model)))):
    prompt, answer = encoder.encode("if x < 3"), encoder.encode("pass")
    head = encoder.prefix
    tokens, loss = document(encoder, example, "[system+prompt],answer")
    assert tokens == [*head, *prompt, *answer, encoder.eos_id]
    assert loss == [0] * len(head + prompt) + [1] * (len(answer) + 1)
    tokens, loss = document(encoder, example, "answer,[system+prompt]", subfield_separator="--")
    prompt = encoder.encode("if--x < 3")
    assert tokens == [*head, *answer, *prompt, encoder.eos_id]
    assert loss == [0] * len(head) + [1] * len(answer) + [0] * (len(prompt) + 1)


def test_by_default_messages_and_else_text(tokenizer):
  turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
  assert document(tokenizer, {"text": "ho"}) == document(tokenizer, {"text": "ho"}, "text")
  assert document(tokenizer, {"text": "ho", "messages": turns}) == document(
    tokenizer, {"messages": turns}, "messages"
  )


@pytest.mark.parametrize(
  ("example", "fields", "reason"),
  [
    ({"prompt": "a"}, "[prompt],answer", "no field 'answer'"),
    ({"prompt": "a", "answer": 3}, "[prompt],answer", "field 'answer' is not text"),
    ({"prompt": "a", "answer": ""}, "[prompt],answer", "no text to learn from"),
    ({}, "", "no field 'text'"),
    ({"text": "a\ud800b"}, "", "not Unicode text"),
    ({"messages": [{"role": "assistant", "content": "\udfff"}]}, "", "not Unicode text"),
    ({"messages": []}, "", "messages is not a list of messages"),
  ],
)
def test_examples_that_are_no_document(tokenizer, example, fields, reason):
  processor = TextProcessor(TextProcessorConfig(fields), tokenizer)
  for read in (processor, processor.check):
    with pytest.raises(Unusable, match=reason):
      read(example)


@pytest.mark.parametrize(
  ("line", "reason"),
  [(b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[1]", "not a JSON object"),
   (b'{"a": "\xff"}', "not UTF-8")],
)  # fmt: skip
def test_lines_that_are_no_object(line, reason):
  with pytest.raises(Unusable, match=reason):
    parse_json(line)


def test_choices_that_the_tokenizer_cannot_serve(tokenizer, mistral_model):
  with pytest.raises(ValueError, match="messages stands alone"):
    TextProcessor(TextProcessorConfig("messages,text"), tokenizer)
  with pytest.raises(ValueError, match="no chat template"):
    TextProcessor(
      TextProcessorConfig("messages"), load_tokenizer(TokenizerConfig(path=str(mistral_model)))
    )


def test_a_byte_order_mark_is_no_part_of_a_row():
  assert parse_json(b'\xef\xbb\xbf{"text": "a"}\r') == {"text": "a"}
