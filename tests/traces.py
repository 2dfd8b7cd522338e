"""Reader of the traces that `--profile_steps` writes."""

import glob
import warnings
from pathlib import Path

import jax


def traced_steps(folder: Path) -> list[int]:
  """Returns the step numbers in the only trace below a folder, using jax's own reader."""
  (file,) = glob.glob(f"{folder}/profile/plugins/profile/*/*.xplane.pb")
  data = jax.profiler.ProfileData.from_file(file)
  with warnings.catch_warnings():
    # The first read of stats creates a C++ type; if Python's warning about it is an error, the
    # process aborts.
    warnings.simplefilter("ignore", DeprecationWarning)
    return sorted(
      dict(event.stats)["step_num"]
      for plane in data.planes
      for line in plane.lines
      for event in line.events
      if event.name == "train"
    )
