"""Where parameters lie on disk, and how they are read back.

Three kinds of folder hold a model:

* a converted folder (`ll3m.convert`): `params/`, `tokenizer/`, `hf/` (the source's config.json)
  and, written last, `ll3m.json`, without which the folder is not complete;
* a step folder of a training run: Orbax items `params/`, `meta/`, and for resuming `optimizer/`
  and `dataset/`;
* a run's output_dir: `checkpoints/<step>/` beside `tokenizer/` and `hf/`; its latest finished step
  stands for it.

A converted folder and a step folder also hold `digests.json`, the checksums of their files.
Paths may be remote (gs://); Orbax and etils read and write them alike.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ll3m.core import digests
from ll3m.core.config import ModelConfig
from ll3m.core.storage import is_remote

FORMAT = 1
MANIFEST = "ll3m.json"
PARAMS = "params"
OPTIMIZER = "optimizer"
META = "meta"
DATASET = "dataset"
STEPS = "checkpoints"
TOKENIZER = "tokenizer"
SOURCE = "hf"

Params = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A complete model on disk.

  Attributes:
    path: the folder that holds `params/`.
    family: name of the family.
    config: the architecture.
    tokenizer_dir: the tokenizer's files, if they travelled along.
    source_dir: the config.json and generation_config.json it was converted from, if any.
    step: of a training run, in optimizer steps.
    meta: everything that the manifest says.
  """

  path: epath.Path
  family: str
  config: ModelConfig
  tokenizer_dir: epath.Path | None
  source_dir: epath.Path | None
  step: int | None
  meta: Mapping[str, Any]

  @property
  def params_path(self) -> epath.Path:
    """The Orbax checkpoint of the parameters."""
    return self.path / PARAMS


def open_checkpoint(path: epath.PathLike, *, verify: bool = True) -> Checkpoint:
  """Finds the model in a converted folder, a run's output_dir or one step folder.

  Args:
    path: the folder. Of a run, the latest good step is taken; each that is passed over is told.
    verify: compare all its files with their checksums.

  Returns:
    What is known of it without making arrays of its weights.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: the folder holds no complete model, or a damaged one.
  """
  path = absolute(path)
  # TensorFlow's is_dir takes it for a no when access is refused; exists says so.
  if not (path.exists() and path.is_dir()):
    raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
  if (path / MANIFEST).exists() or not (path / STEPS).is_dir():
    return _open(path, verify)
  reasons = []
  for step in reversed(finished_steps(path)):
    try:
      return _open(path / STEPS / str(step), verify)
    except ValueError as error:
      logging.warning("step %d of %s is passed over: %s", step, path, error)
      reasons.append(str(error))
  latest = f"; the latest: {reasons[0]}" if reasons else ""
  raise ValueError(f"not a complete checkpoint: {path} holds no good step{latest}")


def _open(path: epath.Path, verify: bool) -> Checkpoint:
  """Opens a converted folder or one step folder."""
  home, manifest = path, path / MANIFEST
  if not manifest.exists():
    home, manifest = _run_of(path), path / META / "metadata"
  if not manifest.exists():
    raise ValueError(
      f"not a complete checkpoint: {path} has no {MANIFEST} (a converted folder), "
      f"{META}/metadata (a step) or {STEPS}/ (a run)"
    )
  meta = _read_json(manifest)
  if meta.get("format") != FORMAT:
    raise ValueError(
      f"not a complete checkpoint: {path} has format {meta.get('format')!r}, expected {FORMAT}"
    )
  if lacking := {"family", "config"} - meta.keys():
    raise ValueError(f"not a complete checkpoint: {manifest} lacks {', '.join(sorted(lacking))}")
  if not (path / PARAMS).is_dir():
    raise ValueError(f"not a complete checkpoint: {path} has no {PARAMS}/")
  if verify:
    digests.check(path)
  return Checkpoint(
    path=path,
    family=meta["family"],
    config=ModelConfig.from_dict(meta["config"]),
    tokenizer_dir=home / TOKENIZER if home and (home / TOKENIZER).is_dir() else None,
    source_dir=home / SOURCE if home and (home / SOURCE).is_dir() else None,
    step=meta.get("step"),
    meta=meta,
  )


