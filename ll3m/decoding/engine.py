"""Generates text for batches of prompts, token by token.

Dimensions: B batch, T prompt length, C cache length.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ll3m.core.model_config import ModelConfig
from ll3m.core.sharding import replicated
from ll3m.decoding.decode_params import joins, place_weights, unstack
from ll3m.decoding.decoder import make_decoder
from ll3m.decoding.sampling import Sampling, sample
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.transformer import Params

# Every new length of prompt or cache is compiled anew, so lengths are rounded up to a power of two,
# and to at least this.
_SMALLEST_LENGTH = 16

GREEDY = Sampling()


class Engine:
  """Generator for one model and any number of batches."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    num_tokens: int | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
  ):
    """Copies the parameters into the form for decoding; the given ones are not kept.

    Args:
      config: The architecture.
      params: The parameters, stacked over layers as in `models.transformer.make_model`.
      num_tokens: Number of tokens in the tokenizer. Ids from `num_tokens` on are padding and never
        generated. None if the vocabulary has no padding.
      dtype: The dtype of parameters, activations and cache.
      mesh: The mesh to shard them over, as in training; None for the parameters' own devices.

    Raises:
      ValueError: `num_tokens` exceeds the vocabulary.
    """
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    if not 0 < num_tokens <= config.vocab_size:
      raise ValueError(
        f"num_tokens must be at least 1 and at most the vocabulary size {config.vocab_size}, got "
        f"{num_tokens}"
      )
    self._config = config
    kernels = DEFAULT_KERNELS if mesh is None else Kernels.on(mesh)
    self._row_shards = 1 if mesh is None else kernels.sharding.batch_shards
    self._weights = unstack(config, params, dtype, joined=joins(kernels))
    if mesh is not None:
      self._weights = place_weights(self._weights, mesh)
    self._decoder = make_decoder(config, dtype=dtype, kernels=kernels)

    def choose(ends, hidden, seeds, positions, sampling):
      logits = self._decoder.logits(ends, hidden)
      real = jnp.arange(config.vocab_size) < num_tokens
      tokens = sample(jnp.where(real[None], logits, -jnp.inf), seeds, positions, sampling)
      # Every process reads all tokens.
      return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, replicated(mesh))

    self._choose = jax.jit(choose, static_argnames="sampling")

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
  ) -> Iterator[list[int | None]]:
    """Generates token by token.

    Args:
      prompts: The token ids of each row.
      max_new_tokens: The maximum number of new tokens per row.
      sampling: The sampling settings.
      seeds: The seed of each row, 0 <= seed < 2**32; by default the row's index. A prompt with the
        same seed gives the same tokens in any batch. (Not so for models with two sets of rotary
        frequencies, such as Phi-3: the long ones are used if the longest row may need them.)
      stop_tokens: The ids that end a row.

    Returns:
      An iterator over steps. Each step has one token per row, or None for a row that has ended. A
      stop token is the last token of its row.

    Raises:
      ValueError: The model cannot serve the request.
    """
    check_request(self._config, prompts, max_new_tokens)
    seeds = list(range(len(prompts)) if seeds is None else seeds)
    if len(seeds) != len(prompts) or not all(0 <= seed < 2**32 for seed in seeds):
      raise ValueError(f"expected {len(prompts)} seeds in 0..{2**32 - 1}, got {seeds}")
    return self._steps(prompts, max_new_tokens, sampling, seeds, frozenset(stop_tokens))

  def _steps(self, prompts, max_new_tokens, sampling, seeds, stop_tokens):
    running = [True] * len(prompts)
    # Repeat the last row until the number of rows divides over the devices.
    missing = -len(prompts) % self._row_shards
    prompts, seeds = [*prompts, *prompts[-1:] * missing], [*seeds, *seeds[-1:] * missing]
    length = bucket(max(len(prompt) for prompt in prompts))
    padded = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
      row[length - len(prompt) :] = prompt
    starts = np.array([length - len(prompt) for prompt in prompts], np.int32)
    seeds = np.array(seeds, np.uint32)
    # The last token is not fed back, so it needs no slot.
    columns = bucket(length + max_new_tokens - 1)
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens - 1
    is_long = longest > (self._config.rope_original_positions or longest)

    def choose(hidden, column):
      return self._choose(self._weights.ends, hidden, seeds, column - starts, sampling=sampling)

    hidden, cache = self._decoder.prefill(self._weights, padded, starts, columns, is_long)
    tokens = choose(hidden, length)
    for column in range(length, length + max_new_tokens):
      current = tokens
      if column + 1 < length + max_new_tokens:
        # Dispatched before the host reads the current tokens; wasted if these end all rows.
        hidden, cache = self._decoder.step(
          self._weights, cache, current, np.int32(column), starts, is_long
        )
        tokens = choose(hidden, column + 1)
      row_tokens = np.asarray(current)[: len(running)].tolist()
      yield [token if run else None for token, run in zip(row_tokens, running, strict=True)]
      running = [
        run and token not in stop_tokens for token, run in zip(row_tokens, running, strict=True)
      ]
      if not any(running):
        return

  def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Generates whole continuations.

    Args:
      prompts: The token ids of each row.
      **options: Keyword arguments of `stream`.

    Returns:
      The new tokens of each row, including the stop token, if any.

    Raises:
      ValueError: The model cannot serve the request.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for step in self.stream(prompts, **options):
      for row, token in zip(rows, step, strict=True):
        if token is not None:
          row.append(token)
    return rows


def check_request(
  config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
  """Checks, without any weights, that a model can serve a batch.

  Args:
    config: The architecture.
    prompts: The token ids of each row.
    max_new_tokens: The maximum number of new tokens per row.

  Raises:
    ValueError: There is no prompt, a prompt is empty or has unknown tokens, or a row would have
      more tokens than the model has positions.
  """
  if max_new_tokens < 1:
    raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
  if not prompts:
    raise ValueError("expected at least one prompt, got none")
  for number, prompt in enumerate(prompts, start=1):
    if not prompt:
      raise ValueError(f"prompt {number} is empty; expected at least one token")
    if len(prompt) + max_new_tokens > config.max_positions:
      raise ValueError(
        f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new tokens this exceeds "
        f"the {config.max_positions} positions of the model"
      )
    if not (min(prompt) >= 0 and max(prompt) < config.vocab_size):
      raise ValueError(
        f"prompt {number} has tokens from {min(prompt)} to {max(prompt)}, but the model's "
        f"vocabulary is 0..{config.vocab_size - 1}"
      )


def bucket(length: int) -> int:
  """Returns a length rounded up to one for which programs are compiled."""
  return max(_SMALLEST_LENGTH, 1 << (length - 1).bit_length())
