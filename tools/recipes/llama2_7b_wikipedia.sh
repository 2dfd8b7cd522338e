#!/usr/bin/env bash
# Goes on training Llama 2 7B on Wikipedia, on a TPU v3-64 or any machine that `ll3m.plan` accepts.
#
#   python tools/tpu_run.py --tpu=NAME --env=BUCKET=gs://mine \
#     --script=tools/recipes/llama2_7b_wikipedia.sh
#
# BUCKET holds Llama-2-7b-ll3m (ll3m.convert's output) and data (docs/dataset.md), and gets the run.
#
#   tools/recipes/llama2_7b_wikipedia.sh --dry_run [flags]
#
# checks every flag and plans the run for TOPOLOGY (v3:4x8) here, without data, weights or a TPU.
# Further flags are passed on.
set -euo pipefail

bucket="${BUCKET:-gs://YOUR_BUCKET}"
run=(
  --mesh_dim='-1,2,4'
  --load_model_config='llama_7b'
  --checkpointer.save_optimizer_state=True
  --logger.online=True
  --logger.output_dir="$bucket/LL3M/models/wiki-llama-2"
  --train_dataset.type='seqio'
  --train_dataset.seqio_dataset.mixture_or_task_name='wikipedia_mixture'
  --train_dataset.seqio_dataset.batch_size=32
  --train_dataset.seqio_dataset.task_feature_field="('targets', )"
  --train_dataset.seqio_dataset.task_feature_lengths='(2048, )'
  --train_dataset.seqio_dataset.shuffle=True
  --dtype='bf16'
  --param_dtype='bf16'
  --optimizer.type='adamw'
  --optimizer.accumulate_gradient_steps=4
  --optimizer.adamw_optimizer.lr=0.0001
  --optimizer.adamw_optimizer.end_lr=0.00001
  --optimizer.adamw_optimizer.lr_warmup_steps=5000
  --optimizer.adamw_optimizer.lr_decay_steps=200000
  --total_steps=200000
  --save_model_freq=25000
  --save_milestone_freq=50000
  --gin_bindings='data.data_utils.get_default_vocabulary.tokenizer_type="llama", data.data_utils.get_default_vocabulary.has_extra_token=False'
  --load_checkpoint="params::$bucket/Llama-2-7b-ll3m"
  # Of our own: where the data lies, what is computed again so that it fits, and all hosts together.
  --data_dir="$bucket/data"
  --remat='full'
)

if [ "${1:-}" = --dry_run ]; then
  exec python3 -m ll3m.plan --topology="${TOPOLOGY:-v3:4x8}" "${run[@]}" "${@:2}"
fi
: "${BUCKET:?set BUCKET to the gs:// folder that holds the model and the data}"
exec python3 -m ll3m.train "${run[@]}" --jax_distributed.auto "$@"
