"""The chat templates of published models: what they render, and which part of it is trained.

The expected texts are written by hand, with `[[` and `]]` around what is trained; the ids are those
of transformers.
"""

import datetime
import re
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken

from ll3m.data import chat
from ll3m.data.config import TokenizerConfig
from ll3m.data.skipped_examples import Unusable
from ll3m.data.tokenizer import load_tokenizer
from tests.data import tokenizer_folders as folders
from tests.data.opening import encode_chat, processor_for
from tests.data.test_chat_parity import turns

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"

# BOS, EOS and the other added tokens of the models.
TOKENS = {
  "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
  "qwen2": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
  "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"),
  "gemma2": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
  "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
  "phi3": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
  "phi4": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"),
  "phi4_mini": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
  "smollm3": ("<|begin_of_text|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"),
  "olmo2": ("<|endoftext|>", "<|endoftext|>"),
}

TODAY = datetime.datetime.now().strftime("%d %b %Y")
TWO = turns("Hi", "Hello.", "And?", " Bye. ")
SYSTEM = turns("Hi", "Hello.", system="Be brief.")
THOUGHT = turns(
  "Hi", "<think>\nA greeting.\n</think>\n\nHello.", "And?", "<think>\nThe end.\n</think>\n\nBye."
)
NO_THOUGHT = turns("Hi", "Hello.", system="Be brief. /no_think")

