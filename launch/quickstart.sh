#!/usr/bin/env bash
# From a bare machine to an SPD model with its report: SmolLM2-135M from its package, text from Python's library, three
# tensor-parallel ranks. Stopped half-way, the same command goes on.
# usage: bash launch/quickstart.sh [options of `megatron-spd run`]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/env.sh"
export PATH="$root/.venv/bin:$PATH" HF_HUB_OFFLINE=1

runs="$root/runs/quickstart"
mkdir -p "$runs"
megatron-spd prepare --model smollm2-135m --out "$runs/model"
# Half of all sync points. Measured on little text, and on a slow machine training is cut short rather than the quarter of
# an hour exceeded.
megatron-spd run --model "$runs/model" --out "$runs/run" --branches 3 --ranks 3 --drop-ratio 0.5 \
  --sequences 4 --calibration-sequences 16 --search-budget 6 --distill-sequences 48 --finish-sequences 320 \
  --max-minutes 11 "$@"
