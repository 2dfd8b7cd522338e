import numpy as np
import pytest

from ll3m.hf.model_files import open_model
from ll3m.hf.validation import match_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_keeps_exactly_the_tensors_that_the_model_needs(make_tiny):
  tiny = make_tiny()
  buffers = {
    "model.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
  }
  tiny.save(tiny.tensors | buffers)
  model = open_model(tiny.folder)
  assert model.tensors.keys() == tiny.tensors.keys() == model.specs.keys()
  assert sorted(model.ignored) == sorted(buffers)


def test_lists_every_difference_at_once(make_tiny):
  tiny = make_tiny()
  tensors = dict(tiny.tensors)
  del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(12, np.float32)
  tensors["model.layers.3.input_layernorm.weight"] = np.zeros(12, np.float32)
  tensors["model.layers.2.mlp.gate_proj.weight"] = np.zeros((12, 20), np.float32)
  tensors["model.layers.0.input_layernorm.weight"] = np.zeros(12, np.int32)
  tiny.save(tensors)
  with pytest.raises(ValueError) as error:
    open_model(tiny.folder)
  assert str(error.value) == (
    f"{tiny.folder} does not match its llama config of 3 layers: "
    "missing (2): model.layers.1.mlp.up_proj.weight, model.norm.weight; "
    "unexpected (2): model.layers.0.self_attn.q_proj.bias, "
    "model.layers.3.input_layernorm.weight; "
    "wrong shape or dtype (2): model.layers.0.input_layernorm.weight (expected a floating-point "
    "dtype, got int32), model.layers.2.mlp.gate_proj.weight (expected (20, 12), got (12, 20))"
  )


def test_a_long_list_is_shortened(make_tiny):
  tiny = make_tiny()
  with pytest.raises(ValueError, match=r"missing \(30\): .* and 10 more$"):
    match_tensors(tiny.family, tiny.config, {}, "it")


def test_a_missing_head_suggests_tied_embeddings(make_tiny):
  tiny = make_tiny()
  tiny.save({name: tensor for name, tensor in tiny.tensors.items() if name != HEAD})
  with pytest.raises(ValueError, match=r"lm_head.weight \(.*tie_word_embeddings=true"):
    open_model(tiny.folder)


def test_a_head_that_repeats_the_tied_embedding_is_ignored(make_tiny):
  tiny = make_tiny(tie_embeddings=True)
  assert HEAD not in tiny.tensors
  assert open_model(tiny.folder).ignored == ()
  tiny.save(tiny.tensors | {HEAD: tiny.tensors[EMBEDDING]})
  assert open_model(tiny.folder).ignored == (HEAD,)


def test_a_head_that_differs_from_the_tied_embedding_is_an_error(make_tiny, monkeypatch):
  monkeypatch.setattr("ll3m.hf.validation._COMPARED_BYTES", 100)
  tiny = make_tiny(tie_embeddings=True)
  for other in (tiny.tensors[EMBEDDING].copy(), tiny.tensors[EMBEDDING].astype(np.float32)):
    other[-1, -1] += 1
    tiny.save(tiny.tensors | {HEAD: other})
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}"):
      open_model(tiny.folder)


def test_a_missing_head_is_an_error_unless_tied(make_tiny):
  tiny = make_tiny()
  tiny.save({k: v for k, v in tiny.tensors.items() if k != HEAD})
  with pytest.raises(ValueError, match=r"missing \(1\): lm_head.weight"):
    open_model(tiny.folder)
