#!/bin/bash
# Several nodes of eight GPUs, until the recipe's budget is spent: one launcher a node, one process a GPU.
#
#   CONFIG=recipe.yaml STORE=stores/mine OUT=runs/mine sbatch --nodes 8 pretrain/recipes/slurm/nodes.sh
#
# STORE and OUT lie on a file system that all nodes share. batch_tokens of the recipe is over all ranks and must be a
# multiple of data.row_tokens times their number. Stopped, preempted or failed on one node: as in one-node.sh.
# PARALLEL=fsdp2 shards weights, gradients and optimizer state over all GPUs of all nodes.
#SBATCH --job-name=encoderkit
#SBATCH --nodes=2
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
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
port=$((29000 + SLURM_JOB_ID % 1000))

# The time limit is near: SIGTERM goes through srun and the launcher to the processes, which end their step and save;
# the launcher gives them 30 seconds. Then the job queues again. Preemption sends SIGTERM by itself.
trap 'is_time=yes; kill -TERM "$!"' USR1  # $! is known before step is

# SLURM_NODEID differs from node to node, so the inner shell reads it. --kill-on-bad-exit: one node down ends all, and
# Slurm may queue the job again.
export CONFIG STORE OUT first gpus port
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch \
        --config_file "pretrain/recipes/accelerate/${PARALLEL:-ddp}.yaml" \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$gpus" \
        --main_process_ip "$first" --main_process_port "$port" \
        -m encoderkit.pretrain run "$@"' launch "${run[@]}" &
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
