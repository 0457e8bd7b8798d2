#!/bin/bash
# One process on this machine: a laptop, or one GPU. The same config as everywhere else:
#
#   launch/local.sh configs/pretrain/cgcnn_1_500_500.yaml --set training.epochs=2
#
# Started again, it goes on where it stopped.
set -euo pipefail

SITE=${SITE:-launch/site.sh}               # modules, proxies: sourced if it is there
PYTHON=${PYTHON:-.venv/bin/python}         # of the environment that dpt_hpc is installed in
config=${1:?which config? launch/local.sh CONFIG [--set KEY=VALUE ...]}
shift
if [ -f "$SITE" ]; then
  # shellcheck source=/dev/null
  source "$SITE"
fi
exec "$PYTHON" -m dpt_hpc.launch "$config" --resume --set engine.world_size=1 "$@"
