"""Whether a checkpoint's own tokenizer can be used with it."""

from etils import epath

from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer


def find_fault(
  folder: epath.Path, embedding_size: int, *, source_dir: epath.Path | None = None
) -> str | None:
  """Returns why a checkpoint's own tokenizer cannot be used with it, or None if it can.

  Args:
    folder: Tokenizer folder of the checkpoint.
    embedding_size: V, the number of embedding rows.
    source_dir: Folder of the checkpoint's config files.
  """
  try:
    load_tokenizer(
      TokenizerConfig(),
      checkpoint_dir=folder,
      source_dir=source_dir,
      embedding_size=embedding_size,
    )
  except (ValueError, OSError, NotImplementedError) as error:
    return str(error)
  return None
