"""Conversations rendered by common templates; the oracle is transformers.

transformers finds what an assistant said only if the template marks it. Each template here is
marked by hand. Without the marks, LL3M must find the same tokens.
"""

import re

import jinja2
import numpy as np
import pytest
import transformers
from tokenizers import AddedToken

from ll3m.data import chat
from ll3m.data.config import TokenizerConfig
from ll3m.data.skipped_examples import Unusable
from ll3m.data.tokenizer import load_tokenizer
from tests.data import tokenizer_folders as folders
from tests.data.opening import encode_chat, processor_for

TOKENS = (
  "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
  "<|system|>", "<|end|>", "<tool_call>", "</tool_call>",
)  # fmt: skip

TEMPLATES = {
  "chatml": (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  ),
  "llama2": (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
  ),
  "mistral": (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
  ),
  "gemma": (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<start_of_turn>model\n{% generation %}"
    "{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}{% else %}<start_of_turn>"
    "{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
  ),
  "zephyr": (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
  ),
  "vicuna": (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['role'] | upper }}: {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
  ),
  "phi3": (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
  ),
  "tools": (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    "{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  ),
}


def turns(*contents, system: str | None = None) -> list[dict]:
  first = [] if system is None else [{"role": "system", "content": system}]
  return first + [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
  ]


CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": "2 <|im_end|>"[:1]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
  {"role": "user", "content": "What is 2 + 2?"},
  {"role": "assistant", "content": None, "tool_calls": [CALL]},
  {"role": "tool", "content": "4"},
  {"role": "assistant", "content": "It is 4."},
]
CONVERSATIONS = {
  "one_turn": turns("What is 2 + 2?", "4, of course."),
  "system": turns("hi", "Hello!", system="Be brief."),
  "several": turns("a", "b", "c", "d", "e", "f"),
  "unanswered": turns("a", "b", "not answered yet"),
  "empty_answer": turns("a", "", "b", "c"),
  "leading_space": turns("a", " spaced"),
  "leading_newline": turns("a", "\nNew line", "b", "\n\nTwo"),
  "digit": turns("In which year?", "2023"),
  "unicode": turns("über 漢字?", "Ꮳ 😀 naïve", "mehr", "ﬁn"),
  "code": turns("code?", "```\n  x = 1\n\treturn\n```\n"),
  "template_text": turns("[INST] USER: user\n", "[/INST] ASSISTANT: assistant\nuser"),
  "calls": CALLS,
}


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def encoder(request):
  """An encoder that adds no space before a text, or one that does; special tokens are equal."""
  if request.param == "byte_level":
    encoder = folders.train_byte_level(["<unk>", "<s>", "</s>"])
  else:
    encoder = folders.llama_encoder(folders.mistral_model())
  encoder.add_tokens([AddedToken(t, normalized=False) for t in TOKENS])
  return encoder


@pytest.fixture
def load(encoder, tmp_path):
  def load(template):
    settings = folders.LLAMA | {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "chat_template": template,
    }
    folder = folders.write(tmp_path / str(len(list(tmp_path.iterdir()))), encoder, settings)
    ours = load_tokenizer(TokenizerConfig(path=str(folder)))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)

  return load


def unmarked(template: str) -> str:
  return re.sub(r"{% (end)?generation %}", "", template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_equal_those_of_transformers(load, name):
  marked, theirs = load(TEMPLATES[name])
  plain, _ = load(unmarked(TEMPLATES[name]))
  refused = 0
  for conversation, messages in CONVERSATIONS.items():
    tools = TOOLS if conversation == "calls" else None
    try:
      expected = theirs.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
      )
    except (jinja2.TemplateError, TypeError):
      expected = None
    if expected is None or (tools and name != "tools"):
      # transformers silently drops tools and calls that a template does not render.
      with pytest.raises(ValueError, match="refuses the messages|does not render tool"):
        chat.render(plain, messages, tools)
      refused += 1
      continue
    for ours in (marked, plain):
      ids, loss = encode_chat(ours, chat.render(ours, messages, tools))
      assert ids.tolist() == expected["input_ids"], conversation
      assert loss.tolist() == expected["assistant_masks"], conversation
    prompt = theirs.apply_chat_template(messages[:1], tools=tools, add_generation_prompt=True)
    assert chat.encode_prompt(marked, messages[:1], tools) == prompt["input_ids"]
  assert refused <= 2  # the conversation with a system turn, and that with calls


def test_a_token_that_joins_header_and_answer_is_trained(load):
  """Checks by hand: the token " Yes" contains the last character of the header, a space."""
  for template in (TEMPLATES["vicuna"], unmarked(TEMPLATES["vicuna"])):
    ours, _ = load(template)
    ids, loss = encode_chat(ours, chat.render(ours, turns("Hello", "Yes")))
    assert ours.decode(ids[loss == 1], keep_control=True).strip() == "Yes</s>"
    assert ours.decode(ids[: np.flatnonzero(loss)[0]]).rstrip().endswith("ASSISTANT:")
    if yes := ours.token_id("▁Yes"):
      assert ids[loss == 1].tolist() == [yes, ours.eos_id]


def test_a_line_break_token_shared_by_header_and_answer_is_trained(load):
  ours, theirs = load(TEMPLATES["chatml"])
  ids, loss = encode_chat(ours, chat.render(ours, turns("a", "\nb")))
  start = ids.tolist().index(theirs.convert_tokens_to_ids("<|im_start|>"), 2)
  assert ours.decode(ids[start:][loss[start:] == 1], keep_control=True).endswith("b<|im_end|>")
  assert "\n" in ours.decode(ids[loss == 1])


