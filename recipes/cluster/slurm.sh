#!/bin/bash
# Train on several nodes under Slurm, as long as it takes: before its time is up, the job saves and queues again.
#
#   sbatch recipes/cluster/slurm.sh --recipe mistral-7b --data my.jsonl --out runs/mine
#
# srun starts a process for each GPU, and `ptp train` joins them. The arguments are those of `ptp train`. They must
# have --out, on a file system that all nodes share.
#SBATCH --job-name=ptp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

out=
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        --out | -o) out=${!next} ;;
        --out=*) out=${!i#--out=} ;;
    esac
done
if [[ -z $out ]]; then
    echo "error: slurm.sh needs --out FOLDER among the arguments of ptp train." >&2
    exit 2
fi

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" ptp train "$@" --resume auto || exit

# It exited with 0 but has no summary: the signal above stopped it, and it continues in the next slot.
if [[ ! -e $out/summary.json ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
