#!/bin/bash
# One node of eight GPUs, until the recipe's budget is spent.
#
#   CONFIG=recipe.yaml STORE=stores/mine OUT=runs/mine sbatch pretrain/recipes/slurm/one-node.sh
#
# A job that is preempted, or stopped by its time limit and submitted again, goes on from the newest whole checkpoint:
# whether OUT exists already decides. What was computed since that checkpoint is computed again, so checkpoints.every_minutes
# says what a stop costs at most. STORE and OUT lie where a job on another node finds them.
# PARALLEL=fsdp2 shards weights, gradients and optimizer state.
#SBATCH --job-name=encoderkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${CONFIG:?the recipe}" "${STORE:?the store that prepare made}" "${OUT:?the run folder}"
if [ -f "$OUT/config.yaml" ]; then
    run=(--resume "$OUT")
else
    run=(--config "$CONFIG" --data.store "$STORE" --out "$OUT")
fi

srun accelerate launch \
    --config_file "pretrain/recipes/accelerate/${PARALLEL:-ddp}.yaml" \
    --num_processes "$SLURM_GPUS_ON_NODE" \
    -m encoderkit.pretrain run "${run[@]}"
