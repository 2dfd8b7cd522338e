"""Shapes of rows; the oracles are texts, masks and messages written by hand, and transformers."""

import json

import numpy as np
import pytest
import transformers

from ll3m.data.config import ROW_SHAPES, DatasetConfig, TextProcessorConfig, TokenizerConfig
from ll3m.data.examples import choose_shape
from ll3m.data.shapes import SHAPES, Conversation, recognise, template_shape
from ll3m.data.skipped_examples import Unusable
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import load_tokenizer


def user(text):
  return {"role": "user", "content": text}


def assistant(text, **more):
  return {"role": "assistant", "content": text} | more


WITH_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides further "
  "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
  "Translate.\n\n### Input:\nHallo\n\n### Response:\n"
)
WITHOUT_INPUT = (
  "Below is an instruction that describes a task. Write a response that appropriately completes "
  "the request.\n\n### Instruction:\nSay hello.\n\n### Response:\n"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
# Rows, the shape that is recognised, and what it makes of them without a chat template.
ROWS = [
  ({"text": "plain"}, "text", [("plain", True)]),
  ({"id": 3, "text": "plain", "url": "x"}, "text", [("plain", True)]),
  (
    {"prompt": "2+2=", "completion": "4"},
    "prompt_completion",
    [("2+2=", False), ("4", True)],
  ),
  (
    {"prompt": "2+2=", "completion": 4},
    "prompt_completion",
    [("2+2=", False), ("4", True)],
  ),
  (
    {"prompt": "Is it?", "completion": True},
    "prompt_completion",
    [("Is it?", False), ("true", True)],
  ),
  (
    {"prompt": None, "completion": 0.5},
    "prompt_completion",
    [("", False), ("0.5", True)],
  ),
  (
    {"prompt": [user("a")], "completion": [assistant("b")]},
    "prompt_completion",
    Conversation([user("a") | {"weight": 0}, assistant("b")]),
  ),
  (
    {"prompt": [user("a"), assistant("b"), user("c")], "completion": "d"},
    "prompt_completion",
    Conversation(
      [
        user("a") | {"weight": 0},
        assistant("b", weight=0),
        user("c") | {"weight": 0},
        assistant("d"),
      ]
    ),
  ),
  (
    {"instruction": "Translate.", "input": "Hallo", "output": "Hello", "text": "rendered"},
    "instruction",
    [(WITH_INPUT, False), ("Hello", True)],
  ),
  (
    {"instruction": "Say hello.", "input": "", "output": "Hello"},
    "instruction",
    [(WITHOUT_INPUT, False), ("Hello", True)],
  ),
  (
    {"instruction": "Say hello.", "output": "Hello"},
    "instruction",
    [(WITHOUT_INPUT, False), ("Hello", True)],
  ),
  (
    {"instruction": "Translate.", "context": "Hallo", "response": "Hello", "category": "x"},
    "dolly",
    [(WITH_INPUT, False), ("Hello", True)],
  ),
  (
    {"messages": [user("a"), assistant("b")], "tools": TOOLS, "prompt": "a"},
    "messages",
    Conversation([user("a"), assistant("b")], TOOLS),
  ),
  (
    {
      "system": "Be brief.",
      "conversations": [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b", "weight": 0},
      ],
    },
    "conversations",
    Conversation(
      [
        {"role": "system", "content": "Be brief."},
        user("a"),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        assistant("b", weight=0),
      ]
    ),
  ),
  (
    {"conversations": [user("a"), assistant("b")]},
    "conversations",
    Conversation([user("a"), assistant("b")]),
  ),
]
# Preference pairs, whose chosen answers are trained on.
CHOSEN = [
  (
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    [("2+2=", False), ("4", True)],
  ),
  (
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    Conversation([user("a") | {"weight": 0}, assistant("b")]),
  ),
  (
    {"prompt": "a", "chosen": [user("a"), assistant("b")],
     "rejected": [user("a"), assistant("c")]},
    Conversation([user("a") | {"weight": 0}, assistant("b")]),
  ),
  (
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    Conversation([user("a") | {"weight": 0}, assistant("b")]),
  ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "expected"), ROWS)
def test_rows_are_recognised_and_read(row, name, expected):
  shape = recognise(list(row))
  assert shape.name == name
  assert shape.convert(row, False) == expected


def test_common_prefix_of_texts_is_the_prompt():
  row = {"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: nine"}
  assert SHAPES["chosen"].convert(row, False) == [("Q: 2+2? A:", False), (" four", True)]


@pytest.mark.parametrize(("row", "expected"), CHOSEN)
def test_chosen_answers_are_trained_on(row, expected):
  assert SHAPES["chosen"].convert(row, False) == expected


def test_instructions_use_the_chat_template_if_there_is_one(tokenizer, folder):
  row = {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  expected = theirs.apply_chat_template(
    [user("Translate.\n\nHallo"), assistant("Hello")], return_dict=True
  )["input_ids"]
  document = TextProcessor(recognise(list(row)), tokenizer)(row)
  assert document.tokens.tolist() == expected
  trained = [t for t, learn in zip(document.tokens, document.loss, strict=True) if learn]
  assert tokenizer.decode(trained, keep_control=True) == "Hello<|im_end|>"


def test_prompts_carry_no_loss_and_answers_end_with_eos(mistral_model):
  tokenizer = load_tokenizer(TokenizerConfig(path=str(mistral_model)))
  row = {"instruction": "Say hello.", "output": "Hello"}
  tokens, loss = TextProcessor(recognise(list(row)), tokenizer)(row)
  assert tokens.tolist() == [1, *tokenizer.encode(WITHOUT_INPUT + "Hello"), 2]
  assert tokenizer.decode(tokens[loss == 1][:-1]) == "Hello" and tokens[loss == 1][-1] == 2
  assert not np.any(loss[: loss.argmax()]) and np.all(loss[loss.argmax() :])


def test_content_may_be_a_list_of_text_parts(tokenizer):
  parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
  processor = TextProcessor(SHAPES["messages"], tokenizer)
  found, plain = (
    processor({"messages": [user(content), assistant("b")]}) for content in (parts, "Hello")
  )
  assert found.tokens.tolist() == plain.tokens.tolist()
  image = [{"type": "image_url", "image_url": "x"}]
  with pytest.raises(Unusable, match="type 'image_url'; only text"):
    processor({"messages": [user(image), assistant("b")]})


@pytest.mark.parametrize(
  ("prompt", "completion", "expected"),
  [
    (r"Question: {question}\nAnswer: ", "{answer}", [("Question: 2+2?\nAnswer: ", False),
                                                      ("4", True)]),
    (None, "{answer}{{x}}", [("", False), ("4{x}", True)]),
    (r"{ question }\\n\t", " {answer}, {question}", [("2+2?\\n\t", False), (" 4, 2+2?", True)]),
    ("{note}:", "{answer}", [(":", False), ("4", True)]),
  ],
)  # fmt: skip
def test_templates_name_any_columns(prompt, completion, expected):
  row = {"question": "2+2?", "answer": 4, "note": None}
  assert template_shape(prompt, completion).convert(row, False) == expected


@pytest.mark.parametrize(
  ("prompt", "completion", "message"),
  [
    ("{question}", None, "`completion` must be given"),
    ("{question}", "yes", "`completion` must contain a column"),
    ("{question", "{answer}", "`prompt_template` must have columns in braces"),
    ("{}", "{answer}", "`prompt_template` must have columns in braces"),
    ("", "answer}", "`completion` must have columns in braces"),
  ],
)
def test_malformed_templates_are_refused(prompt, completion, message):
  with pytest.raises(ValueError, match=message):
    template_shape(prompt, completion)


@pytest.mark.parametrize(
  ("shape", "row", "reason"),
  [
    ("instruction", {"instruction": "a", "output": None}, "field 'output' is null"),
    ("instruction", {"instruction": "a", "output": ""}, "field 'output' is empty"),
    ("instruction", {"instruction": " ", "output": "b"}, "field 'instruction' is empty"),
    ("instruction", {"instruction": "a", "output": ["b"]}, "field 'output' is a list"),
    ("instruction", {"instruction": "a"}, "no field 'output'"),
    ("prompt_completion", {"prompt": "a", "completion": {}}, "field 'completion' is an object"),
    ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "prompt is not a list of messages"),
    ("messages", {"messages": None}, "field 'messages' is null"),
    ("conversations", {"conversations": []}, "not a list of turns"),
    ("conversations", {"conversations": [{"from": "alien", "value": "x"}]}, "got 'alien'"),
    (
      "conversations",
      {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
      "function_call is not JSON",
    ),
    ("text", {"text": "a\ud800"}, "not Unicode"),
  ],
)
def test_unusable_rows_have_a_reason(tokenizer, shape, row, reason):
  with pytest.raises(Unusable, match=reason):
    TextProcessor(SHAPES[shape], tokenizer)(row)


def test_every_shape_can_be_named(tokenizer):
  for name in ROW_SHAPES:
    assert choose_shape(DatasetConfig(data_format=name), None, "x").name == name


def test_unknown_columns_are_explained():
  with pytest.raises(ValueError) as error:
    choose_shape(DatasetConfig(), {"question": "a", "answer": "b"}, "q.csv, row 1")
  said = str(error.value)
  assert said.startswith("q.csv, row 1: ") and "question, answer" in said
  assert "prompt/completion lacks prompt, completion" in said
  assert "`prompt_template`='{question}'" in said and "`completion`='{answer}'" in said
  with pytest.raises(ValueError, match="known shape has .*: `completion`='{completion}' alone"):
    choose_shape(DatasetConfig(), {"completion": "a"}, "a.jsonl:1")
  with pytest.raises(ValueError, match="'{id}' and `completion`='{response}'"):
    choose_shape(DatasetConfig(), {"id": 1, "response": "a", "date": "b"}, "a.jsonl:1")
  with pytest.raises(ValueError, match="preference pairs .*`data_format`=chosen"):
    choose_shape(DatasetConfig(), CHOSEN[0][0], "p.jsonl:1")


def test_conversations_need_a_chat_template(mistral_model):
  tokenizer = load_tokenizer(TokenizerConfig(path=str(mistral_model)))
  with pytest.raises(ValueError, match="chat template"):
    TextProcessor(SHAPES["conversations"], tokenizer)
  processor = TextProcessor(SHAPES["prompt_completion"], tokenizer)
  with pytest.raises(Unusable, match="no chat template"):
    processor({"prompt": [user("a")], "completion": [assistant("b")]})


def test_only_one_way_of_naming_columns_is_accepted():
  for options in (
    {"data_format": "text", "completion": "{a}"},
    {"completion": "{a}", "text_processor": TextProcessorConfig("a")},
    {"data_format": "messages", "text_processor": TextProcessorConfig("a")},
  ):
    with pytest.raises(ValueError, match="cannot be combined"):
      DatasetConfig(**options)
