"""Downloads a model from the Hugging Face Hub: weights, config and tokenizer.

python tools/download.py --repo_id=meta-llama/Llama-2-7b-hf --access_token=TOKEN
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ll3m.core import flags, options

_COMPANIONS = ("*.json", "tokenizer.model", "*.jinja", "LICENSE*", "README.md")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclasses.dataclass(frozen=True)
class DownloadOptions:
  """Flags of the command."""

  repo_id: str | None = options.option(None, "OWNER/NAME of the model.")
  access_token: str | None = options.option(
    None, "For models that ask for one; $HF_TOKEN or a stored login by default. Never printed."
  )
  output_dir: str | None = options.option(
    None, "Folder to fill; checkpoints/OWNER/NAME by default."
  )
  revision: str | None = options.option(None, "Branch, tag or commit.")

  def __post_init__(self):
    options.require(self, "repo_id")


FLAG_GROUPS = {"": DownloadOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Downloads a model; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_download, FLAG_GROUPS, argv, doc=__doc__)


def _download(given: flags.Flags) -> None:
  """Downloads; what is there already is not fetched again."""
  options = given[""]
  output = Path(options.output_dir or Path("checkpoints") / options.repo_id)
  try:
    download(options, output)
  except Exception as error:
    # An HTTP library may put the request's headers into its message.
    sentence = f"cannot download {options.repo_id}: {' '.join(str(error).split())}"
    for secret in filter(None, (options.access_token, os.environ.get("HF_TOKEN"))):
      sentence = sentence.replace(secret, "***")
    raise ValueError(sentence) from None
  print(f"downloaded {options.repo_id} to {output}")


def download(options: DownloadOptions, output: Path) -> None:
  """Fetches safetensors where there are any, else .bin files."""
  import huggingface_hub

  # What it says, it prints itself; absl's handler would print it once more.
  huggingface_hub.logging.disable_propagation()
  api = huggingface_hub.HfApi(token=options.access_token)
  # Not list_repo_files, which would wait for ever for a server that does not answer.
  timeout = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
  info = api.model_info(options.repo_id, revision=options.revision, timeout=timeout)
  names = [file.rfilename for file in info.siblings]
  # Repositories hold other copies of the weights in sub-folders and for other programs.
  top = [name for name in names if "/" not in name]
  weights = next((kind for kind in _WEIGHTS if any(name.endswith(kind[1:]) for name in top)), None)
  if weights is None:
    raise ValueError(f"it holds neither safetensors nor .bin files, only {', '.join(top[:10])}")
  huggingface_hub.snapshot_download(
    options.repo_id,
    revision=options.revision,
    token=options.access_token,
    local_dir=output,
    allow_patterns=[weights, *_COMPANIONS],
    ignore_patterns=["*/*"],
  )


if __name__ == "__main__":
  sys.exit(main())
