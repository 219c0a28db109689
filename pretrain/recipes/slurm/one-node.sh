#!/bin/bash
# One node of eight GPUs, until the recipe's budget is spent.
#
#   CONFIG=recipe.yaml STORE=stores/mine OUT=runs/mine sbatch pretrain/recipes/slurm/one-node.sh
#
# A job that is preempted or at its time limit ends its step, saves and queues again; it goes on from the newest whole
# checkpoint: whether OUT holds a config.yaml decides. After a crash, what was computed since that checkpoint is computed
# again, so checkpoints.every_minutes says what it costs at most. STORE and OUT lie where a job on another node finds them.
# PARALLEL=fsdp2 shards weights, gradients and optimizer state.
#SBATCH --job-name=encoderkit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120  # two minutes before the time limit
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${CONFIG:?the recipe}" "${STORE:?the store that prepare made}" "${OUT:?the run folder}"
if [ -f "$OUT/config.yaml" ]; then
    run=(--resume "$OUT")
else
    run=(--config "$CONFIG" --data.store "$STORE" --out "$OUT")
fi

# The time limit is near: SIGTERM goes through srun and the launcher to the processes, which end their step and save;
# the launcher gives them 30 seconds. Then the job queues again. Preemption sends SIGTERM by itself.
trap 'is_time=yes; kill -TERM "$!"' USR1  # $! is known before step is

srun accelerate launch \
    --config_file "pretrain/recipes/accelerate/${PARALLEL:-ddp}.yaml" \
    --num_processes "$SLURM_GPUS_ON_NODE" \
    -m encoderkit.pretrain run "${run[@]}" &
step=$!
status=0
wait "$step" || true
while kill -0 "$step" 2> /dev/null; do  # a signal ends wait, and not the step
    wait "$step" || true
done
wait "$step" || status=$?  # told again, as the wait before may have ended by the signal
if [ "${is_time:-}" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
