#!/usr/bin/env bash
# On-policy VGS in ms-swift 4.6.0 on one machine: bash configs/hosts/swift/train.sh [more arguments of swift rlhf]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export VGS_OPTIONS=${VGS_OPTIONS:-$here/vgs.yaml}
export NPROC_PER_NODE=${NPROC_PER_NODE:-1}  # more: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are swift's too
swift rlhf \
    --rlhf_type gkd \
    --external_plugins "$here/vgs_plugin.py" \
    --model "${STUDENT:-Qwen/Qwen3-VL-2B-Instruct}" \
    --teacher_model "${TEACHER:-Qwen/Qwen3-VL-8B-Instruct}" \
    --dataset "${DATA:?set DATA to a dataset of swift: rows with messages and images}" \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --lmbda 1.0 \
    --temperature 1.0 \
    --max_completion_length 1024 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-6 \
    --output_dir "${OUT:-runs/swift}" \
    "$@"
