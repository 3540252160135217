#!/usr/bin/env bash
#SBATCH --job-name=llava_kd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Usage: sbatch [--nodes=4 --partition=... --account=...] scripts/slurm.sh scripts/stage1_dpt.sh [--a.b=value ...]
# One launcher a machine. Ten minutes before the time limit, or when it is preempted, the run writes a checkpoint
# and the job goes back into the queue; it goes on from there under the same job id.
set -euo pipefail
if [ $# -eq 0 ]; then echo "usage: sbatch scripts/slurm.sh scripts/stage1_dpt.sh [--a.b=value ...]" >&2; exit 2; fi
preempted=0 interrupted=0 step=""
tell() { if [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null || true; fi; } # srun hands it to every machine's script
trap 'preempted=1; tell' USR1 TERM
trap 'interrupted=1; tell' INT

export NNODES="$SLURM_NNODES"
export NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" # whole: a pipe into head ends some of these jobs at their start
MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# Each machine's shell learns its number only there, so it is read inside. Some versions of srun forget the job's
# cpus-per-task, and would leave all ranks and their data workers one core.
cores=()
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then cores=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
status=0
if [ "$preempted$interrupted" = 00 ]; then
  srun --kill-on-bad-exit=1 "${cores[@]}" bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$@"' stage "$@" &
  step=$!
  if [ "$preempted$interrupted" != 00 ]; then tell; fi # it came while srun started
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal cuts a wait short
  wait "$step" || status=$?
fi
# Above 128: the signal came before the script that was told could hear it.
if [ "$interrupted" -eq 1 ] && { [ "$status" -eq 0 ] || [ "$status" -gt 128 ]; }; then exit 130; fi
if [ "$preempted" -eq 1 ] && { [ "$status" -eq 0 ] || [ "$status" -gt 128 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
