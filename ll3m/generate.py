"""Generates text that continues prompts.

python -m ll3m.generate --checkpoint=PATH|hf::DIR --prompt="The capital of France is" --stream
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ll3m.core import distributed, flags, options, sharding
from ll3m.core.dtypes import COMPUTED, DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.data.config import TokenizerConfig
from ll3m.data.row_files import read_prompts
from ll3m.data.skipped_examples import Unusable, require_unicode
from ll3m.models.transformer import make_model
from ll3m.training.logger import say


@dataclasses.dataclass(frozen=True)
class GenerateConfig(options.VerifyConfig):
  """Flags of the command, without those of the tokenizer and the processes."""

  checkpoint: str | None = options.option(
    None, "hf::DIR, converted folder, output_dir of a run, or step folder of a run."
  )
  prompt: str | None = options.option(None, "Text to continue.")
  prompt_file: str | None = options.option(
    None,
    "File or glob of prompts: text with one prompt per line, or rows (.jsonl, .json, .csv, .tsv, "
    '.parquet) with a field "prompt"; also .gz and .zst. Blank lines are skipped. Prompt i, '
    "counted from 0, uses seed + i.",
  )
  chat: bool = options.option(
    False, "Treat each prompt as a user's message and apply the tokenizer's chat template."
  )
  max_new_tokens: int = options.option(128, "Maximum number of new tokens per prompt.")
  temperature: float = options.option(
    0.0, "Divisor of the logits; 0 selects the most likely token."
  )
  top_k: int = options.option(0, "Number of most likely tokens to sample from; 0 for all.")
  top_p: float = options.option(
    1.0, "Probability mass of the most likely tokens to sample from; 1 for all."
  )
  seed: int = options.option(0, "Random seed for sampling; unused if the temperature is 0.")
  stream: bool = options.option(
    False, "Show the continuation of a single prompt as it is generated."
  )
  json: bool = options.option(
    False,
    "Print a line of JSON per prompt: prompt, completion, number of tokens, and whether the text "
    "ended by itself.",
  )
  batch_size: int = options.option(8, "Number of prompts of a file that are continued together.")
  dtype: str = options.option(
    "f32", "Dtype of parameters, activations and cache.", choices=COMPUTED
  )
  mesh_dim: str | None = options.option(
    None,
    "Sizes of the mesh axes dp,fsdp,mp over all devices, as in training, e.g. 1,1,-1 or mp:-1; "
    "one device by default.",
  )

  def __post_init__(self):
    options.require(self, "checkpoint")
    if (self.prompt is None) == (self.prompt_file is None):
      raise ValueError("give either `prompt` or `prompt_file`")
    if self.stream and (self.prompt is None or self.json):
      raise ValueError("`stream` requires a single `prompt` and cannot be combined with `json`")
    if self.mesh_dim is not None:
      sharding.parse_mesh_dim(self.mesh_dim)
    if self.batch_size < 1:
      raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
    if not 0 <= self.seed < 2**31:
      raise ValueError(f"`seed` must be within 0..{2**31 - 1}, got {self.seed}")


FLAG_GROUPS = {
  "": GenerateConfig,
  "tokenizer": TokenizerConfig,
  "jax_distributed": distributed.DistributedConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Generates text on one or several hosts; process 0 prints.

  See `flags.call` for `argv` and the returned exit code.
  """
  return flags.call(_generate, FLAG_GROUPS, argv, doc=__doc__)


