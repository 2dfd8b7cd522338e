"""The names of floating-point types in flags."""

import ml_dtypes
import numpy as np

DTYPES = {
  name: np.dtype(dtype)
  for dtype, names in (
    (np.float64, ("f64", "fp64", "float64")),
    (np.float32, ("f32", "fp32", "float32")),
    (np.float16, ("f16", "fp16", "float16")),
    (ml_dtypes.bfloat16, ("bf16", "bfloat16")),
  )
  for name in names
}

# The names of dtypes for computing and for storing models.
COMPUTED = tuple(n for n, dtype in DTYPES.items() if dtype.name in ("float32", "bfloat16"))
STORED = tuple(n for n, dtype in DTYPES.items() if dtype.itemsize < 8)
