#!/usr/bin/env bash
# One training command on the nodes of a Slurm cluster.
#
#     RUN=/shared/runs/first sbatch tools/launch/slurm.sh --config=configs/pretrain.py
#
# JAX reads from Slurm where each process sits. This starts one process a GPU, each of which sees
# all GPUs of its node and takes the one with its number, so let Slurm bind none (no --gpus-per-task).
# For one process a node, set --ntasks-per-node=1: then it takes all of them.
#SBATCH --job-name=llm_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Two minutes before the time is over all processes write a checkpoint and exit with 143.
#SBATCH --signal=TERM@120
set -euo pipefail

RUN=${RUN:?the run directory, on a disk that all nodes share}
PYTHON=${PYTHON:-python3}

if [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi
exec srun --kill-on-bad-exit=1 "$PYTHON" -m llm_jax.main --workdir="$RUN" "$@"
