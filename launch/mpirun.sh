#!/bin/bash
# Ranks by mpirun, on this machine or on those of a host file; launch/pbs.sh uses it, too:
#
#   RANKS=4 launch/mpirun.sh configs/pretrain/cgcnn_1_500_500.yaml
#   RANKS=8 HOSTS=launch/hostfile.example launch/mpirun.sh CONFIG --set data.path=data/mptrj
#
# Started again, it goes on where it stopped. Ctrl-C ends it; `kill -USR1` of mpirun saves first.
set -euo pipefail

SITE=${SITE:-launch/site.sh}               # modules, proxies, fabric variables: sourced if it is there
RANKS=${RANKS:-2}
HOSTS=${HOSTS:-}                           # a host file; empty: this machine
PYTHON=${PYTHON:-.venv/bin/python}         # of the environment that dpt_hpc is installed in
MPIRUN=${MPIRUN:-$(dirname "$PYTHON")/mpiexec}
[ -x "$(command -v "$MPIRUN")" ] || MPIRUN=mpirun # of the MPI that mpi4py is linked against
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

config=${1:?which config? launch/mpirun.sh CONFIG [--set KEY=VALUE ...]}
shift
if [ -f "$SITE" ]; then
  # shellcheck source=/dev/null
  source "$SITE"
fi
case $("$MPIRUN" --version 2>&1) in
  *"Open MPI"* | *OpenRTE* | *PRRTE*)
    # dpt_hpc divides the cores itself: Open MPI would give each of two ranks one core, and its threads no more.
    options=(--bind-to none)
    if [ -n "$HOSTS" ]; then
      options+=(--hostfile "$HOSTS")
      # It hands no variables on to other hosts by itself; MPICH hands on all.
      for name in $(compgen -e | grep -E \
        '^(PATH|LD_LIBRARY_PATH|PYTHONPATH|(OMP|MKL|NCCL|GLOO|UCX|FI|TORCH|HDF5|DPT_HPC|MASTER|MPI4PY)_.*)$'); do
        options+=(-x "$name")
      done
    fi
    ;;
  *)
    options=()
    if [ -n "$HOSTS" ]; then
      # `name slots=4`, `name:4` and PBS's line for each rank, as MPICH wants them: name:4,...
      options+=(-hosts "$(awk '!/^#/ && NF {
        split($1, host, ":"); n = host[2] ? host[2] : 1
        for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i
        if (!(host[1] in slots)) order[++hosts] = host[1]
        slots[host[1]] += n
      } END { for (i = 1; i <= hosts; i++) printf("%s%s:%d", (i > 1 ? "," : ""), order[i], slots[order[i]]) }' "$HOSTS")")
    fi
    ;;
esac
exec "$MPIRUN" -n "$RANKS" "${options[@]}" "$PYTHON" -m dpt_hpc.launch "$config" \
  --resume --set "engine.world_size=$RANKS" "$@"
