"""The kernels as another project has them: installed without ll3m's extras."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
# jax, jaxtyping, numpy, and what these require.
PACKAGES = (
  "jax", "jaxlib", "jaxtyping", "numpy", "numpy.libs", "ml_dtypes", "opt_einsum", "scipy",
  "scipy.libs", "wadler_lindig",
)  # fmt: skip
USE = """
import importlib.metadata, json
import jax, jax.numpy as jnp
import ll3m_kernels as kernels
x = jnp.ones((1, 4, 2, 8))
attended = jax.jit(lambda x: kernels.flash_attention(x, x, x, is_causal=True))(x)
normed = kernels.rms_norm(attended, jnp.ones(8))
(ours,) = importlib.metadata.distributions(name="ll3m")
print(json.dumps({"shape": normed.shape, "requires": ours.requires}))
"""


def test_kernels_need_only_jax_jaxtyping_and_numpy(tmp_path):
  """Only `PACKAGES` can be imported, and the metadata require no other package."""
  installed, others = tmp_path / "installed", tmp_path / "others"
  others.mkdir()
  packages = Path(sysconfig.get_path("purelib"))
  for name in PACKAGES:
    for place in (*packages.glob(name), *packages.glob(f"{name}-*.dist-info")):
      (others / place.name).symlink_to(place)
  # A copy, because setuptools also installs what earlier builds left in the folder `build`.
  copy = tmp_path / "copy"
  for name in ("ll3m", "kernels"):
    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, copy)
  done = subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
     "--no-build-isolation", f"--target={installed}", "."],
    cwd=copy, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  done = subprocess.run(
    [sys.executable, "-S", "-c", USE],
    cwd=tmp_path,
    env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(installed), str(others)])},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["shape"] == [1, 4, 2, 8]
  required = {re.match(r"[\w-]+", text)[0] for text in found["requires"] if "extra ==" not in text}
  assert required == {"jax", "jaxtyping", "numpy"}
