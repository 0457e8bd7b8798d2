#!/bin/bash
# Ranks by DeepSpeed's own launcher, on this machine or on those of a host file:
#
#   RANKS=2 launch/deepspeed.sh configs/pretrain/cgcnn_1_500_500.yaml
#   HOSTS=launch/hostfile.example launch/deepspeed.sh CONFIG --set data.path=data/mptrj           (pdsh and ssh)
#   HOSTS=launch/hostfile.example LAUNCHER=openmpi launch/deepspeed.sh CONFIG --set engine.zero_stage=1
#
# LAUNCHER: pdsh, openmpi, mpich or slurm (inside an allocation). Started again, it goes on where it stopped.
set -euo pipefail

SITE=${SITE:-launch/site.sh}               # modules, proxies, fabric variables: sourced if it is there
RANKS=${RANKS:-2}                          # on this machine, where no host file is given
HOSTS=${HOSTS:-}                           # a host file: one line per host, `name slots=4`
LAUNCHER=${LAUNCHER:-pdsh}
PYTHON=${PYTHON:-.venv/bin/python}         # of the environment that dpt_hpc is installed in
INTERFACE=${INTERFACE:-}                    # for openmpi on several hosts: the network between them, such as ib0
DEEPSPEED=${DEEPSPEED:-$(dirname "$PYTHON")/deepspeed}
PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

config=${1:?which config? launch/deepspeed.sh CONFIG [--set KEY=VALUE ...]}
shift
if [ -f "$SITE" ]; then
  # shellcheck source=/dev/null
  source "$SITE"
fi
program=(--module dpt_hpc.launch)
if [ -z "$HOSTS" ]; then
  options=(--num_gpus "$RANKS" --master_port "$PORT")
else
  RANKS=$(awk '!/^#/ && sub(/.*slots=/, "") { ranks += $1 } END { print ranks }' "$HOSTS")
  first=$(awk '!/^#/ && NF { print $1; exit }' "$HOSTS")
  options=(--hostfile "$HOSTS" --launcher "$LAUNCHER" --master_port "$PORT" --master_addr "${MASTER_ADDR:-$first}")
  case $LAUNCHER in
    # Its default interface, eth0, is not every machine's; it would also bind each rank to one core.
    openmpi)
      if [ -z "$INTERFACE" ] && [ "$(awk '!/^#/ && NF { print $1 }' "$HOSTS" | sort -u | wc -l)" -gt 1 ]; then
        echo "$HOSTS names several hosts: set INTERFACE to the network between them (ip -brief address lists them)." >&2
        exit 4
      fi
      arguments="--bind-to none --mca btl_tcp_if_include ${INTERFACE:-lo}"
      options+=(--force_multi --no_ssh_check --launcher_args "${LAUNCHER_ARGS:-$arguments}")
      ;;
    mpich) options+=(--force_multi --no_ssh_check --launcher_args "${LAUNCHER_ARGS:-}") ;;
    slurm)
      options+=(--force_multi --no_ssh_check "--launcher_args=${LAUNCHER_ARGS:---kill-on-bad-exit=1}")
      # This runner of DeepSpeed passes --module over, and would give Python the name of a file.
      program=("$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("dpt_hpc.launch").origin)')")
      ;;
  esac
fi
exec "$DEEPSPEED" "${options[@]}" "${program[@]}" "$config" \
  --resume --set "engine.world_size=$RANKS" "$@"
