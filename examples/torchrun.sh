#!/usr/bin/env bash
# Several machines without a scheduler: run this on each, with its own NODE_RANK.
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash examples/torchrun.sh recipe.toml [--section.field VALUE ...]
# On one machine `flame train recipe.toml` needs no torchrun, restarts by itself and ends with 75 where it was stopped.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${RANKS:-gpu}" \
    --master-addr "${HEAD:-localhost}" \
    --master-port "${PORT:-29500}" \
    --max-restarts "${RESTARTS:-10}" \
    --module flame train "$@"
