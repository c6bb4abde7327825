#!/usr/bin/env bash
# Format, lint, types and all tests, in the project's own environment.
# usage: bash launch/test.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/vllm_env.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy
# Two workers share the two cores of a small machine; a file's tests stay together with their fixtures.
parallel=(pytest -n "${TEST_WORKERS:-2}" --dist loadfile --durations=30)
if [ $# -gt 0 ]; then
  exec "${parallel[@]}" "$@"
fi
status=0
"${parallel[@]}" --ignore tests/serving || status=$?
# vLLM's ranks spin while they wait for each other: they get the cores for themselves.
pytest --durations=10 tests/serving || status=$?
# The same code with the other version of Megatron-core; the script alone runs all of its list.
bash launch/test_megatron_versions.sh --short || status=$?
exit "$status"
