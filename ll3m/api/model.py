"""A language model as one object, with methods to compute logits, generate, save and export."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ll3m.core import checkpoint
from ll3m.core.model_config import ModelConfig
from ll3m.core.model_folder import save_model
from ll3m.data import chat
from ll3m.data.tokenizer import Tokenizer
from ll3m.decoding.engine import Engine
from ll3m.decoding.generation import complete, stream_text
from ll3m.decoding.sampling import Sampling
from ll3m.models import transformer
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.transformer import Params

# A prompt, or a conversation: [{"role": "user", "content": "..."}, ...].
Prompt = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model: its architecture, parameters and tokenizer.

  Attributes:
    config: The architecture.
    params: The parameters {"module": {"name": array}}, with a leading layer axis.
    tokenizer: The tokenizer; None if the model has none.
    family: The name of the family, such as "llama".
    dtype: The dtype of activations; parameters are cast to it at each use.
    remat: What the backward pass recomputes instead of storing it: "nothing", "dots", "attention"
      or "full".
    mesh: The devices over which parameters and batches are sharded; None for one device.
    source_files: The contents of the published config.json and generation_config.json, by file
      name; saved and exported with the model.
  """

  config: ModelConfig
  params: Params
  tokenizer: Tokenizer | None
  family: str
  dtype: Any = jnp.float32
  remat: str = "nothing"
  mesh: Mesh | None = None
  source_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

  def replace(self, **changes: Any) -> "Model":
    """Returns the model with some of its attributes replaced."""
    return dataclasses.replace(self, **changes)

  @functools.cached_property
  def decoder(self) -> transformer.Model:
    """The pure functions of the architecture, which take parameters as an argument."""
    kernels = DEFAULT_KERNELS if self.mesh is None else Kernels.on(self.mesh)
    return transformer.make_model(self.config, dtype=self.dtype, remat=self.remat, kernels=kernels)

  @functools.cached_property
  def _logits(self) -> Any:
    def logits(params, tokens, segment_ids):
      hidden = self.decoder.hidden(params, tokens, segment_ids=segment_ids)
      return self.decoder.logits(params, hidden)

    return jax.jit(logits)

  def logits(
    self, tokens: Int[Any, "B T"], segment_ids: Int[Any, "B T"] | None = None
  ) -> Float[Array, "B T V"]:
    """Returns the float32 logits of the next token after each token.

    Args:
      tokens: The token ids; for a single text, `[model.tokenizer("...")]`.
      segment_ids: The number of each token's document, from 1; 0 is padding. Tokens attend only to
        their own document. None for one document per row.
    """
    return self._logits(self.params, jnp.asarray(tokens, jnp.int32), segment_ids)

  @functools.cached_property
  def _engine(self) -> Engine:
    tokenizer = self._require_tokenizer()
    return Engine(
      self.config,
      self.params,
      num_tokens=tokenizer.vocab_size,
      dtype=self.dtype,
      mesh=self.mesh,
    )

  @overload
  def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
  @overload
  def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any) -> str: ...
  @overload
  def generate(
    self, prompt: list[str], *, stream: Literal[False] = False, **options: Any
  ) -> list[str]: ...
  def generate(
    self,
    prompt: Prompt | list[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
  ) -> str | list[str] | Iterator[str]:
    """Continues a text, several texts, or a conversation.

    The first call copies the parameters into a form for decoding, in `dtype`, and keeps the copy,
    which takes as much memory as the model.

    Args:
      prompt: A text, a list of texts, or a conversation (a list of messages) to answer with the
        tokenizer's chat template. Control tokens in prompts are treated as plain text.
      max_new_tokens: Maximum number of new tokens per prompt.
      temperature: Divisor of the logits; 0 selects the most likely token.
      top_k: Number of most likely tokens to sample from; 0 for all.
      top_p: Probability mass of the most likely tokens to sample from; 1 for all.
      seed: Random seed for sampling; prompt i of several uses seed + i.
      stream: Whether to return an iterator over pieces of the text, for a single prompt.

    Returns:
      The new text without the prompt. A list of texts if `prompt` is a list of texts, or an
      iterator if `stream` is set.

    Raises:
      ValueError: The model has no tokenizer, its tokenizer has no chat template, or the model
        cannot serve the request.
    """
    tokenizer = self._require_tokenizer()
    several = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    prompts = list(prompt) if several else [prompt]
    if stream and several:
      raise ValueError("stream=True requires a single prompt, got a list of texts")
    ids = [
      tokenizer(text) if isinstance(text, str) else chat.encode_prompt(tokenizer, list(text))
      for text in prompts
    ]
    options = {
      "max_new_tokens": max_new_tokens,
      "sampling": Sampling(temperature, top_k, top_p),
      "seeds": [seed + row for row in range(len(prompts))],
    }
    if stream:
      pieces = stream_text(self._engine, tokenizer, ids, **options)
      return (piece.text for piece in pieces if piece.text)
    texts = [done.text for done in complete(self._engine, tokenizer, ids, **options)]
    return texts if several else texts[0]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Saves the model to a folder that `load` and every command's --checkpoint accept.

    An interrupted save leaves a folder that is recognised as incomplete.

    Args:
      folder: A new or empty folder, local or gs://.

    Raises:
      ValueError: The folder is not empty, or there is too little space.
    """
    save_model(
      folder,
      self.params,
      family=self.family,
      config=self.config,
      files={
        checkpoint.TOKENIZER: {} if self.tokenizer is None else self.tokenizer.files(),
        checkpoint.SOURCE: self.source_files,
      },
    )

  def export_hf(self, folder: str | os.PathLike[str], *, dtype: Any = None) -> None:
    """Exports the model as a Hugging Face folder, which transformers loads.

    Args:
      folder: A new or empty folder on a local disk.
      dtype: The dtype of every tensor; None keeps each tensor's own.

    Raises:
      ValueError: The folder is not empty, or a value does not fit the dtype.
    """
    from ll3m.hf.exporting import export_model

    export_model(
      {f"{m}/{name}": array for m, arrays in self.params.items() for name, array in arrays.items()},
      folder,
      family=self.family,
      config=self.config,
      tokenizer=self.tokenizer,
      tokenizer_files={} if self.tokenizer is None else self.tokenizer.files(),
      config_files=self.source_files,
      dtype=None if dtype is None else np.dtype(dtype),
    )

  def _require_tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ValueError("the model has no tokenizer; load it with tokenizer=PATH")
    return self.tokenizer
