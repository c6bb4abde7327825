#!/usr/bin/env bash
# The whole chain on SmolLM2-135M; stopped half-way, the same command goes on.
# usage: bash examples/smollm2-135m/run.sh RUN [options of `megatron-spd run`]
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:?usage: run.sh RUN [options]}"
shift
mkdir -p "$out"
megatron-spd prepare --model smollm2-135m --out "$out/model"
megatron-spd run --config "$here/run.yaml" --model "$out/model" --out "$out/run" "$@"
