"""Reads the traces that `--profile_steps` writes."""

import glob
import warnings
from pathlib import Path

import jax


def traced_steps(folder: Path) -> list[int]:
  """The numbers of the steps in the one trace below a folder, as jax's own reader finds them."""
  (file,) = glob.glob(f"{folder}/profile/plugins/profile/*/*.xplane.pb")
  data = jax.profiler.ProfileData.from_file(file)
  with warnings.catch_warnings():
    # Reading stats for the first time makes a C++ type; if Python's warning of that is an error,
    # the process aborts.
    warnings.simplefilter("ignore", DeprecationWarning)
    return sorted(
      dict(event.stats)["step_num"]
      for plane in data.planes
      for line in plane.lines
      for event in line.events
      if event.name == "train"
    )