def _generate(given: flags.Flags) -> None:
  """Performs all checks that need no weights, loads the weights, and generates.

  Raises:
    ValueError: The request or the model's files are invalid.
  """
  from ll3m.data.tokenizer import load_tokenizer
  from ll3m.decoding.engine import Engine, check_request
  from ll3m.decoding.generation import complete
  from ll3m.decoding.sampling import Sampling
  from ll3m.hf.model_source import open_source

  config = given[""]
  sampling = Sampling(config.temperature, config.top_k, config.top_p)
  texts = _read_prompts(config)
  source = open_source(config.checkpoint, verify=config.verify)
  tokenizer = load_tokenizer(
    given["tokenizer"],
    checkpoint_dir=source.tokenizer_dir,
    source_dir=source.source_dir,
    family=source.family,
    embedding_size=source.config.vocab_size,
  )
  prompts = [_encode(tokenizer, text, config.chat) for text in texts]
  check_request(source.config, prompts, config.max_new_tokens)

  dtype = DTYPES[config.dtype]
  mesh, shardings = _placement(config, source.config)
  engine = Engine(
    source.config,
    source.load_params(dtype=dtype, shardings=shardings),
    num_tokens=tokenizer.vocab_size,
    dtype=dtype,
    mesh=mesh,
  )
  timer = _Timer()
  for start in range(0, len(prompts), config.batch_size):
    batch = slice(start, start + config.batch_size)
    rows = complete(
      engine,
      tokenizer,
      prompts[batch],
      max_new_tokens=config.max_new_tokens,
      sampling=sampling,
      seeds=[config.seed + row for row in range(len(prompts))[batch]],
      on_text=_show if config.stream else lambda text: None,
      watch=timer.watch,
    )
    for text, (completion, tokens, ended) in zip(texts[batch], rows, strict=True):
      if config.json:
        record = {"prompt": text, "completion": completion, "tokens": len(tokens), "ended": ended}
        print(json.dumps(record, ensure_ascii=False))
      elif config.prompt_file:
        print(f"> {text}\n{completion}\n")
      elif config.stream:
        print()
      else:
        print(completion)
  sys.stdout.flush()
  say(timer.report())


def _placement(config: GenerateConfig, model: ModelConfig) -> tuple[Mesh | None, dict | None]:
  """Returns the mesh and the parameters' shardings; None for a single device."""
  if config.mesh_dim is None:
    return None, None
  mesh = sharding.make_mesh(config.mesh_dim)
  shapes = jax.eval_shape(make_model(model).init, jax.random.key(0))
  for text in sharding.unsplit(shapes, mesh):
    say(f"not split: {text}")
  return mesh, sharding.parameter_shardings(shapes, mesh)


def _read_prompts(config: GenerateConfig) -> list[str]:
  if config.prompt_file is None:
    prompts = [("`prompt`", config.prompt)]
  else:
    prompts = read_prompts(config.prompt_file, "prompt_file")
  for where, text in prompts:
    if not text:
      raise ValueError(f"{where}: expected a prompt, got an empty text")
    try:
      require_unicode(text)
    except Unusable as reason:
      raise ValueError(f"{where}: {reason}, got {text[:80]!a}") from reason
  return [text for _, text in prompts]


def _encode(tokenizer: Any, text: str, is_chat: bool) -> list[int]:
  """Tokenises a prompt; control tokens in it are treated as plain text."""
  if not is_chat:
    return [*tokenizer.prefix, *tokenizer.encode(text)]
  from ll3m.data.chat import encode_prompt

  return encode_prompt(tokenizer, [{"role": "user", "content": text}])


def _show(text: str) -> None:
  print(text, end="", flush=True)


class _Timer:
  """Timer of decoding steps, apart from each batch's first, which prefills and may compile."""

  def __init__(self):
    self._waited = self._seconds = 0.0
    self._tokens = self._later_tokens = 0

  def watch(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
    """Yields the steps of a batch and measures their durations."""
    start = time.perf_counter()
    for number, step in enumerate(steps):
      now = time.perf_counter()
      count = sum(token is not None for token in step)
      self._tokens += count
      if number == 0:
        self._waited += now - start
      else:
        self._seconds += now - start
        self._later_tokens += count
      yield step
      start = time.perf_counter()

  def report(self) -> str:
    """Returns the final report."""
    text = f"{self._tokens} tokens; first after {self._waited:.1f} s, including compilation"
    if self._later_tokens:
      text += f", then {self._later_tokens / self._seconds:.1f} tokens/s"
    return text


if __name__ == "__main__":
  sys.exit(main())
