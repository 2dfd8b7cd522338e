"""Packing changes the rows of documents, not their loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ll3m.core.model_config import ModelConfig
from ll3m.data.batch import Batch
from ll3m.data.packing import Document, Packer
from ll3m.models.transformer import make_model
from ll3m.training.loss import token_sums

LENGTH = 32


def batch_of(documents: list[Document], *, pack: bool) -> Batch:
  packer, rows = Packer(LENGTH, pack=pack), []
  for document in documents:
    packer.add(document)
  while (row := packer.row(last=True)) is not None:
    rows.append(row)
  return Batch(*(jnp.stack(field) for field in zip(*rows, strict=True)))


def test_packed_loss_equals_unpacked_loss():
  config = ModelConfig(
    vocab_size=67, d_model=16, d_ff=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    max_positions=LENGTH, norm_epsilon=1e-5, sliding_window=9,
  )  # fmt: skip
  model = make_model(config)
  # Larger than at initialisation, so that the loss of a token depends on the tokens it attends to.
  params = jax.tree.map(lambda w: 5 * w, model.init(jax.random.key(0)))
  random = np.random.default_rng(0)
  # Lengths that fill three rows exactly, so that no document is cut at the end of a row.
  documents = [
    Document(*(random.integers(0, high, n, dtype=np.int32) for high in (67, 2)))
    for n in (5, 1, 26, 32, 13, 2, 17)
  ]
  packed, unpacked = (batch_of(documents, pack=pack) for pack in (True, False))
  assert packed.inputs.shape == (3, LENGTH) and unpacked.inputs.shape == (7, LENGTH)
  sums = jax.jit(functools.partial(token_sums, model, z_loss=1e-3))
  ours, theirs = sums(params, packed), sums(params, unpacked)
  assert ours.weight == theirs.weight and ours.tokens == theirs.tokens
  np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
  np.testing.assert_allclose(ours.z_loss, theirs.z_loss, rtol=1e-5)
  # The comparison can fail: without segments, documents attend to each other.
  mixed = sums(params, packed._replace(segment_ids=jnp.ones_like(packed.inputs)))
  assert abs(mixed.loss - theirs.loss) > 1e-3 * theirs.loss
