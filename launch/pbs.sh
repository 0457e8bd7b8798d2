#!/bin/bash
# One run on any number of nodes under PBS. Submit it as it is; options on the command line win over the #PBS lines:
#
#   CPU    qsub -l select=2:ncpus=32:mpiprocs=8:ompthreads=4 -v CONFIG=configs/quickstart/pretrain.yaml launch/pbs.sh
#   GPU    qsub -l select=2:ncpus=32:ngpus=4:mpiprocs=4 -v CONFIG=...,ARGUMENTS="--set seed=1" launch/pbs.sh
#   five seeds      qsub -J 0-4 -v CONFIG=configs/finetune/cgcnn_jdft.yaml launch/pbs.sh
#
# WALL_SECONDS after its start, or at PBS's SIGTERM, the job saves. With REQUEUE=yes a job whose WALL_SECONDS are over is
# then queued again as it was submitted (qrerun); one that was ended by qdel is not.
# launch/README.md says what a site must set.
#PBS -N dpt_hpc
#PBS -l select=1:ncpus=1:mpiprocs=1
#PBS -l walltime=24:00:00
#PBS -j oe
#PBS -r y
set -uo pipefail
cd "${PBS_O_WORKDIR:-.}" || exit 4

SITE=${SITE:-launch/site.sh}               # modules, proxies, fabric variables: sourced if it is there
PYTHON=${PYTHON:-.venv/bin/python}         # of the environment that dpt_hpc is installed in
MPIEXEC=${MPIEXEC:-mpiexec}                # of the MPI that mpi4py is linked against
WALL_SECONDS=${WALL_SECONDS:-86220}        # save after so many seconds: the wall time less three minutes
REQUEUE=${REQUEUE:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

: "${CONFIG:?which config? qsub -v CONFIG=... launch/pbs.sh}"
: "${PBS_NODEFILE:?PBS sets it: submit this file with qsub}"
if [ -f "$SITE" ]; then
  # shellcheck source=/dev/null
  source "$SITE"
fi

ranks=$(grep -c . "$PBS_NODEFILE")
read -r -a arguments <<<"${ARGUMENTS:-}"
arguments+=(--resume --set "engine.world_size=$ranks")
if [ -n "${PBS_ARRAY_INDEX:-}" ]; then
  arguments+=(--set "run_dir=${RUN_DIR:-runs/$(basename "$CONFIG" .yaml)}/array_$PBS_ARRAY_INDEX")
  if grep -q '^task: *finetune' "$CONFIG"; then
    arguments+=(--set "seeds=[$PBS_ARRAY_INDEX]")
  else
    arguments+=(--set "seed=$PBS_ARRAY_INDEX")
  fi
fi

case $("$MPIEXEC" --version 2>&1) in
  *"Open MPI"* | *OpenRTE* | *PRRTE*) options=(--hostfile "$PBS_NODEFILE" --bind-to none) ;;
  *) options=(-f "$PBS_NODEFILE") ;;
esac
echo "== $(date '+%F %T') job ${PBS_JOBID:-}: $ranks ranks on $(sort -u "$PBS_NODEFILE" | paste -sd, -)"

# mpiexec passes USR1 on to the ranks, which save and end with exit code 75.
time_is_over=
trap 'told=yes; time_is_over=yes; kill -USR1 $step' USR1
trap 'told=yes; kill -USR1 $step' TERM
"$MPIEXEC" -n "$ranks" "${options[@]}" "$PYTHON" -m dpt_hpc.launch "$CONFIG" "${arguments[@]}" &
step=$!
(
  trap 'kill $!' TERM
  sleep "$WALL_SECONDS" &
  wait $! && kill -USR1 $$
) >/dev/null 2>&1 &
clock=$!
while told=; wait "$step"; code=$?; [ -n "$told" ]; do :; done
kill "$clock" 2>/dev/null

echo "== $(date '+%F %T') job ${PBS_JOBID:-}: exit code $code"
if [ "$code" -eq 75 ] && [ -n "$time_is_over" ] && [ -n "$REQUEUE" ]; then
  qrerun "$PBS_JOBID"
fi
exit "$code"
