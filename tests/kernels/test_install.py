"""Installation of the kernels alone in another project, with only jax, jaxtyping and numpy."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The packages that jax and jaxtyping require; any other one would be a requirement of ours.
ALLOWED = {
  "ll3m", "jax", "jaxlib", "jaxtyping", "numpy", "ml_dtypes", "opt_einsum", "scipy",
  "wadler_lindig", "pip", "setuptools",
}  # fmt: skip
USE = """
import importlib.metadata, json
import jax, jax.numpy as jnp
import ll3m_kernels as kernels
x = jnp.ones((1, 4, 2, 8))
attended = jax.jit(lambda x: kernels.flash_attention(x, x, x, is_causal=True))(x)
normed = kernels.rms_norm(attended, jnp.ones(8))
print(json.dumps({
  "shape": normed.shape,
  "installed": sorted(d.metadata["Name"] for d in importlib.metadata.distributions()),
}))
"""


def test_kernels_need_only_jax_jaxtyping_and_numpy(tmp_path):
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
  python = tmp_path / "venv" / "bin" / "python"
  done = subprocess.run(
    [python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "."],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  done = subprocess.run(
    [python, "-c", USE],
    cwd=tmp_path,
    env={"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["shape"] == [1, 4, 2, 8]
  assert {name.replace("-", "_") for name in found["installed"]} <= ALLOWED
