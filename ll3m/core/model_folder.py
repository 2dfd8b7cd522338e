"""Writer of converted folders, which count as complete only once all files are written."""

import json
import os
import shutil
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ll3m.core import checkpoint, checksums
from ll3m.core.checkpoint_items import Params, nest
from ll3m.core.model_config import ModelConfig
from ll3m.core.object_store import is_remote, require_bucket

# Marks a folder as ours and unfinished, so that a second attempt may replace it.
UNFINISHED = "ll3m.unfinished"


def save_model(
  folder: str | os.PathLike[str],
  params: Params,
  *,
  family: str,
  config: ModelConfig,
  files: Mapping[str, Mapping[str, bytes]],
) -> None:
  """Writes a model from memory, from one host or several.

  Args:
    folder: A new or empty folder, local or gs://.
    params: The parameters, on any devices.
    family: The name of the family.
    config: The architecture.
    files: The contents of the files in each sub-folder (`tokenizer/`, `hf/`), by their names.

  Raises:
    ValueError: The folder is not empty, or there is too little disk space.
  """
  output, is_first = checkpoint.absolute(folder), jax.process_index() == 0
  if is_first:
    prepare_output(output, sum(array.nbytes for array in jax.tree.leaves(params)))
    write_files(output, files)
  _wait_for_all("ll3m.save_model: prepared")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(output / checkpoint.PARAMS, args=ocp.args.PyTreeSave(nest(params)))
  if is_first:
    finish_output(output, family, config)
  _wait_for_all("ll3m.save_model: finished")


def write_files(output: epath.Path, files: Mapping[str, Mapping[str, bytes]]) -> None:
  """Writes the files of sub-folders, given as {sub-folder: {name: contents}}."""
  for name, contents in files.items():
    for file, content in contents.items():
      (output / name).mkdir(parents=True, exist_ok=True)
      (output / name / file).write_bytes(content)


def prepare_output(output: epath.Path, nbytes: int) -> None:
  """Creates a folder, or empties one that an earlier attempt left unfinished.

  Args:
    output: The folder.
    nbytes: Number of bytes that will be written.

  Raises:
    ValueError: The folder holds anything else, or there is too little disk space.
  """
  require_bucket(output)
  if (output / UNFINISHED).exists():
    output.rmtree()
  require_empty(output)
  output.mkdir(parents=True, exist_ok=True)
  if not is_remote(output):
    require_space(output, nbytes)
  (output / UNFINISHED).write_text("An ll3m checkpoint is being written here.\n")


def require_empty(output: epath.Path) -> None:
  """Raises a `ValueError` if an output folder exists and is not an empty folder."""
  if output.exists() and not output.is_dir():
    raise ValueError(f"the output folder {output} is a file")
  if output.exists() and any(output.iterdir()):
    raise ValueError(f"the output folder {output} is not empty; choose a new one")


def require_space(output: epath.Path, nbytes: int) -> None:
  """Raises a `ValueError` if a local disk has too little space.

  Args:
    output: A folder on the disk; it or its parent exists.
    nbytes: Number of bytes that will be written.
  """
  free = shutil.disk_usage(output if output.exists() else output.parent).free
  if free < nbytes:
    raise ValueError(
      f"{output} needs {nbytes / 1e9:.1f} GB, but its disk has only {free / 1e9:.1f} GB left"
    )


def finish_output(
  output: epath.Path,
  family: str,
  config: ModelConfig,
  known: Mapping[str, checksums.Digest] | None = None,
) -> None:
  """Writes the checksums and the manifest of a folder that is otherwise complete.

  Args:
    output: The folder.
    family: The name of the family.
    config: The architecture.
    known: Known checksums of the intended contents, by path; files without one are read.
  """
  manifest = json.dumps(checkpoint.model_meta(family, config), indent=1) + "\n"
  known = dict(known or {}) | {checkpoint.MANIFEST: checksums.of([manifest.encode()])}
  checksums.write(output, known, leave_out=[UNFINISHED])
  # Renaming is atomic, so half a manifest can never be read.
  (output / UNFINISHED).write_text(manifest)
  (output / UNFINISHED).rename(output / checkpoint.MANIFEST)


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
