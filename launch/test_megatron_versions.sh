#!/usr/bin/env bash
# The layer, checkpoint and distillation tests with Megatron-core 0.19.2, which lies beside the pinned version in the
# project's environment: .venv/megatron-core-0.19.2, made on first use.
# usage: bash launch/test_megatron_versions.sh [--short | pytest arguments]
#   --short   one test of each kind (launch/test.sh runs these)
set -euo pipefail

version=0.19.2
# Everything that touches Megatron-core's classes, checkpoints or training.
all=(
  tests/unit/checkpoint/test_megatron.py
  tests/unit/test_exchange.py
  tests/distributed/test_{megatron_version,block,branch_groups,spec,model,families,experts,sequence_parallel}.py
  tests/distributed/test_{transformer_engine,lowbit,dist_checkpoint,distill,finish,training,finetune}.py
)
short=(
  tests/distributed/test_megatron_version.py
  tests/distributed/test_spec.py::test_blocks_with_nothing_dropped_or_pending_are_stock
  "tests/distributed/test_block.py::test_every_variant[3-3-branch norms, biases and shifts]"
  "tests/distributed/test_block.py::test_every_variant[6-2-recompute]"
  "tests/distributed/test_families.py::test_megatron_model_is_the_formula[2-2-mixtral]"
  tests/distributed/test_dist_checkpoint.py::test_a_live_model_is_saved
  tests/distributed/test_dist_checkpoint.py::test_a_checkpoint_of_megatron_core_is_read
  "tests/distributed/test_distill.py::test_equals_a_plain_loop[2-2-1-2-student]"
  "tests/distributed/test_training.py::test_steps_are_those_of_one_process[tied-tp2 dp2, distributed optimizer]"
)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/env.sh
export PATH="$root/.venv/bin:$PATH"
beside="$root/.venv/megatron-core-$version"

# As in env.sh: of two scripts started together the second waits for the first.
if command -v flock >/dev/null; then
  exec 9>"$root/.venv.lock"
  flock 9
fi
if [ ! -d "$beside" ]; then
  log="$root/.venv/install-megatron-core.log"
  rm -rf "$beside.tmp"
  # It asks for Python 3.12 and runs on 3.11. Everything that it needs is there already.
  if ! python -m pip --disable-pip-version-check install --ignore-requires-python --no-deps --target "$beside.tmp" \
    "megatron-core==$version" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "test_megatron_versions.sh: installing megatron-core $version failed; the whole output is in $log" >&2
    exit 1
  fi
  mv "$beside.tmp" "$beside"
fi
exec 9>&-

export PYTHONPATH="$beside:$root${PYTHONPATH:+:$PYTHONPATH}"
export MEGATRON_CORE_VERSION="$version"
if [ "${1:-}" = --short ]; then
  exec pytest --durations=10 "${short[@]}"
fi
exec pytest -n "${TEST_WORKERS:-2}" --dist loadfile --durations=30 "${@:-${all[@]}}"
