"""What holds for any input: round trips and draws."""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ll3m import families
from ll3m.core import checkpoint
from ll3m.decoding.sampling import Sampling, sample
from ll3m.hf.conversion import convert_model
from ll3m.hf.exporting import export_model
from ll3m.hf.mapping import expected_tensors
from ll3m.hf.model_files import open_model
from tests.faults.causing import SOAK

EXAMPLES = 200 if SOAK else 20


@st.composite
def models(draw):
  """A family and an architecture that its config.json can say."""
  family, config = families.get_preset(
    draw(st.sampled_from(["llama2_7b", "mistral_7b", "gemma_2b", "phi_2", "smollm2_135m"]))
  )
  kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  head_dim = 2 * draw(st.integers(1, 4))
  phi = family.name == "phi"  # which has no key for the size of a head
  heads = kv_heads * groups
  return family, config.replace(
    vocab_size=draw(st.integers(1, 40)),
    d_model=heads * head_dim * (1 if phi else draw(st.integers(1, 2))),
    d_ff=draw(st.integers(1, 30)),
    num_layers=draw(st.integers(1, 4)),
    num_heads=heads,
    num_kv_heads=heads if phi else kv_heads,
    head_dim=head_dim,
    max_positions=draw(st.integers(1, 99)),
    rotary_fraction=1.0 if phi else config.rotary_fraction,
  )


@given(
  model=models(),
  dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=not SOAK)
def test_converting_and_exporting_gives_the_very_file(model, dtype, seed):
  family, config = model
  draw = np.random.default_rng(seed)
  with tempfile.TemporaryDirectory() as folder:
    published, converted, exported = (Path(folder) / name for name in ("a", "b", "c"))
    published.mkdir()
    (published / "config.json").write_text(json.dumps(family.to_hf_config(config)))
    tensors = {
      name: draw.standard_normal(spec.shape).astype(dtype)
      for name, spec in expected_tensors(family.rules, config).items()
    }
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    convert_model(open_model(published), converted)
    opened = checkpoint.open_checkpoint(converted)
    assert opened.config == config
    export_model(opened, exported)
    assert open_model(exported).config == config
    theirs, ours = ((f / "model.safetensors").read_bytes() for f in (published, exported))
    assert ours == theirs


@given(
  logits=st.lists(st.one_of(st.floats(-1e4, 1e4, width=32), st.none()), min_size=8, max_size=8),
  temperature=st.sampled_from([0.0, 1e-30, 0.7, 1.0, 1e30]),
  top_k=st.sampled_from([0, 1, 3, 99]),
  top_p=st.sampled_from([1e-6, 0.5, 0.999, 1.0]),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=not SOAK)
def test_a_masked_token_is_never_drawn(logits, temperature, top_k, top_p, seed):
  if all(value is None for value in logits):
    logits = [0.0, *logits[1:]]
  row = np.array([[-np.inf if value is None else value for value in logits]], np.float32)
  sampling = Sampling(temperature, top_k, top_p) if temperature else Sampling()
  token = int(
    sample(jnp.asarray(row), jnp.array([seed], jnp.uint32), jnp.zeros(1, jnp.int32), sampling)[0]
  )
  assert np.isfinite(row[0, token])
  if temperature == 0 or top_k == 1:
    assert row[0, token] == row.max()
