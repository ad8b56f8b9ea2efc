#!/bin/bash
# Training on the GPUs of several nodes: sbatch examples/slurm.sh. The run's folder must be on a file system that all nodes see.
# Submitted again, it goes on where it was, also on another number of nodes.
#SBATCH --job-name=fnlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

# Five minutes before the end SLURM sends SIGTERM; torchrun gives it to its ranks, and all of them save.
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${nodes[0]}:29500" \
    -m cli train gpt2 data/web --out runs/gpt2 --resume auto \
    --strategy hsdp --mesh "replica=$SLURM_NNODES,shard=$SLURM_GPUS_ON_NODE" "$@"
