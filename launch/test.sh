#!/usr/bin/env bash
# Format, lint, types and all tests, in the project's own environment.
# usage: bash launch/test.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/env.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy
pytest "$@"
