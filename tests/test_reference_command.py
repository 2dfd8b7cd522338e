"""The training command of the reference, with all of its flags."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m import families
from ll3m.families.tensor_rules import expected_tensors

SMALL = {
  "d_model": 16,
  "d_ff": 24,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 4,
  "head_dim": 4,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
  """A small Llama 2 in the published format: safetensors, config.json, SentencePiece tokenizer."""
  folder = tmp_path_factory.mktemp("checkpoints") / "Llama-2-7b-hf"
  folder.mkdir()
  preset = families.get_preset("llama_7b")
  config = preset.config.replace(**SMALL)
  rng = np.random.default_rng(0)
  specs = expected_tensors(preset.family.rules, config)
  tensors = {
    name: rng.normal(0, 0.02, spec.shape).astype(np.float16) for name, spec in specs.items()
  }
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(preset.family.to_hf_config(config)))
  (package,) = find_spec("mistral_common").submodule_search_locations
  tokenizer = Path(package) / "data" / "tokenizer.model.v1"  # 32000 pieces, like Llama's
  (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
  return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
  """32 TFRecord shards of each source of wikipedia_mixture."""
  import tensorflow as tf

  root = tmp_path_factory.mktemp("data")
  for source in ("cc_en", "wiki"):
    (root / source).mkdir()
    for shard in range(32):
      path = root / source / f"train-{shard:05d}-of-00032.tfrecord"
      with tf.io.TFRecordWriter(str(path)) as writer:
        feature = {
          "id": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"%d" % shard])),
          "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"some words"])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        writer.write(example.SerializeToString())
  return root


def test_convert_and_dry_run_with_the_flags_of_the_reference(
  llama, data_dir, run_command, tmp_path
):
  converted = tmp_path / "Llama-2-7b-ll3m"
  # The reference's --model='llama2_7b' is omitted, because these small weights do not match the
  # preset (see tests/hf/test_model_files.py); config.json describes them.
  done = run_command("convert", f"--checkpoint_dir={llama}", f"--output_file={converted}")
  assert done.returncode == 0, done.stderr
  sizes = ",".join(f"{name}={value}" for name, value in SMALL.items())
  done = run_command(
    "train",
    "--mesh_dim=-1,2,4",
    "--load_model_config=llama_7b",
    f"--update_model_config={sizes}",  # with data_dir, the only flag that the reference lacks
    f"--data_dir={data_dir}",
    "--checkpointer.save_optimizer_state=True",
    "--logger.online=True",
    f"--logger.output_dir={tmp_path / 'wiki-llama-2'}",
    "--train_dataset.type=seqio",
    "--train_dataset.seqio_dataset.mixture_or_task_name=wikipedia_mixture",
    "--train_dataset.seqio_dataset.batch_size=32",
    "--train_dataset.seqio_dataset.task_feature_field=('targets', )",
    "--train_dataset.seqio_dataset.task_feature_lengths=(2048, )",
    "--train_dataset.seqio_dataset.shuffle=True",
    "--dtype=bf16",
    "--param_dtype=bf16",
    "--optimizer.type=adamw",
    "--optimizer.accumulate_gradient_steps=4",
    "--optimizer.adamw_optimizer.lr=0.0001",
    "--optimizer.adamw_optimizer.end_lr=0.00001",
    "--optimizer.adamw_optimizer.lr_warmup_steps=5000",
    "--optimizer.adamw_optimizer.lr_decay_steps=200000",
    "--total_steps=200000",
    "--save_model_freq=25000",
    "--save_milestone_freq=50000",
    '--gin_bindings=data.data_utils.get_default_vocabulary.tokenizer_type="llama", '
    "data.data_utils.get_default_vocabulary.has_extra_token=False",
    f"--load_checkpoint=params::{converted}",
    "--dry_run",
    env={"XLA_FLAGS": "--xla_force_host_platform_device_count=16"},
  )
  assert done.returncode == 0, done.stderr
  assert "dp=2, fsdp=2, mp=4 (16 devices)" in done.stdout
  assert "32 x 4 sequences of 2048 tokens = 262,144 tokens per optimizer step" in done.stdout
  assert "the training step traces" in done.stdout
