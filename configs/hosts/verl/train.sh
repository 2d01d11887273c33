#!/usr/bin/env bash
# On-policy VGS in verl 0.9.1: bash configs/hosts/verl/train.sh [more settings of verl]
#
# One machine: as it stands. Several: start Ray on each (ray start --head; ray start --address HEAD:6379), then run this
# on the head with NODES set. Every machine needs vgs installed, and the file of VGS_OPTIONS at the same path.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export VERL_ENGINE_VENDOR=vgs
export VERL_USE_EXTERNAL_MODULES=vgs.integrations.verl  # an error in the plugin stops the run; verl's own loader hides it
export VGS_OPTIONS=${VGS_OPTIONS:-$here/vgs.yaml}
python -m vgs.integrations.verl  # stops here where verl would train without VGS

env=+ray_kwargs.ray_init.runtime_env.env_vars
actor=actor_rollout_ref.actor
rollout=actor_rollout_ref.rollout
python -m verl.trainer.main_ppo \
    "$env.VERL_ENGINE_VENDOR=$VERL_ENGINE_VENDOR" \
    "$env.VERL_USE_EXTERNAL_MODULES=$VERL_USE_EXTERNAL_MODULES" \
    "$env.VGS_OPTIONS=$VGS_OPTIONS" \
    trainer.nnodes="${NODES:-1}" \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    trainer.project_name=vgs \
    trainer.experiment_name="${NAME:-vgs}" \
    trainer.total_epochs="${EPOCHS:-1}" \
    data.train_files="${TRAIN:?set TRAIN to a parquet file with the columns prompt, images and reward_model}" \
    data.val_files="${VAL:-$TRAIN}" \
    data.train_batch_size=128 \
    data.max_prompt_length=2048 \
    data.max_response_length=1024 \
    data.return_raw_chat=True \
    actor_rollout_ref.model.path="${STUDENT:-Qwen/Qwen3-VL-2B-Instruct}" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.model.use_remove_padding=True \
    $actor.strategy=fsdp2 \
    $actor.optim.lr=1e-6 \
    $actor.ppo_mini_batch_size=128 \
    $actor.ppo_micro_batch_size_per_gpu=4 \
    $actor.use_kl_loss=False \
    $rollout.name=vllm \
    $rollout.n=4 \
    $rollout.log_prob_micro_batch_size_per_gpu=8 \
    $rollout.temperature=1.0 \
    $rollout.gpu_memory_utilization=0.5 \
    $rollout.tensor_model_parallel_size=1 \
    $rollout.agent.default_agent_loop=vgs_single_turn \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    "$@"
