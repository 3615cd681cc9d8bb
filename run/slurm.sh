#!/bin/sh
# A training run on several machines under SLURM, which is requeued when its time limit is reached:
#
#   sbatch run/slurm.sh configs/clipspm/hmdb51.yaml TRAIN.SHOT=5
#
# Edit the numbers below. SLURM itself starts one process for each GPU, so torchrun is not needed. Three minutes before
# the limit it sends SIGUSR1 to each of them: they finish the step, save, and exit with code 75. Then the job is requeued
# and resumes; --resume starts a new run if there is nothing to resume.

#SBATCH --job-name=few-shot
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -eu
: "${1:?usage: sbatch run/slurm.sh CONFIG [KEY=VALUE ...]}"
PYTHON=${PYTHON:-.venv/bin/python}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))    # differs by job, in case two jobs share a machine
export PYTHON MASTER_ADDR MASTER_PORT

code=0
srun --kill-on-bad-exit=1 sh -c '
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
    exec "$PYTHON" run/run.py --resume --cfg "$@"' sh "$@" || code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
