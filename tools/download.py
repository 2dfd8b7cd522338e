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

  repo_id: str | None = options.option(None, "Repository of the model, as OWNER/NAME.")
  access_token: str | None = options.option(
    None,
    "Access token for gated models; $HF_TOKEN or a stored login by default. It is never printed.",
  )
  output_dir: str | None = options.option(
    None, "Folder to write; checkpoints/OWNER/NAME by default."
  )
  revision: str | None = options.option(
    None, "Branch, tag or commit; the repository's default branch by default."
  )

  def __post_init__(self):
    options.require(self, "repo_id")


FLAG_GROUPS = {"": DownloadOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Downloads a model; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_download, FLAG_GROUPS, argv, doc=__doc__)


def _download(given: flags.Flags) -> None:
  """Downloads the files that the folder does not already contain."""
  options = given[""]
  output = Path(options.output_dir or Path("checkpoints") / options.repo_id)
  try:
    download(options, output)
  except Exception as error:
    # The message of an HTTP library may contain the request's headers.
    sentence = f"cannot download {options.repo_id}: {' '.join(str(error).split())}"
    for secret in filter(None, (options.access_token, os.environ.get("HF_TOKEN"))):
      sentence = sentence.replace(secret, "***")
    raise ValueError(sentence) from None
  print(f"downloaded {options.repo_id} to {output}")


def download(options: DownloadOptions, output: Path) -> None:
  """Downloads config, tokenizer and weights: safetensors if there are any, else .bin files."""
  import huggingface_hub

  # huggingface_hub prints its own log messages; absl's handler would print them a second time.
  huggingface_hub.logging.disable_propagation()
  api = huggingface_hub.HfApi(token=options.access_token)
  # Not list_repo_files, which has no timeout for a server that does not answer.
  timeout = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
  info = api.model_info(options.repo_id, revision=options.revision, timeout=timeout)
  names = [file.rfilename for file in info.siblings]
  # Subfolders of a repository hold other copies of the weights, or weights for other programs.
  top = [name for name in names if "/" not in name]
  weights = next((kind for kind in _WEIGHTS if any(name.endswith(kind[1:]) for name in top)), None)
  if weights is None:
    raise ValueError(f"expected safetensors or .bin files, got only {', '.join(top[:10])}")
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