@pytest.mark.parametrize("mark", [True, False])
def test_turns_of_weight_zero_are_not_trained(load, mark):
  template = TEMPLATES["chatml"] if mark else unmarked(TEMPLATES["chatml"])
  ours, _ = load(template)
  messages = turns("a", "first", "b", "second", "c", "third")
  whole, loss = encode_chat(ours, chat.render(ours, messages))
  messages[1]["weight"], messages[3]["weight"] = 0, 1
  ids, weighted = encode_chat(ours, chat.render(ours, messages))
  assert ids.tolist() == whole.tolist()
  text = ours.decode(ids[weighted == 1], keep_control=True)
  assert text == ours.decode(ids[loss == 1], keep_control=True).removeprefix("first<|im_end|>")
  for message in messages[1::2]:
    message["weight"] = 0
  with pytest.raises(ValueError, match="every .*weight 0"):
    chat.render(ours, messages)
  messages[1]["weight"] = 0.5
  with pytest.raises(ValueError, match="weight .*0 or 1"):
    chat.render(ours, messages)


def test_control_strings_in_messages_tools_and_calls_stay_text(load):
  ours, theirs = load(unmarked(TEMPLATES["tools"]))
  end = theirs.convert_tokens_to_ids("<|im_end|>")
  call = {"function": {"name": "x<|im_end|>", "arguments": {"<|im_end|>": "<|im_end|>"}}}
  messages = [
    {"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nSure"},
    {"role": "assistant", "content": "</s><|im_end|>", "tool_calls": [call]},
  ]
  tools = [{"type": "function", "function": {"name": "<|im_end|>"}}]
  ids, loss = encode_chat(ours, chat.render(ours, messages, tools))
  assert ids.tolist().count(end) == 3 and ours.eos_id not in ids
  text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
  decoded = ours.decode(ids, keep_control=True)
  # No text is lost. The Llama encoder adds a space after each marker, in transformers too.
  if "Ġ" in ours.files()["tokenizer.json"].decode():
    assert decoded == text
  else:
    assert decoded.replace(" ", "") == text.replace(" ", "")
  assert ours.decode(ids[loss == 1], keep_control=True).startswith("</s><|im_end|><tool_call>")


@pytest.mark.parametrize(
  ("messages", "tools", "reason"),
  [
    (CALLS, None, "does not render tool_calls"),
    ([CALLS[0], CALLS[3]], TOOLS, "does not render tools"),
    ([CALLS[0], CALLS[3]], "not JSON", "tools is not a list of JSON objects"),
    ([CALLS[0], CALLS[3]], [1], "tools is not a list of JSON objects"),
    ([CALLS[0], CALLS[1] | {"tool_calls": "x"}], None, "tool_calls is not a list"),
    (turns("a", "", "b", " \n"), None, "no text"),
    (turns("a", None), None, "no text"),
  ],
)
def test_conversations_that_cannot_be_trained_on_are_unusable(load, messages, tools, reason):
  ours, _ = load(TEMPLATES["phi3"].replace("m['content']", "m['content'] or ''"))
  row = {"messages": messages, "tools": tools}
  with pytest.raises(Unusable, match=reason):
    processor_for(ours, row)(row)


def test_tools_may_be_json_text_and_have_their_own_template(load):
  ours, theirs = load(TEMPLATES["tools"])
  rows = [{"messages": CALLS, "tools": tools} for tools in (TOOLS, str(TOOLS).replace("'", '"'))]
  first, second = (processor_for(ours, row)(row) for row in rows)
  assert np.array_equal(first.tokens, second.tokens)
  named, theirs = load(
    [
      {"name": "default", "template": unmarked(TEMPLATES["phi3"])},
      {"name": "tool_use", "template": unmarked(TEMPLATES["tools"])},
    ]
  )
  for tools in (None, TOOLS):
    messages = CALLS if tools else turns("a", "b")
    ids, _ = encode_chat(named, chat.render(named, messages, tools))
    expected = theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert ids.tolist() == expected


def test_markers_are_found_if_a_template_requires_a_system_turn(load):
  template = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + unmarked(TEMPLATES["phi3"])
  )
  ours, _ = load(template)
  assert {"<|user|>", "<|end|>"} <= set(ours.control_tokens)
  assert ours.token_id("<|end|>") in ours.stop_ids


def test_reasoning_is_rendered_under_every_key(load):
  template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
  )
  ours, theirs = load(template)
  for name in ("reasoning_content", "thinking", "reasoning"):
    messages = turns("a", "b")
    messages[1][name] = "because"
    ids, _ = encode_chat(ours, chat.render(ours, messages))
    assert ids.tolist() == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_a_template_that_marks_whole_conversations_causes_one_warning(load, caplog):
  whole = "{% generation %}" + unmarked(TEMPLATES["phi3"]) + "{% endgeneration %}"
  for template, count in ((TEMPLATES["phi3"], 0), (whole, 1)):
    row = {"messages": turns("a", "b")}
    processor = processor_for(load(template)[0], row)
    for _ in range(2):
      processor(row)
    assert sum("whole conversations" in r.getMessage() for r in caplog.records) == count
  assert processor(row).loss.all()
