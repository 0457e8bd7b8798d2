#!/bin/bash
# One run on any number of nodes under PBS. Submit it as it is; options on the command line win over the #PBS lines:
#
#   CPU    qsub -l select=2:ncpus=32:mpiprocs=8:ompthreads=4 -v CONFIG=configs/quickstart/pretrain.yaml launch/pbs.sh
#   GPU    qsub -l select=2:ncpus=32:ngpus=4:mpiprocs=4 -v CONFIG=...,ARGUMENTS="--set seed=1" launch/pbs.sh
#   five seeds      qsub -J 0-4 -v CONFIG=configs/finetune/cgcnn_jdft.yaml launch/pbs.sh
#
# Three minutes before its wall time is over the job saves (at PBS's own SIGTERM only if mpiexec lets the ranks do so).
# With REQUEUE=yes a job whose time is over, or that has lost a rank, is queued again as it was submitted (qrerun); one
# that was ended by qdel is not.
# launch/README.md says what a site must set.
#PBS -N dpt_hpc
#PBS -l select=1:ncpus=1:mpiprocs=1
#PBS -l walltime=24:00:00
#PBS -j oe
#PBS -r y
set -uo pipefail
cd "${PBS_O_WORKDIR:-.}" || exit 4

export SITE=${SITE:-launch/site.sh}        # modules, proxies, fabric variables: sourced if it is there
LAUNCH=${LAUNCH:-launch}                   # where mpirun.sh is
export PYTHON=${PYTHON:-.venv/bin/python}  # of the environment that dpt_hpc is installed in
export MPIRUN=${MPIEXEC:-mpiexec}          # of the MPI that mpi4py is linked against
WALL_SECONDS=${WALL_SECONDS:-}             # save after so many seconds; else 180 before the wall time that PBS tells
REQUEUE=${REQUEUE:-}
MAX_RESTARTS=${MAX_RESTARTS:-100}          # a job that was started again so often does not survive the loss of a rank

: "${CONFIG:?which config? qsub -v CONFIG=... launch/pbs.sh}"
: "${PBS_NODEFILE:?PBS sets it: submit this file with qsub}"

asked() { # what PBS says of this job
  qstat -f "${PBS_JOBID:-}" 2>/dev/null | awk -F ' = ' -v name="$1" '$1 ~ name "$" { print $2; exit }'
}
if [ -z "$WALL_SECONDS" ]; then
  WALL_SECONDS=$(asked 'Resource_List[.]walltime' | awk -F : '{
    seconds = NF == 4 ? $1 * 86400 + $2 * 3600 + $3 * 60 + $4 : ($1 * 60 + $2) * 60 + $3
    print (seconds > 360 ? seconds - 180 : int(seconds / 2))
  }')
fi
runs=$(asked run_count)
export DPT_HPC_RESTARTS=$((${runs:-1} > 1 ? runs - 1 : 0))

ranks=$(grep -c . "$PBS_NODEFILE")
read -r -a arguments <<<"${ARGUMENTS:-}"
if [ -n "${PBS_ARRAY_INDEX:-}" ]; then
  arguments+=(--array "$PBS_ARRAY_INDEX") # one seed each, in a directory of its own
fi
echo "== $(date '+%F %T') job ${PBS_JOBID:-}: $ranks ranks on $(sort -u "$PBS_NODEFILE" | paste -sd, -)," \
  "to save after ${WALL_SECONDS:-86220} s"

# mpiexec passes USR1 on to the ranks, which save and end with exit code 75.
step=
told=
time_is_over=
trap 'told=yes; time_is_over=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1
trap 'told=yes; [ -z "$step" ] || kill -USR1 "$step"' TERM
RANKS=$ranks HOSTS=$PBS_NODEFILE bash "$LAUNCH/mpirun.sh" "$CONFIG" "${arguments[@]}" &
step=$!
(
  trap 'kill $!' TERM
  sleep "${WALL_SECONDS:-86220}" &
  wait $! && kill -USR1 $$
) >/dev/null 2>&1 &
clock=$!
while told=; wait "$step"; code=$?; [ -n "$told" ]; do :; done
kill "$clock" 2>/dev/null

echo "== $(date '+%F %T') job ${PBS_JOBID:-}: exit code $code"
again=
case $code in
  75) again=$time_is_over ;;
  76 | 134 | 135 | 137 | 138 | 139) # a rank was lost; 143 may be qdel's
    if [ "$DPT_HPC_RESTARTS" -lt "$MAX_RESTARTS" ]; then again=yes; fi
    ;;
esac
if [ -n "$again" ] && [ -n "$REQUEUE" ]; then
  qrerun "$PBS_JOBID"
fi
exit "$code"
