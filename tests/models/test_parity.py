"""Parity of every family with transformers, on the fixtures of tools/make_parity_fixtures.py.

Oracle: transformers on torch, float32, eager attention. The tests cover the whole path in LL3M:
conversion, loading, logits, the training loss and its gradient.
"""

import collections
import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m import families
from ll3m.core.model_config import ROPE_SCALINGS, ModelConfig
from ll3m.families import tensor_rules
from ll3m.hf import conversion
from ll3m.hf.model_files import open_model
from ll3m.hf.model_source import open_source
from ll3m.models import transformer
from ll3m_kernels import linear_cross_entropy

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
WINDOWED = "mistral"  # the fixture whose window is shorter than its sequence

# The largest errors measured over all fixtures were 2.3e-6, 1e-7 and 2.6e-6.
LOGITS_TOLERANCE = 6e-6  # relative to the largest logit
LOSS_TOLERANCE = 1e-6  # relative
NORM_TOLERANCE = 1e-5  # relative to each tensor's norm
# The minimum error of a wrong architecture, relative to the largest logit.
VISIBLE = 10 * LOGITS_TOLERANCE


class Fixture(NamedTuple):
  config: ModelConfig
  rules: tuple[tensor_rules.Rule, ...]
  params: transformer.Params  # float32
  stored: transformer.Params  # the same parameters in the checkpoint's dtypes
  tokens: np.ndarray  # [B, T]
  logits: np.ndarray  # [B, T, V]
  loss: float
  norms: dict[str, float]  # norms of the gradients, by tensor name in the checkpoint


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  @functools.cache
  def convert_and_load(name: str) -> Fixture:
    folder = tmp_path_factory.mktemp(name) / "converted"
    conversion.convert_model(open_model(FIXTURES / name), folder)
    source = open_source(str(folder))
    stored = source.load_params()
    expected = np.load(FIXTURES / name / "expected.npz")
    names, norms = (expected[f"gradient_{key}"].tolist() for key in ("names", "norms"))
    return Fixture(
      source.config,
      families.FAMILIES[source.family].rules,
      jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored),
      stored,
      expected["tokens"],
      expected["logits"],
      float(expected["loss"]),
      dict(zip(names, norms, strict=True)),
    )

  return convert_and_load


@functools.cache
def compiled(config, **options):
  """Returns the compiled function of an architecture, shared by all fixtures that have it."""
  model = transformer.make_model(config, **options)

  def loss_and_logits(params, tokens):
    hidden = model.hidden(params, tokens)
    head = transformer.head(config, params)
    losses, _ = linear_cross_entropy(
      hidden[:, :-1],
      head.weight,
      tokens[:, 1:],
      head_layout=head.layout,
      bias=head.bias,
      logits_soft_cap=config.final_soft_cap,
    )
    return losses.mean(), model.logits(params, hidden)

  return jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))


def check(fixture: Fixture, **options) -> None:
  function = compiled(fixture.config, **options)
  (loss, logits), gradient = function(fixture.params, fixture.tokens)
  assert logits.dtype == jnp.float32
  assert relative_error(logits, fixture.logits) < LOGITS_TOLERANCE
  assert float(loss) == pytest.approx(fixture.loss, rel=LOSS_TOLERANCE)
  assert norms_by_tensor(fixture, gradient) == pytest.approx(fixture.norms, rel=NORM_TOLERANCE)


def logits_of(config, params, tokens, **kwargs):
  model = transformer.make_model(config)
  hidden = jax.jit(model.hidden)(params, tokens, **kwargs)
  return model.logits(params, hidden)


def relative_error(actual, expected):
  return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def norms_by_tensor(fixture, gradient):
  squares = collections.Counter()  # of tensors that several parameters share
  for spec in tensor_rules.expected_tensors(fixture.rules, fixture.config).values():
    module, _, leaf = spec.ours.rpartition("/")
    tensor = np.asarray(gradient[module][leaf], np.float64)
    squares[spec.tensor] += np.sum((tensor if spec.layer is None else tensor[spec.layer]) ** 2)
  return {name: square**0.5 for name, square in squares.items()}


