#!/bin/sh
# Replaces SLURM in test_sweep_cluster.py: the name that it is called by is the command. QUEUE is its folder; every
# job starts at once, `scontrol requeue` starts it again when it has ended.
case "$(basename "$0")" in
sbatch)
    number=$(($(cat "$QUEUE/number" 2>/dev/null || echo 100) + 1))
    echo "$number" >"$QUEUE/number"
    cp "$1" "$QUEUE/$number.batch"
    last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$1")
    for task in $(seq 0 "${last:-0}"); do
        job=$number${last:+_$task}
        touch "$QUEUE/queued_$job"
        (
            export SLURM_JOB_ID="$number" JOB="$job"
            [ -z "$last" ] || export SLURM_ARRAY_JOB_ID="$number" SLURM_ARRAY_TASK_ID="$task"
            again=yes
            while [ "$again" ]; do
                again=
                bash "$QUEUE/$number.batch"
                rm "$QUEUE/requeued_$job" 2>/dev/null && again=yes
            done
            rm "$QUEUE/queued_$job"
        ) >/dev/null 2>&1 &
    done
    echo "Submitted batch job $number" ;;
srun)
    while [ "${1#-}" != "$1" ]; do
        case "$1" in --output | --error) shift ;; esac
        shift
    done
    echo $$ >"$QUEUE/process_$JOB"
    exec "$@" ;;
squeue) cd "$QUEUE" && for file in queued_*; do echo "${file#queued_}"; done ;;
scontrol) touch "$QUEUE/requeued_$2" ;;
scancel) # --signal=TERM JOB: to all processes of the job
    process=$(cat "$QUEUE/process_$2")
    kill -TERM $(ps -o pid= --ppid "$process") "$process" ;;
esac