LLAMA3 = (
  "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
  f"Cutting Knowledge Date: December 2023\nToday Date: {TODAY}\n\n"
)
QWEN2 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM3 = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: "
EXPECTED = [
  ("llama3", TWO, LLAMA3 + "<|eot_id|>"
   "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
   "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello.<|eot_id|>]]"
   "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
   "<|start_header_id|>assistant<|end_header_id|>\n\n[[Bye.<|eot_id|>]]"),
  ("llama3", SYSTEM, LLAMA3 + "Be brief.<|eot_id|>"
   "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
   "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello.<|eot_id|>]]"),
  ("qwen2", TWO, f"<|im_start|>system\n{QWEN2}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
   "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\nAnd?<|im_end|>\n"
   "<|im_start|>assistant\n[[ Bye. <|im_end|>]]\n"),
  ("qwen2", SYSTEM, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
   "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"),
  ("qwen3", TWO, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"
   "<|im_start|>user\nAnd?<|im_end|>\n"
   "<|im_start|>assistant\n[[<think>\n\n</think>\n\n Bye. <|im_end|>]]\n"),
  ("qwen3", THOUGHT, "<|im_start|>user\nHi<|im_end|>\n"
   "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\nAnd?<|im_end|>\n"
   "<|im_start|>assistant\n[[<think>\nThe end.\n</think>\n\nBye.<|im_end|>]]\n"),
  ("gemma2", TWO, "<bos><start_of_turn>user\nHi<end_of_turn>\n"
   "<start_of_turn>model\n[[Hello.<end_of_turn>]]\n<start_of_turn>user\nAnd?<end_of_turn>\n"
   "<start_of_turn>model\n[[Bye.<end_of_turn>]]\n"),
  ("gemma3", TWO, "<bos><start_of_turn>user\nHi<end_of_turn>\n"
   "<start_of_turn>model\n[[Hello.<end_of_turn>]]\n<start_of_turn>user\nAnd?<end_of_turn>\n"
   "<start_of_turn>model\n[[Bye.<end_of_turn>]]\n"),
  ("gemma3", SYSTEM, "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
   "<start_of_turn>model\n[[Hello.<end_of_turn>]]\n"),
  ("phi3", TWO, "<|user|>\nHi<|end|>\n<|assistant|>\n[[Hello.<|end|>]]\n"
   "<|user|>\nAnd?<|end|>\n<|assistant|>\n[[ Bye. <|end|>]]\n<|endoftext|>"),
  ("phi3", SYSTEM, "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n"
   "<|assistant|>\n[[Hello.<|end|>]]\n<|endoftext|>"),
  ("phi4", TWO, "<|im_start|>user<|im_sep|>Hi<|im_end|>"
   "<|im_start|>assistant<|im_sep|>[[Hello.<|im_end|>]]<|im_start|>user<|im_sep|>And?<|im_end|>"
   "<|im_start|>assistant<|im_sep|>[[ Bye. <|im_end|>]]"),
  ("phi4_mini", TWO, "<|user|>Hi<|end|><|assistant|>[[Hello.<|end|>]]"
   "<|user|>And?<|end|><|assistant|>[[ Bye. <|end|>]]<|endoftext|>"),
  ("smollm3", TWO, None),
  ("smollm3", NO_THOUGHT, f"{SMOLLM3}/no_think\n\n## Custom Instructions\n\nBe brief.\n\n"
   "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
   "<|im_start|>assistant\n<think>\n\n</think>\n[[Hello.<|im_end|>]]\n"),
  ("olmo2", TWO, "<|endoftext|><|user|>\nHi\n<|assistant|>\n[[Hello.<|endoftext|>]]\n"
   "<|user|>\nAnd?\n<|assistant|>\n[[ Bye. <|endoftext|>]]"),
  ("olmo2", SYSTEM, "<|endoftext|><|system|>\nBe brief.\n<|user|>\nHi\n"
   "<|assistant|>\n[[Hello.<|endoftext|>]]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  def load(name):
    bos, eos, *others = TOKENS[name]
    encoder = folders.train_byte_level(sorted({bos, eos}))
    encoder.add_tokens([AddedToken(token, normalized=False) for token in others])
    folder = folders.write(
      tmp_path_factory.mktemp(name), encoder,
      {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
       "chat_template": (TEMPLATES / f"{name}.jinja").read_text()},
    )  # fmt: skip
    ours = load_tokenizer(TokenizerConfig(path=str(folder)))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)

  return load


@pytest.mark.parametrize(("name", "messages", "marked"), EXPECTED)
def test_what_is_rendered_and_what_is_trained(load, name, messages, marked):
  ours, theirs = load(name)
  ids, loss = encode_chat(ours, chat.render(ours, messages))
  assert ids.tolist() == theirs.apply_chat_template(messages)["input_ids"]
  text = ours.decode(ids, keep_control=True)
  if marked is None:  # a system message of 1,300 characters
    text, marked = text[text.index("<|im_end|>") :], (
      "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"
      "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[ Bye. <|im_end|>]]\n"
    )  # fmt: skip
  assert text == re.sub(r"\[\[|\]\]", "", marked)
  trained = "".join(re.findall(r"\[\[(.*?)\]\]", marked, re.DOTALL))
  assert ours.decode(ids[loss == 1], keep_control=True) == trained


@pytest.mark.parametrize("name", TOKENS)
def test_a_prompt_equals_that_of_transformers(load, name):
  ours, theirs = load(name)
  prompt = theirs.apply_chat_template(TWO[:3], add_generation_prompt=True)["input_ids"]
  assert chat.encode_prompt(ours, TWO[:3]) == prompt
  ids, loss = encode_chat(ours, chat.render(ours, TWO[:2]))
  assert ids[loss == 1][-1] in ours.stop_ids  # a model stops where it was trained to


def test_a_refused_system_turn_is_reported(load):
  ours, _ = load("gemma2")
  row = {"messages": SYSTEM}
  with pytest.raises(Unusable, match="template refuses the messages: System role not supported"):
    processor_for(ours, row)(row)


def test_an_earlier_answer_that_is_replaced_is_refused(load):
  ours, _ = load("qwen3")
  template = ours.chat_templates["default"]
  # The first of two branches is that of the last answer, the second that of earlier ones.
  kept, _, rest = template.rpartition("message.role + '\\n' + content }}")
  ours.chat_templates["default"] = f"{kept}message.role + '\\nomitted' }}}}{rest}"
  with pytest.raises(ValueError, match="rewrites earlier turns"):
    chat.render(ours, TWO)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_answers_that_call_functions_are_trained_in_earlier_turns_too(load, name):
  ours, theirs = load(name)
  messages = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
  ]
  ids, loss = encode_chat(ours, chat.render(ours, messages, TOOLS))
  assert ids.tolist() == theirs.apply_chat_template(messages, tools=TOOLS)["input_ids"]
  call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
  thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
  assert ours.decode(ids[loss == 1], keep_control=True) == f"{call}{thought}It is 4.<|im_end|>"
