#!/bin/bash
# Rendered by `leviathan train launch=slurm`; the configuration is in /jobs/big.
#SBATCH --job-name=big
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=1-00:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --constraint=h100
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclude=bad1,bad2
#SBATCH --dependency=afterok:17
#SBATCH --array=0-3%2
#SBATCH --chdir=/home/me
#SBATCH --output=/jobs/big/log-%a.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --qos=high

set -e
module load cuda/13
export PYTHONSAFEPATH=1
export NCCL_DEBUG='WARN, please'
export SRUN_CPUS_PER_TASK=96
ulimit -l unlimited
set +e

# srun's tasks get these signals too; this shell waits until they have saved
trap : TERM USR1
step() {
    srun --kill-on-bad-exit=0 --wait=300 --cpu-bind=none apptainer exec a.sif /python -u -m launch.slurm.job_step "$1" /jobs/big &
    pid=$!
    wait $pid; code=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done  # a signal ends only `wait`
    wait $pid 2>/dev/null; last=$?; [ $last = 127 ] || code=$last  # srun may have ended meanwhile
}
step doctor
[ $code != 0 ] || step train
apptainer exec a.sif /python -m launch.slurm.requeue /jobs/big $code; code=$?
[ $code != 75 ] || { code=0; . /jobs/big/again-${SLURM_ARRAY_TASK_ID:-0}.sh; }
exit $code
