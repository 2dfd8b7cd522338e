"""The program of a training run, which `train` runs and `plan` only compiles."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from ll3m.core.dtypes import DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.models.transformer import Model
from ll3m.training.config import DEFAULT_STEPS, TrainOptions
from ll3m.training.model_choice import build_model
from ll3m.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from ll3m.training.step import make_train_step
from ll3m.training.train_state import StatePlan, plan_state


@dataclasses.dataclass(frozen=True)
class Program:
  """A training step that is ready to be compiled.

  Attributes:
    model: The decoder, for the mesh.
    plan: Shapes and shardings of the state.
    step: Jitted (state, batch) -> (state, metrics), which donates the state.
  """

  model: Model
  plan: StatePlan
  step: Callable


def make_program(
  options: TrainOptions, optimizer_config: OptimizerConfig, config: ModelConfig, mesh: Mesh
) -> Program:
  """Builds the training step of a run without weights and without device memory."""
  total_steps = options.total_steps or DEFAULT_STEPS  # a plan does not know the data
  optimizer = make_optimizer(optimizer_config, total_steps)
  schedule = make_schedule(optimizer_config.chosen, total_steps)
  model = build_model(config, mesh, dtype=options.dtype, remat=options.remat)
  plan = plan_state(model, optimizer, mesh, param_dtype=options.param_dtype)
  step = make_train_step(
    model,
    optimizer,
    schedule,
    z_loss=options.z_loss,
    accumulator_dtype=DTYPES[optimizer_config.accumulator_dtype],
    stochastic_rounding=optimizer_config.bf16_update == "stochastic",
  )
  return Program(model, plan, jit_step(step, plan))


def jit_step(step: Callable, plan: StatePlan) -> Callable:
  """Jits a step: the state is donated and keeps its sharding."""
  shardings = jax.tree.map(lambda x: x.sharding, plan.state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
