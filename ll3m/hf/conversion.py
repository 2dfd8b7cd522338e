"""Converts a published model to an LL3M folder in constant memory.

The folder holds `params/` (stacked over layers, in Orbax's format), `tokenizer/`, `hf/` (the
source's config files) and `digests.json` (checksums of all files). The manifest is written last;
a folder without it is not a checkpoint.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
from etils import epath

from ll3m.core import checkpoint, parameter_store
from ll3m.core.model_folder import finish_output, prepare_output
from ll3m.core.progress import byte_bar
from ll3m.hf.lazy_tensor import all_finite, read_part
from ll3m.hf.published_model import HfModel
from ll3m.hf.validation import listing

# Each thread holds one piece in memory. Two threads overlap reading, transposing and writing.
_THREADS = 2


class Conversion(NamedTuple):
  """Counts of what a conversion wrote, and how long it took."""

  tensors: int
  parameters: int
  nbytes: int
  seconds: float


def convert_model(
  model: HfModel,
  output: epath.PathLike,
  dtype: np.dtype | None = None,
  *,
  allow_nonfinite: bool = False,
) -> Conversion:
  """Converts a model piece by piece, with a progress bar on stderr.

  Args:
    model: The published model; its tensors have been checked.
    output: The folder to create; local or gs://.
    dtype: The dtype of every parameter; None keeps each parameter's own.
    allow_nonfinite: Whether tensors may hold NaN or infinities.

  Returns:
    The counts to report.

  Raises:
    ValueError: The folder exists and is not an unfinished conversion, the disk is too small, a
      value does not fit the dtype, or tensors hold NaN or infinities.
  """
  start = time.perf_counter()
  output = epath.Path(output)
  shapes = model.shapes
  dtypes = model.parameter_dtypes(dtype)
  stacked = {spec.ours: spec.layer is not None for spec in model.specs.values()}
  counts = {path: int(np.prod(shape)) for path, shape in shapes.items()}
  nbytes = sum(count * dtypes[path].itemsize for path, count in counts.items())
  prepare_output(output, nbytes)
  model.save_companions(output)

  writer = parameter_store.ParameterWriter(output / checkpoint.PARAMS, shapes, dtypes, stacked)
  nonfinite: set[str] = set()
  with byte_bar(nbytes, "convert") as bar:

    def convert_tensor(name: str) -> None:
      spec = model.specs[name]
      for rows, values in _pieces(model, writer, name, dtypes[spec.ours]):
        writer.write(spec.ours, spec.layer, rows, values)
        if not allow_nonfinite and not all_finite(values):
          nonfinite.add(name)
        bar.update(values.nbytes)

    with ThreadPoolExecutor(_THREADS) as pool:
      jobs = [pool.submit(convert_tensor, name) for name in model.specs]
      try:
        for job in as_completed(jobs):
          job.result()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  if nonfinite:
    raise ValueError(
      f"{model.path} holds NaN or infinities {listing(sorted(nonfinite))}; "
      f"set `allow_nonfinite` to convert it anyway"
    )
  writer.finish()
  written = {f"{checkpoint.PARAMS}/{name}": digest for name, digest in writer.digests.items()}
  finish_output(output, model.family, model.config, written)
  return Conversion(len(model.specs), sum(counts.values()), nbytes, time.perf_counter() - start)


def _pieces(
  model: HfModel, writer: parameter_store.ParameterWriter, name: str, dtype: np.dtype
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields the pieces of a tensor that the writer expects, in LL3M's orientation."""
  tensor, spec = model.tensors[name], model.specs[name]
  shape = spec.shape[::-1] if spec.transpose else spec.shape
  rest = tuple(slice(0, size) for size in shape[1:])
  for rows in writer.row_ranges(spec.ours):
    yield rows, read_part(tensor, (rows, *rest), transpose=spec.transpose, dtype=dtype)
