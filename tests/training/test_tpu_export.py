"""The training step of every family, lowered for TPUs on meshes of two and eight devices.

A kernel that GSPMD would have to partition is refused only when lowering for a TPU. On a CPU, where
kernels are interpreted, the same program passes.
"""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ll3m import families
from ll3m.core import sharding
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import make_model
from ll3m.training.model_choice import build_model
from ll3m.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from ll3m.training.sharded_batches import batch_shapes
from ll3m.training.step import make_train_step
from ll3m.training.train_state import plan_state
from ll3m_kernels import Sharding

SIZES = {"vocab_size": 512, "d_model": 64, "d_ff": 128, "num_layers": 2, "max_positions": 256}
# One preset of each family, with heads that show its kind of attention.
MODELS = {
  "llama2_7b": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16},
  "mistral_7b": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "sliding_window": 100},
  "gemma_2b": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 32},
  "phi_2": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 40},
  "smollm2_135m": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8},  # heads do not divide
}
# Layers are a loop, so their kernels are in the module once.
KERNELS = (
  "flash_attention_forward", "flash_attention_backward", "rotary_embedding",
  "rotary_embedding_inverse", "norm_forward", "norm_backward",
)  # fmt: skip


def config_of(name):
  return families.get_preset(name).config.replace(**(SIZES | MODELS[name]))


def lowered(config, mesh, implementation):
  """Returns the StableHLO of a training step for TPUs."""
  optimizer_config = OptimizerConfig()
  optimizer = make_optimizer(optimizer_config, 10)
  schedule = make_schedule(optimizer_config.chosen, 10)
  kernels = Kernels(implementation, Sharding(mesh, sharding.BATCH_AXES, sharding.HEAD_AXIS))
  model = make_model(config, dtype=jax.numpy.bfloat16, kernels=kernels)
  plan = plan_state(build_model(config, mesh, dtype="bf16"), optimizer, mesh, param_dtype="bf16")
  step = jax.jit(
    make_train_step(model, optimizer, schedule),
    out_shardings=(jax.tree.map(lambda x: x.sharding, plan.state), None),
  )
  exported = jax.export.export(step, platforms=["tpu"])
  return exported(plan.state, batch_shapes(mesh, 1, 8, 256)).mlir_module()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
  ("sizes", "implementation"), [((1, 1, 2), "pallas"), ((2, 2, 2), None), ((1, 2, 1), None)]
)
def test_a_training_step_lowers_with_its_kernels(name, sizes, implementation):
  devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
  text = lowered(config_of(name), Mesh(devices, sharding.AXES), implementation)
  names = set(re.findall(r'kernel_name = "([^"]*)"', text))
  assert names >= set(KERNELS), set(KERNELS) - names


def test_prefill_lowers_with_its_kernels():
  config = config_of("mistral_7b")
  model = make_model(config, kernels=Kernels("pallas"))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 200), np.int32)
  text = jax.export.export(jax.jit(model.hidden), platforms=["tpu"])(shapes, tokens).mlir_module()
  assert "flash_attention_forward" in text
