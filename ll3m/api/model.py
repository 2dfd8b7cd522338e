"""A language model in one object: load it, call it, generate with it, save it."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ll3m import families
from ll3m.core import checkpoint, sharding
from ll3m.core.config import ModelConfig
from ll3m.core.dtypes import DTYPES
from ll3m.core.saving import save_model
from ll3m.data import chat
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import Tokenizer, load_tokenizer
from ll3m.decoding.engine import Engine
from ll3m.decoding.generation import complete, stream_text
from ll3m.decoding.sampling import Sampling
from ll3m.hf.model_files import HfModel, open_model
from ll3m.hf.sources import load_published, open_source
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
    params: The parameters: {"module": {"name": array}}, with a leading axis of layers.
    tokenizer: The tokenizer; None if none came with the model.
    family: The name of its family, as "llama".
    dtype: The dtype of activations; parameters are cast to it where they are used.
    remat: What the backward pass computes again instead of keeping it: "nothing", "dots",
      "attention" or "full".
    mesh: The devices over which parameters and batches are split; None for one device.
    source_files: The contents of the config.json and generation_config.json that the model was
      published with, by name; they travel with it.
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
    """Returns the logits of the next token after each token, float32.

    Args:
      tokens: Token ids; of a single text, `[model.tokenizer("...")]`.
      segment_ids: The document that each token belongs to, from 1; 0 is padding. Tokens see only
        their own document. None for one document in each row.
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

    The first call prepares the parameters for decoding and keeps them so, in `dtype`: that takes as
    much memory again as the model.

    Args:
      prompt: A text, a list of texts, or a conversation (a list of messages) to answer through the
        tokenizer's chat template. Control tokens in it are plain text.
      max_new_tokens: The most tokens to generate for each prompt.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Draw from this many of the most likely tokens; 0 draws from all.
      top_p: Draw from the most likely tokens that have this probability together.
      seed: Seed of the draws; prompt i of several draws with seed + i.
      stream: Return an iterator over pieces of the text of a single prompt, as they come.

    Returns:
      The new text, without the prompt; a list of them for a list of texts; an iterator with
      `stream`.

    Raises:
      ValueError: the model has no tokenizer, its tokenizer no chat template, or the request does
        not fit the model.
    """
    tokenizer = self._require_tokenizer()
    several = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    prompts = list(prompt) if several else [prompt]
    if stream and several:
      raise ValueError("stream=True continues a single prompt, got a list of them")
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
    """Saves the model as a folder that `load` and every command's --checkpoint take.

    The folder counts as complete only when everything is in it.

    Args:
      folder: A new or empty folder, local or gs://.

    Raises:
      ValueError: the folder already holds something, or there is too little space.
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
      dtype: The dtype to cast every tensor to; as they are by default.

    Raises:
      ValueError: the folder already holds something, or a value does not fit the dtype.
    """
    from ll3m.hf.exporting import export_model

    with tempfile.TemporaryDirectory() as saved:
      self.save(Path(saved) / "model")
      found = checkpoint.open_checkpoint(Path(saved) / "model", verify=False)
      export_model(found, folder, dtype=None if dtype is None else np.dtype(dtype))

  def _require_tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ValueError("the model has no tokenizer: load it with tokenizer=PATH")
    return self.tokenizer


def load(
  path: str | os.PathLike[str],
  *,
  dtype: Any = "float32",
  param_dtype: Any = "float32",
  tokenizer: str | os.PathLike[str] | None = None,
  mesh: str | Mesh | None = None,
  remat: str = "nothing",
  verify: bool = True,
) -> Model:
  """Loads a model.

  Args:
    path: A folder that `Model.save` or ll3m.convert wrote, a run's output_dir (its latest step
      counts), one of its step folders, a Hugging Face folder, or a GGUF file of the Llama
      architecture. `hf::PATH` names a Hugging Face folder too.
    dtype: The dtype of activations: "float32" or "bfloat16".
    param_dtype: The dtype that parameters are kept in; None for that of the files.
    tokenizer: A SentencePiece file or tokenizer folder, instead of the model's own.
    mesh: The devices to split parameters and batches over: a mesh of `ll3m.make_mesh`, or its sizes
      as "dp,fsdp,mp". None for the first device.
    remat: What the backward pass computes again instead of keeping it; see `Model`.
    verify: Whether to compare the files of a folder of ours with their checksums.

  Raises:
    FileNotFoundError: there is nothing at `path`.
    ValueError: it holds no complete model, or a damaged one.
    NotImplementedError: a format or an architecture that is not supported.
  """
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  name = os.fspath(path)
  published = name.startswith("hf::") or _is_published(epath.Path(name))
  options = TokenizerConfig(path=None if tokenizer is None else os.fspath(tokenizer))
  shape_of = functools.partial(_shardings, mesh=mesh)
  dtypes = {"dtype": None if param_dtype is None else _parse_dtype("param_dtype", param_dtype)}
  if published:
    found = open_model(name.removeprefix("hf::"))
    family, config, files = found.family.name, found.config, found.config_files
    params = load_published(found, shardings=shape_of(config), **dtypes)
    own = _tokenizer_of(found, options)
  else:
    source = open_source(name, verify=verify)
    family, config = source.family, source.config
    params = source.load_params(shardings=shape_of(config), **dtypes)
    files = _read_files(source.source_dir)
    own = None
    if source.tokenizer_dir is not None or options.path:
      own = load_tokenizer(
        options,
        checkpoint_dir=source.tokenizer_dir,
        source_dir=source.source_dir,
        embedding_size=config.vocab_size,
      )
  return Model(
    config=config,
    params=params,
    tokenizer=own,
    family=family,
    dtype=_parse_dtype("dtype", dtype),
    remat=remat,
    mesh=mesh,
    source_files=files,
  )


def init(
  config: str | ModelConfig,
  *,
  seed: int = 0,
  tokenizer: str | os.PathLike[str] | None = None,
  family: str | None = None,
  dtype: Any = "float32",
  param_dtype: Any = "float32",
  mesh: str | Mesh | None = None,
  remat: str = "nothing",
  **changes: Any,
) -> Model:
  """Makes a model with random parameters.

  Args:
    config: The name of a published model ("llama2_7b"), or an architecture.
    seed: Seed of the parameters.
    tokenizer: A SentencePiece file or tokenizer folder.
    family: The family of an architecture that is given as a `ModelConfig`.
    dtype: As for `load`.
    param_dtype: The dtype that parameters are kept in.
    mesh: As for `load`.
    remat: As for `load`.
    **changes: Fields of the architecture to replace, as `num_layers=2`.

  Raises:
    ValueError: an unknown name, or a field that makes no sense.
  """
  if isinstance(config, str):
    preset = families.get_preset(config)
    family, config = preset.family.name, preset.config
  if family not in families.FAMILIES:
    raise ValueError(f"family must be one of {', '.join(families.FAMILIES)}, got {family!r}")
  config = config.replace(**changes)
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  wide = _parse_dtype("param_dtype", param_dtype)
  model = Model(
    config=config,
    params={},
    tokenizer=None,
    family=family,
    dtype=_parse_dtype("dtype", dtype),
    remat=remat,
    mesh=mesh,
  )

  def make(key):
    return jax.tree.map(lambda x: x.astype(wide), model.decoder.init(key))

  params = jax.jit(make, out_shardings=_shardings(config, mesh=mesh))(jax.random.key(seed))
  if tokenizer is not None:
    model = model.replace(
      tokenizer=load_tokenizer(
        TokenizerConfig(path=os.fspath(tokenizer)), embedding_size=config.vocab_size
      )
    )
  return model.replace(params=params)


def _parse_dtype(name: str, dtype: Any) -> Any:
  """Returns a JAX dtype: "float32", "bf16" or a type itself.

  Raises:
    ValueError: neither float32, bfloat16 nor float16.
  """
  try:
    found = jnp.dtype(DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype!r}")
  return found


def _is_published(path: epath.Path) -> bool:
  """Whether a path holds a model as it was published, by what is in it."""
  if path.suffix == ".gguf" and not path.is_dir():
    return True
  ours = (checkpoint.MANIFEST, checkpoint.STEPS, checkpoint.META)
  if not path.is_dir() or any((path / name).exists() for name in ours):
    return False
  return (path / "config.json").exists() or any(path.glob("*.gguf"))


def _shardings(config: ModelConfig, *, mesh: Mesh | None) -> Any:
  if mesh is None:
    return None
  shapes = jax.eval_shape(transformer.make_model(config).init, jax.random.key(0))
  return sharding.parameter_shardings(shapes, mesh)


def _tokenizer_of(found: HfModel, options: TokenizerConfig) -> Tokenizer | None:
  if not found.tokenizer_files and not options.path:
    return None
  with tempfile.TemporaryDirectory() as folder:  # a GGUF holds its tokenizer inside
    found.save_companions(epath.Path(folder))
    return load_tokenizer(
      options,
      checkpoint_dir=epath.Path(folder) / checkpoint.TOKENIZER,
      source_dir=epath.Path(folder) / checkpoint.SOURCE,
      embedding_size=found.config.vocab_size,
    )


def _read_files(folder: epath.Path | None) -> dict[str, bytes]:
  if folder is None:
    return {}
  return {file.name: file.read_bytes() for file in folder.iterdir() if not file.is_dir()}
