#!/bin/bash
# Two nodes of 8 GPUs, one process per node. Submit it in a clone on a file system that both nodes see:
#   sbatch docs/jobs/slurm-two-nodes.sh
#SBATCH --job-name=gemma-tuning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
# Five minutes before the limit Slurm sends SIGTERM: the run saves a checkpoint and ends. The same job resumes it.
#SBATCH --signal=TERM@300
set -euo pipefail
. .venv/bin/activate
export GEMMA_TUNING_CACHE=$PWD/.gemma-tuning
export COORDINATOR_ADDRESS=$SLURMD_NODENAME:8476
# Settings, preset and data once, on the first node.
python -m stages.profile gpus-8 --set 'mesh.shape=[2, 8]'
for stage in fetch prepare tokenize quantize; do
  env -u COORDINATOR_ADDRESS python -m stages.$stage
done
for stage in load finetune "evaluate --variant baseline" "evaluate --variant tuned"; do
  srun --kill-on-bad-exit=1 python -m stages.$stage
done