def _run_of(step: epath.Path) -> epath.Path | None:
  """Returns the run's output_dir that a step folder lies in; None for a copy kept elsewhere."""
  # A link such as latest -> checkpoints/40, or a path such as ../40, names another parent.
  steps = (step if is_remote(step) else epath.Path(os.path.realpath(step))).parent
  return steps.parent if steps.name == STEPS else None


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path as Orbax wants it: remote as it is, local from the root."""
  path = epath.Path(path)
  return path if is_remote(path) else path.expanduser().absolute()


def finished_steps(output_dir: epath.PathLike) -> list[int]:
  """Returns the steps of a run that were saved completely, in order.

  Raises:
    ValueError: a converted folder lies among them under the name of a step.
  """
  folder = epath.Path(output_dir) / STEPS
  if not folder.is_dir():
    return []
  steps = [step for step in folder.iterdir() if step.name.isdigit()]
  for step in steps:
    if (step / MANIFEST).exists():  # a run would number, and delete, it among its own
      raise ValueError(f"{step} is a converted model under the name of a step: rename it")
  return sorted(int(step.name) for step in steps if ocp.utils.is_checkpoint_finalized(step))


def restore_params(
  checkpoint: Checkpoint, *, dtype: Any = None, shardings: Params | None = None
) -> Params:
  """Reads the parameters, each device its own shards.

  Args:
    checkpoint: what `open_checkpoint` returned.
    dtype: to cast to while reading; as saved by default.
    shardings: like the parameters, a `Sharding` in each place; the first device by default.

  Returns:
    Haiku parameters.

  Raises:
    ValueError: the arrays cannot be read.
  """
  return restore_tree(checkpoint.params_path, dtype=dtype, shardings=shardings)


def restore_tree(path: epath.Path, *, dtype: Any = None, shardings: Params | None = None) -> Params:
  """Reads an Orbax checkpoint of Haiku parameters; see `restore_params`."""
  handler = ocp.PyTreeCheckpointHandler()
  with reading(path):
    metadata = handler.metadata(path).tree
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placement = jax.tree.map(
      lambda leaf: device, metadata, is_leaf=lambda leaf: hasattr(leaf, "shape")
    )
    if shardings is not None:
      placement = nest(shardings)
    arguments = jax.tree.map(
      lambda leaf, sharding: ocp.ArrayRestoreArgs(
        dtype=dtype, sharding=sharding, global_shape=leaf.shape
      ),
      metadata,
      placement,
      is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )
    return flatten(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments)))


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
  """Makes one short sentence of what goes wrong while Orbax reads a folder.

  Raises:
    ValueError: instead of Orbax's own, among which are bare `Exception`s of a hundred lines.
  """
  try:
    yield
  except Exception as error:
    # Orbax puts TensorStore's whole specification around its reason, which is the cause; that
    # ends, in brackets, with the specification again and places in TensorStore's source.
    reason = str(error.__cause__ or error).strip().replace(f"{path}/", "")
    reason = re.split(r"\n| \[(?=tensorstore_spec|source)", reason)[0]
    raise ValueError(f"cannot read {path}: {reason or type(error).__name__}") from error


def nest(params: Params) -> dict[str, Any]:
  """Splits Haiku's module names at the slashes: what Orbax stores."""
  tree: dict[str, Any] = {}
  for module, arrays in params.items():
    node = tree
    for part in module.split("/"):
      node = node.setdefault(part, {})
    node.update(arrays)
  return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Params:
  """Joins nested names into Haiku's two levels: the inverse of `nest`."""
  params: Params = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      params |= flatten(value, f"{prefix}/{name}" if prefix else name)
    else:
      params.setdefault(prefix, {})[name] = value
  return params


def model_meta(family: str, config: ModelConfig) -> dict[str, Any]:
  """Returns the part of a manifest that every folder with a model has."""
  return {"format": FORMAT, "family": family, "config": config.to_dict()}


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"not a complete checkpoint: cannot read {path}: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"not a complete checkpoint: {path} holds no JSON object")
  return found


_SUFFIX = ".state"


class BytesHandler(ocp.CheckpointHandler):
  """Saves a dict of byte strings as one file each: the position in the data."""

  def save(self, directory: epath.Path, args: "BytesSave") -> None:
    """Writes every entry."""
    for name, value in args.items.items():
      (directory / f"{name}{_SUFFIX}").write_bytes(value)

  def restore(self, directory: epath.Path, args: "BytesRestore") -> dict[str, bytes]:
    """Reads every entry."""
    del args
    files = directory.glob(f"*{_SUFFIX}")  # Orbax puts a file of its own beside ours
    return {file.name.removesuffix(_SUFFIX): file.read_bytes() for file in files}


@ocp.args.register_with_handler(BytesHandler, for_save=True)
@dataclasses.dataclass
class BytesSave(ocp.args.CheckpointArgs):
  """What to save with `BytesHandler`."""

  items: Mapping[str, bytes]


@ocp.args.register_with_handler(BytesHandler, for_restore=True)
@dataclasses.dataclass
class BytesRestore(ocp.args.CheckpointArgs):
  """Restores what `BytesSave` saved."""
