#!/usr/bin/env bash
# Distil a plan's units under the deepspeed launcher.
# usage: bash launch/distill.sh --ranks N --model DIR --plan FILE --out RUN [options of `megatron-spd distill`]
# All options may stand in a file: bash launch/distill.sh --ranks 3 --config distill.yaml --deepspeed_config zero1.json
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

ranks=1
previous=""
for argument in "$@"; do
  case "$argument" in --ranks=*) ranks="${argument#--ranks=}" ;; esac
  if [ "$previous" = --ranks ]; then ranks="$argument"; fi
  previous="$argument"
done
case "$ranks" in
  '' | *[!0-9]* | 0) echo "distill.sh: --ranks is '$ranks'; it must be a whole number >= 1" >&2; exit 2 ;;
esac

bash "$root/launch/env.sh"
export PATH="$root/.venv/bin:$PATH"

# The same accelerator and threads as `megatron-spd distill` chooses.
if [ -z "${DS_ACCELERATOR:-}" ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt "$ranks" ]; then
  export DS_ACCELERATOR=cpu
fi
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
exec deepspeed --quiet --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" "$root/tools/distill.py" "$@"
