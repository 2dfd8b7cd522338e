"""Searches for the largest batch and for changes that make a run fit, with made-up memory."""

import types

import jax
import pytest

from ll3m import families
from ll3m.planning import remedies
from ll3m.planning.training_plan import TrainingJob, largest_batch
from ll3m.training.config import TrainOptions
from ll3m.training.optimizer import OptimizerConfig


def job(rows=8, **options):
  return TrainingJob(
    options=TrainOptions(mesh_dim="4,1,2", **options),
    optimizer=OptimizerConfig(),
    preset=families.get_preset("llama2_7b"),
    devices=jax.devices(),
    rows=rows,
    length=128,
  )


@pytest.mark.parametrize("capacity", [0, 3, 4, 5, 11, 12, 63, 64, 1000])
@pytest.mark.parametrize("first", [4, 8, 100])
def test_the_largest_batch_is_found_in_few_attempts(capacity, first):
  """Rows are a multiple of dp x fsdp = 4."""
  tried = []

  def try_job(changed):
    tried.append(changed.rows)
    return types.SimpleNamespace(fits=changed.rows <= capacity)

  assert largest_batch(job(first), try_job) == (capacity // 4 * 4 or None)
  assert all(rows % 4 == 0 for rows in tried) and len(tried) == len(set(tried))
  assert len(tried) <= 17


def state_of(nbytes):
  return types.SimpleNamespace(
    bytes_per_chip={"parameters": nbytes, "optimizer": 2 * nbytes}, hbm_bytes=100
  )


def advice(changed_fits, state=10, **options):
  def try_job(changed):
    return types.SimpleNamespace(fits=changed_fits(changed))

  return remedies.advise(job(16, **options), state_of(state), try_job)


def test_the_cheapest_change_is_advised():
  assert advice(lambda j: j.options.remat in ("attention", "full")) == (
    "it fits with `remat`=attention"
  )
  assert advice(lambda j: j.rows == 4 and j.steps == 4 and j.options.remat == "full") == (
    "it fits with `remat`=full `train_dataset.seqio_dataset.batch_size`=4 "
    "`optimizer.accumulate_gradient_steps`=4"
  )
  assert advice(lambda j: j.options.mesh_dim == "1,4,2") == (
    "it fits with `mesh_dim`=1,4,2 `remat`=nothing"
  )


def test_a_state_that_is_too_large_needs_more_fsdp_not_fewer_activations():
  tried = []

  def fits(changed):
    tried.append(changed.options.mesh_dim)
    return changed.options.mesh_dim == "2,2,2"

  assert advice(fits, state=40).startswith("it fits with `mesh_dim`=2,2,2")
  assert tried == ["2,2,2"]


def test_more_chips_are_advised_if_no_change_is_enough():
  assert "more chips" in advice(lambda _: False)