def test_every_family_and_switch_has_a_fixture(load):
  configs = {name: load(name).config for name in NAMES}
  kinds = {json.loads((FIXTURES / n / "config.json").read_text())["model_type"] for n in NAMES}
  assert kinds == {family.model_type for family in families.FAMILIES.values()}
  windows = {n: (c.sliding_window, load(n).tokens.shape[1]) for n, c in configs.items()}
  assert windows[WINDOWED] == (8, 29)
  assert any(w is not None and w > t for w, t in windows.values())
  for switched in (
    lambda c: c.num_kv_heads == 1 < c.num_heads,
    lambda c: 1 < c.num_kv_heads < c.num_heads,
    lambda c: c.head_dim * c.num_heads != c.d_model,
    lambda c: c.head_dim not in (2, 4, 8, 16, 32),
    lambda c: c.rotary_dim < c.head_dim,
    lambda c: c.rope_theta != 1e4,
    lambda c: c.rope_scaling_factor != 1,
    lambda c: c.tie_embeddings,
    lambda c: c.parallel_block,
    lambda c: c.num_layers == 1,
    lambda c: c.qkv_bias,
    lambda c: c.qk_norm == "per_head",
    lambda c: c.qk_norm == "all_heads",
    lambda c: c.norm_position == "after",
    lambda c: c.norm_position == "both",
    lambda c: c.attention_soft_cap and c.final_soft_cap,
    lambda c: c.query_pre_attn_scalar not in (None, c.head_dim),
    lambda c: c.rope_local_theta and c.rope_scaling_factor != 1,
    lambda c: c.rope_scaling == "longrope" and c.rotary_dim < c.head_dim,
    lambda c: {"full", "sliding"} == set(c.layer_types) and c.stacks[-1].is_rest,
    lambda c: "no_rope" in c.layer_types and c.stacks[-1].is_rest,
  ):
    assert any(map(switched, configs.values()))
  assert {c.rope_scaling for c in configs.values()} == set(ROPE_SCALINGS)
  for name, config in configs.items():
    original = config.rope_original_positions
    length = load(name).tokens.shape[1]
    assert original is None or (length > original) == (name != "phi4_mini_short")


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradient_norms_match_transformers(load, name):
  check(load(name))


@pytest.mark.parametrize("remat", sorted(set(transformer.REMAT_POLICIES) - {"nothing"}))
def test_remat_does_not_change_the_results(load, remat):
  check(load(WINDOWED), remat=remat)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_parameters_may_keep_the_dtype_of_the_checkpoint(load, name):
  fixture = load(name)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(fixture.stored)} < {"float16", "bfloat16"}
  logits = logits_of(fixture.config, fixture.stored, fixture.tokens)
  assert relative_error(logits, fixture.logits) < LOGITS_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_unconverted_checkpoints_give_the_same_parameters(load, name):
  params = open_source(f"hf::{FIXTURES / name}").load_params()
  chex.assert_trees_all_equal(params, load(name).stored)
  chex.assert_trees_all_equal_dtypes(params, load(name).stored)


@pytest.mark.parametrize("name", ["mistral", "gemma_2b", "phi_2", "gemma3", "phi3_long", "smollm3"])
def test_packed_rows_give_the_same_logits(load, name):
  fixture = load(name)
  rows, length = fixture.tokens.shape
  logits = logits_of(
    fixture.config,
    fixture.params,
    fixture.tokens.reshape(1, -1),
    positions=np.tile(np.arange(length), rows)[None],
    segment_ids=np.repeat(np.arange(1, rows + 1), length)[None],
  )
  assert relative_error(logits.reshape(fixture.logits.shape), fixture.logits) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": 9}),
    ("mistral", {"sliding_window": None}),
    ("llama2", {"norm_epsilon": 1e-6}),
    ("smollm2", {"rope_theta": 1e4}),
    ("llama2_linear", {"rope_scaling_factor": 1.0}),
    ("phi_linear", {"rope_scaling_factor": 2.0}),
    ("gemma_2b", {"norm_scale_offset": 0.0}),
    ("gemma_2b", {"scale_embeddings": False}),
    ("gemma_7b", {"activation": "gelu"}),
    ("phi_2", {"activation": "gelu"}),
    ("phi_2", {"rotary_fraction": 0.5}),
    ("llama3", {"rope_scaling_factor": 32.0}),
    ("llama3", {"rope_frequency_factors": (1.0, 2.0)}),
    ("llama_yarn", {"rope_magnitude": 1.0}),
    ("llama_yarn", {"rope_frequency_factors": (0.1, 32.0)}),
    ("qwen2_window", {"layer_types": ("sliding", "full", "full")}),
    ("qwen3", {"qk_norm": None}),
    ("gemma2", {"attention_soft_cap": None}),
    ("gemma2", {"final_soft_cap": None}),
    ("gemma2", {"query_pre_attn_scalar": None}),
    ("gemma2", {"layer_types": ("full", "sliding")}),
    ("gemma3_modern", {"rope_local_theta": 1e6}),
    ("gemma3_modern", {"layer_types": ("sliding", "full", "full", "full", "sliding")}),
    ("phi3", {"sliding_window": 12}),
    ("phi3_long", {"rope_magnitude": 1.0}),
    ("phi3_long", {"rope_original_positions": 64}),  # the short factors
    ("phi4_mini", {"rope_long_factors": (1.0, 4.0, 9.0)}),
    ("smollm3", {"layer_types": ("full", "no_rope", "full", "full")}),
  ],
)
def test_a_wrong_switch_changes_the_logits(load, name, changes):
  fixture = load(name)
  config, params = fixture.config.replace(**changes), fixture.params
  if "layer_types" in changes:  # it decides in which stack each layer is
    published = open_model(FIXTURES / name)
    specs = tensor_rules.expected_tensors(fixture.rules, config)
    params = dataclasses.replace(published, config=config, specs=specs).load_params()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  logits = logits_of(config, params, fixture.tokens)
  assert relative_error(logits, fixture.logits) > VISIBLE


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_negligible(load, name):
  fixture = load(name)
  assert min(fixture.norms.values()) > 0.01
  for leaf in jax.tree.leaves(fixture.params):
    assert np.ptp(leaf) > 0.1  # not constant, as after initialisation with zeros or ones
