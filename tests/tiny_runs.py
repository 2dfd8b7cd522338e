"""Helpers shared by the tests of training: flags and rows of a tiny run, and its steps' arrays."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ll3m.core import checkpoint


def flags(tokenizer: Path, *, rows: int, shards: int, heads: int = 2) -> list[str]:
  """Returns the flags of a random two-layer model: byte tokens, rows of 32, high learning rate.

  Args:
    tokenizer: Folder of the tokenizer; see `byte_tokenizer`.
    rows: Number of rows in a micro-step.
    shards: Number of shards that the stream is split into.
    heads: Number of heads, each of 8 dimensions. Two heads share a key head; D is 8 * heads.
  """
  model = {
    "vocab_size": 258,
    "d_model": 8 * heads,
    "d_ff": 12 * heads,
    "num_layers": 2,
    "num_heads": heads,
    "num_kv_heads": heads // 2,
    "head_dim": 8,
    "max_positions": 64,
  }
  return [
    "--load_model_config=smollm2_135m",
    f"--update_model_config={','.join(f'{k}={v}' for k, v in model.items())}",
    f"--tokenizer.path={tokenizer}",
    f"--train_dataset.seqio_dataset.batch_size={rows}",
    "--train_dataset.seqio_dataset.task_feature_lengths=(32,)",
    f"--train_dataset.seqio_dataset.num_shards={shards}",
    "--optimizer.adamw_optimizer.lr=0.01",
  ]


def streamed(folder: Path) -> list[str]:
  """Writes distinct rows and returns flags to stream them with `datasets`.

  Without TensorFlow, a run starts sooner.

  Args:
    folder: The folder for the rows.
  """
  folder.mkdir(exist_ok=True)
  rows = (
    {"text": f"row {number}, {'and so on, ' * (number % 7)}{number**3}"} for number in range(96)
  )
  (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return [
    "--train_dataset.type=huggingface",
    f"--train_dataset.huggingface_dataset.path={folder}",
    "--train_dataset.huggingface_dataset.streaming=True",
  ]


def arrays(step: Path) -> dict[str, bytes]:
  """Returns the bytes of every array in a step folder, as read by Orbax rather than by us."""
  found = {}
  for item in (checkpoint.PARAMS, checkpoint.OPTIMIZER):
    reader = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
      lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray),
      reader.metadata(step / item).tree,
      is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )
    tree = reader.restore(step / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    found |= {
      item + jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves
    }
  return found
