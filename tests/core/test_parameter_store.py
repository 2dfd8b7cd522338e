"""Parameters in Orbax's layout. The oracle is Orbax, which reads what we write and vice versa."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ll3m.core import parameter_store
from ll3m.core.checkpoint_items import nest

PARAMS = {
  "layers/attention/query/w": np.random.default_rng(0).random((3, 7, 5), np.float32),
  "layers/norm/scale": np.zeros((3, 7), np.float16),  # equal to zarr's fill value
  "embed/embedding": np.arange(45).reshape(9, 5).astype(ml_dtypes.bfloat16),
  "final_norm/scale": np.arange(4, dtype=np.float64),
}


def as_haiku(flat):
  params = {}
  for path, values in flat.items():
    module, _, name = path.rpartition("/")
    params.setdefault(module, {})[name] = values
  return params


@pytest.fixture
def written(tmp_path, monkeypatch):
  """PARAMS in chunks of two rows of the largest parameter."""
  monkeypatch.setattr(parameter_store, "CHUNK_BYTES", 2 * 5 * 4 + 1)
  folder = epath.Path(tmp_path / "params")
  writer = parameter_store.ParameterWriter(
    folder,
    {path: values.shape for path, values in PARAMS.items()},
    {path: values.dtype for path, values in PARAMS.items()},
    {path: path.startswith("layers/") for path in PARAMS},
  )
  for path, values in PARAMS.items():
    stacked = path.startswith("layers/")
    for layer in reversed(range(3)) if stacked else [None]:
      for rows in writer.row_ranges(path):
        source = values if layer is None else values[layer]
        writer.write(path, layer, rows, source[rows].copy())
  writer.finish()
  return folder


def test_large_layers_are_split_into_chunks(written):
  zarray = json.loads((written / "layers.attention.query.w" / ".zarray").read_text())
  assert zarray["chunks"] == [1, 2, 5]
  assert zarray["compressor"] is None
  assert json.loads((written / "embed.embedding" / ".zarray").read_text())["chunks"] == [4, 5]


@pytest.mark.parametrize("sharded", [False, True])
def test_orbax_restores_written_parameters(written, same, sharded):
  expected = nest(as_haiku(PARAMS))
  expected["final_norm"]["scale"] = expected["final_norm"]["scale"].astype(np.float32)
  if not sharded:
    restored = ocp.StandardCheckpointer().restore(written)
    expected["final_norm"]["scale"] = PARAMS["final_norm/scale"]  # NumPy keeps float64
  else:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("x",))

    def target(values):
      parts = ("x",) if values.shape[0] % 3 == 0 else ()
      sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))
      return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)

    restored = ocp.StandardCheckpointer().restore(written, jax.tree.map(target, expected))
  jax.tree.map(same, restored, expected)


@pytest.fixture
def same():
  def compare(actual, expected):
    actual = np.asarray(actual)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()

  return compare


def test_written_parameters_are_read_back(written, same):
  arrays = parameter_store.open_parameters(written)
  assert arrays.keys() == PARAMS.keys()
  for path, expected in PARAMS.items():
    same(arrays[path][...], expected)


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_parameters_saved_by_orbax_are_read(tmp_path, same, ocdbt, nested):
  params = {path: values for path, values in PARAMS.items() if values.dtype != np.float64}
  tree = as_haiku(params)
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
  ocp.Checkpointer(handler).save(tmp_path / "params", nest(tree) if nested else tree)
  arrays = parameter_store.open_parameters(epath.Path(tmp_path / "params"))
  assert arrays.keys() == params.keys()
  for path, expected in params.items():
    found = np.concatenate([values for _, values in parameter_store.read_slices(arrays[path])])
    same(found, expected)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_array_with_a_missing_or_truncated_chunk_is_named(written, damage):
  chunk = written / "embed.embedding" / "1.0"
  if damage == "cut":
    chunk.write_bytes(chunk.read_bytes()[:-3])
  else:
    chunk.unlink()
  array = parameter_store.open_parameters(written)["embed/embedding"]
  with pytest.raises(ValueError, match="damaged .* cannot read embed/embedding") as error:
    list(parameter_store.read_slices(array))
  assert len(str(error.value)) < 400


def test_folder_without_metadata_is_refused(written):
  (written / "_METADATA").unlink()
  with pytest.raises(ValueError, match="not a complete checkpoint: .* has no valid _METADATA"):
    parameter_store.open_parameters(written)
