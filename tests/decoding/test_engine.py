import jax
import jax.numpy as jnp
import pytest

from ll3m.core.sharding import make_mesh, parameter_shardings
from ll3m.decoding.engine import Engine, check_request
from ll3m.decoding.sampling import Sampling
from ll3m.models.transformer import make_model
from tests.decoding.test_decoder import CONFIGS, full_logits, random_params

PROMPTS = [[5, 9, 2, 33, 7, 7, 1], [4], [11, 60, 3]]


@pytest.fixture(scope="module")
def mistral():
  config = CONFIGS["mistral"]
  params = random_params(config)
  return config, params, Engine(config, params)


def brute_force(config, params, prompt, count):
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(int(full_logits(config, params, tokens)[-1].argmax()))
  return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["mistral", "phi"])
def test_greedy_decoding_equals_repeated_full_forward_passes(name):
  config = CONFIGS[name]
  params = random_params(config)
  found = Engine(config, params).generate(PROMPTS, max_new_tokens=9)
  assert found == [brute_force(config, params, prompt, 9) for prompt in PROMPTS]


@pytest.mark.parametrize(
  ("name", "mesh_dim"),
  [("mistral", "2,2,2"), ("gemma", "1,1,8"), ("phi", "8,1,1"), ("phi", "1,4,2")],
)
def test_a_mesh_does_not_change_the_tokens(name, mesh_dim):
  """Three rows, most head counts and the vocabulary (61) do not divide over the devices."""
  config = CONFIGS[name]
  params = random_params(config)
  mesh = make_mesh(mesh_dim)
  placed = jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh))
  found = Engine(config, placed, mesh=mesh).generate(PROMPTS, max_new_tokens=9)
  assert found == [brute_force(config, params, prompt, 9) for prompt in PROMPTS]


def test_sampling_does_not_depend_on_the_mesh(mistral):
  config, params, engine = mistral
  options = {"max_new_tokens": 8, "sampling": Sampling(0.7, 20, 0.9), "seeds": [3, 4, 5]}
  on_mesh = Engine(config, params, mesh=make_mesh("2,2,2")).generate(PROMPTS, **options)
  assert on_mesh == engine.generate(PROMPTS, **options)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 20, 0.9)])
def test_a_row_does_not_depend_on_its_batch(mistral, sampling):
  _, _, engine = mistral
  options = {"max_new_tokens": 8, "sampling": sampling}
  together = engine.generate(PROMPTS, seeds=[3, 4, 5], **options)
  for prompt, seed, row in zip(PROMPTS, [3, 4, 5], together, strict=True):
    assert engine.generate([prompt], seeds=[seed], **options) == [row]
  swapped = engine.generate(PROMPTS[::-1], seeds=[5, 4, 3], **options)
  assert swapped == together[::-1]


def test_equal_seeds_give_equal_rows_and_others_differ(mistral):
  _, _, engine = mistral
  options = {"max_new_tokens": 12, "sampling": Sampling(1.0)}
  rows = engine.generate([[4]] * 3, seeds=[0, 1, 0], **options)
  assert rows[0] == rows[2] != rows[1]
  assert engine.generate([[4]] * 3, **options)[:2] == rows[:2]  # the default: row indices


def test_stops_each_row_at_its_stop_token(mistral):
  _, _, engine = mistral
  whole = engine.generate(PROMPTS, max_new_tokens=10)
  stop = whole[0][3]
  rows = engine.generate(PROMPTS, max_new_tokens=10, stop_tokens={stop})
  for row, expected in zip(rows, whole, strict=True):
    end = expected.index(stop) + 1 if stop in expected else 10
    assert row == expected[:end]
  steps = list(engine.stream(PROMPTS[:1], max_new_tokens=10, stop_tokens={stop}))
  assert len(steps) == whole[0].index(stop) + 1


def test_generates_a_single_token(mistral):
  config, params, engine = mistral
  assert engine.generate([[4, 5]], max_new_tokens=1) == [brute_force(config, params, [4, 5], 1)]


def test_padding_of_the_vocabulary_is_never_generated():
  config = CONFIGS["smollm2"]
  params = random_params(config)
  # Token 50 of the tied embedding has the largest logit.
  embedding = jnp.asarray(params["embed"]["embedding"])
  model = make_model(config)
  hidden = model.hidden(params, jnp.array([[4]]))[0, 0]
  params["embed"]["embedding"] = embedding.at[50].set(10 * hidden)
  assert Engine(config, params).generate([[4]], max_new_tokens=1) == [[50]]
  engine = Engine(config, params, num_tokens=50)
  for sampling in (Sampling(), Sampling(5.0)):
    rows = engine.generate([[4]] * 20, max_new_tokens=3, sampling=sampling)
    assert max(map(max, rows)) < 50


def test_generates_in_bfloat16():
  config = CONFIGS["gemma"]
  rows = Engine(config, random_params(config), dtype=jnp.bfloat16).generate(
    PROMPTS, max_new_tokens=4
  )
  assert [len(row) for row in rows] == [4, 4, 4]


def test_a_prompt_of_similar_length_does_not_recompile(mistral):
  _, _, engine = mistral
  engine.generate([[1, 2, 3]], max_new_tokens=5)
  with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
    messages = []
    patch.setattr(
      "jax._src.interpreters.pxla.logger.log", lambda level, text, *a: messages.append(text % a)
    )
    engine.generate([[5] * 7], max_new_tokens=6)
  assert not [m for m in messages if m.startswith("Compiling")]


@pytest.mark.parametrize(
  ("prompts", "max_new_tokens", "message"),
  [
    ([], 1, "expected at least one prompt, got none"),
    ([[1], []], 1, "prompt 2 is empty"),
    ([[1]], 0, "`max_new_tokens` must be at least 1, got 0"),
    ([[1]], -3, "`max_new_tokens` must be at least 1, got -3"),
    ([[1] * 60], 5, "60 tokens; with 5 new tokens .* 64 positions"),
    ([[1]], 10**12, "the 64 positions"),
    ([[1, 61]], 1, "vocabulary is 0..60"),
    ([[-1]], 1, "tokens from -1 to -1"),
  ],
)
def test_rejects_requests_that_the_model_cannot_serve(prompts, max_new_tokens, message):
  with pytest.raises(ValueError, match=message):
    check_request(CONFIGS["llama"], prompts, max_new_tokens)


def test_rejects_requests_before_the_first_step(mistral):
  config, params, engine = mistral
  with pytest.raises(ValueError, match="prompt 1 is empty"):
    engine.stream([[]], max_new_tokens=1)
  with pytest.raises(ValueError, match="expected 1 seeds"):
    engine.stream([[1]], max_new_tokens=1, seeds=[1, 2])
  with pytest.raises(ValueError, match="expected 1 seeds"):
    engine.stream([[1]], max_new_tokens=1, seeds=[-1])
  with pytest.raises(ValueError, match="num_tokens .* 61, got 62"):
    Engine(config, params, num_tokens=62)


def test_the_last_position_can_be_used():
  config = CONFIGS["llama"].replace(max_positions=20)
  params = random_params(config)
  prompt = list(range(12))
  assert Engine(config, params).generate([prompt], max_new_tokens=8) == [
    brute_force(config, params, prompt, 8)
  ]
