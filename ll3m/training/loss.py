"""The next-token loss as sums over tokens, which add up exactly over any batches."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m.data.batch import Batch
from ll3m.models.transformer import Model, Params, head
from ll3m_kernels import linear_cross_entropy


class Sums(NamedTuple):
  """Sums over the tokens of a batch, float32 scalars.

  Attributes:
    loss: Negative log-likelihood in nats, times the mask.
    z_loss: The z-loss, times the mask.
    correct: Number of target tokens with the largest logit, times the mask.
    weight: Sum of the mask.
    tokens: Number of tokens that are not padding.
  """

  loss: Float[Array, ""]
  z_loss: Float[Array, ""]
  correct: Float[Array, ""]
  weight: Float[Array, ""]
  tokens: Float[Array, ""]


def token_sums(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  z_loss: float = 0.0,
) -> Sums:
  """Runs the model on a batch [B, T] and sums its losses.

  Args:
    model: The decoder.
    params: Parameters of the model.
    batch: Tokens, targets and loss mask.
    z_loss: Weight of log(Z)^2.
  """
  hidden = model.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
  weight, layout, bias = head(model.config, params)
  loss, penalty, correct = linear_cross_entropy(
    hidden,
    weight.astype(hidden.dtype),
    batch.targets,
    head_layout=layout,
    bias=bias,
    mask=batch.mask,
    logits_soft_cap=model.config.final_soft_cap,
    z_loss=z_loss,
    return_correct=True,
    sharding=model.kernels.sharding,
  )
  return Sums(
    loss=jnp.sum(loss),
    z_loss=jnp.sum(penalty),
    correct=jnp.sum(correct * batch.mask),
    weight=jnp.sum(batch.mask),
    tokens=jnp.sum(batch.segment_ids != 0).astype(jnp.float32),
  )
