#!/bin/bash
# Ranks by mpirun, on this machine or on those of a host file, without a queue:
#
#   RANKS=4 launch/mpirun.sh configs/pretrain/cgcnn_1_500_500.yaml
#   RANKS=8 HOSTS=launch/hostfile.example launch/mpirun.sh CONFIG --set data.path=data/mptrj
#
# Started again, it goes on where it stopped. Ctrl-C ends it; `kill -USR1` of mpirun saves first.
set -euo pipefail

RANKS=${RANKS:-2}
HOSTS=${HOSTS:-}                           # a host file; empty: this machine
PYTHON=${PYTHON:-.venv/bin/python}         # of the environment that dpt_hpc is installed in
MPIRUN=${MPIRUN:-$(dirname "$PYTHON")/mpiexec}
[ -x "$MPIRUN" ] || MPIRUN=mpirun          # of the MPI that mpi4py is linked against
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

config=${1:?which config? launch/mpirun.sh CONFIG [--set KEY=VALUE ...]}
shift
case $("$MPIRUN" --version 2>&1) in
  # dpt_hpc divides the cores itself: Open MPI would give each of two ranks one core, and its threads no more.
  *"Open MPI"* | *OpenRTE* | *PRRTE*) options=(--bind-to none ${HOSTS:+--hostfile "$HOSTS"}) ;;
  *) options=(${HOSTS:+-f "$HOSTS"}) ;;
esac
exec "$MPIRUN" -n "$RANKS" "${options[@]}" "$PYTHON" -m dpt_hpc.launch "$config" \
  --resume --set "engine.world_size=$RANKS" "$@"
