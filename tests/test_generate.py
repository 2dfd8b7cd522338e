"""The generate command on a tiny published folder with a byte-level tokenizer."""

import functools
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m.data import chat
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.decoding.engine import Engine
from ll3m.decoding.sampling import Sampling
from ll3m.families import get_preset
from ll3m.families.tensor_rules import expected_tensors
from ll3m.hf.model_source import open_source
from tests.calling import call

FAMILY, PRESET = get_preset("mistral_7b")
CONFIG = PRESET.replace(
  vocab_size=264, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
  max_positions=96, sliding_window=12,
)  # fmt: skip
TEMPLATE = (
  "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}"
  "</s>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = ["Once upon", "a", "naïve 日本"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
  path = tmp_path_factory.mktemp("published")
  shutil.copytree(byte_tokenizer, path, dirs_exist_ok=True)
  settings = json.loads((path / "tokenizer_config.json").read_text())
  (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
  (path / "config.json").write_text(json.dumps(FAMILY.to_hf_config(CONFIG)))
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10]}))
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(0, 0.5, spec.shape).astype(np.float32)
    for name, spec in expected_tensors(FAMILY.rules, CONFIG).items()
  }
  save_file(tensors, path / "model.safetensors")
  return path


@pytest.fixture(scope="module")
def tokenizer(folder):
  return load_tokenizer(TokenizerConfig(), checkpoint_dir=folder)


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
  """A function that returns the engine's continuations; tests/decoding tests the engine."""
  engine = Engine(CONFIG, open_source(f"hf::{folder}").load_params(), num_tokens=258)

  def generate(prompts, **options):
    rows = engine.generate(prompts, stop_tokens={257, 10}, **options)
    return [tokenizer.decode(row) for row in rows]

  return generate


@pytest.fixture
def generate(folder):
  return functools.partial(call, "generate", f"--checkpoint=hf::{folder}")


def test_streams_a_single_prompt(generate, expected, tokenizer):
  done = generate("--prompt=Once upon", "--max_new_tokens=30", "--stream")
  assert done.returncode == 0, done.stderr
  prompt = [*tokenizer.prefix, *tokenizer.encode("Once upon")]
  assert done.stdout == expected([prompt], max_new_tokens=30)[0] + "\n"
  assert done.stderr.splitlines()[-1].endswith("tokens/s")


def test_continues_a_file_of_prompts_in_batches(generate, expected, tokenizer, tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
  done = generate(
    f"--prompt_file={file}", "--json", "--batch_size=2", "--max_new_tokens=12",
    "--temperature=0.8", "--top_p=0.9", "--seed=7",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in done.stdout.splitlines()]
  assert [record["prompt"] for record in records] == PROMPTS
  tokens = [[*tokenizer.prefix, *tokenizer.encode(prompt)] for prompt in PROMPTS]
  want = expected(tokens, max_new_tokens=12, sampling=Sampling(0.8, top_p=0.9), seeds=[7, 8, 9])
  assert [record["completion"] for record in records] == want
  assert all(record["tokens"] == 12 or record["ended"] for record in records)


def test_chat_uses_the_template_and_stops_at_its_end(generate, expected, tokenizer):
  done = generate("--prompt=hello </s>", "--chat", "--max_new_tokens=20")
  assert done.returncode == 0, done.stderr
  prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": "hello </s>"}])
  assert tokenizer.decode(prompt, keep_control=True) == "user:hello </s>\nassistant:"
  assert tokenizer.eos_id not in prompt
  assert done.stdout == expected([prompt], max_new_tokens=20)[0] + "\n"


def test_generates_in_bfloat16(generate):
  done = generate("--prompt=a", "--dtype=bf16", "--max_new_tokens=3")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--prompt="], "error: --prompt: expected a prompt, got an empty text"),
    ([b"--prompt=a\xffb"], r"error: --prompt: not Unicode text, got 'a\udcffb'"),
    ([], "error: give either --prompt or --prompt_file"),
    (["--prompt=a", "--top_p=1.5", "--temperature=1"], "top_p must be above 0 and at most 1"),
    (["--prompt=a", "--temperature=nan"], "temperature must be a finite number, at least 0"),
    (["--prompt=a", "--max_new_tokens=-1"], "max_new_tokens must be at least 1, got -1"),
    (
      ["--prompt=" + "a" * 80, "--max_new_tokens=20"],
      "prompt 1 has 80 tokens; with 20 new tokens this exceeds the 96 positions",
    ),
    (["--prompt=a", "--max_new_token=3"], "did you mean --max_new_tokens?"),
    (
      ["--prompt=a", "--max_new_tokens=1", "--mesh_dim=3,1,1"],
      "error: --mesh_dim=3,1,1 needs 3 devices, there are",
    ),
    (["--prompt_file=/nowhere"], "error: --prompt_file: no file matches '/nowhere'"),
  ],
)
def test_invalid_input_gives_an_error_of_one_sentence(generate, folder, arguments, sentence):
  done = generate(*arguments)
  about_a_flag = "--" in sentence or "must be" in sentence
  assert done.returncode == (2 if about_a_flag else 1)
  assert not done.stdout
  assert "Traceback" not in done.stderr
  assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    (
      "p.jsonl",
      b'{"prompt": "a"}\n{"prompt": "\\ud800"}',
      r"p.jsonl:2: not Unicode text, got",
    ),
    ("p.jsonl", b'{"text": "a"}', 'p.jsonl:1: expected {"prompt": "..."}'),
    ("p.txt", b"a\n\xff", "p.txt:2: not UTF-8 text"),
    ("p.txt", b"\n", "p.txt holds no prompt"),
  ],
)
def test_rejects_files_without_valid_prompts(generate, tmp_path, name, content, sentence):
  (tmp_path / name).write_bytes(content)
  done = generate(f"--prompt_file={tmp_path / name}")
  assert done.returncode == 1
  assert sentence in done.stderr.splitlines()[-1]
