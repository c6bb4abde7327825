#!/usr/bin/env bash
# Distil a plan's units under the deepspeed launcher.
# usage: bash launch/distill.sh --ranks N --model DIR --plan FILE --out RUN [options of `megatron-spd distill`]
# All options may stand in a file: bash launch/distill.sh --ranks 3 --config distill.yaml --deepspeed_config zero1.json
# Several nodes: HOSTFILE=hosts bash launch/distill.sh [options], with lines "name slots=8" in DeepSpeed's hostfile, started
# once where ssh (pdsh) reaches all of them; the ranks are all slots, and --ranks is left out. Without ssh, start on every
# node: HOSTFILE=hosts NODE_RANK=<line of this node, from 0> MASTER_ADDR=<first node> bash launch/distill.sh [options]
# The repository, its .venv and the folders that the options name lie on a disk that all nodes see.
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

where=(--num_accelerators "$ranks")
if [ -n "${HOSTFILE:-}" ]; then
  # The most ranks of a node share its cores.
  ranks="$(sed -n 's/^[^#]*slots=\([0-9][0-9]*\).*/\1/p' "$HOSTFILE" 2>/dev/null | sort -n | tail -n 1 || true)"
  if [ "${ranks:-0}" -lt 1 ]; then
    echo "distill.sh: HOSTFILE is '$HOSTFILE'; it must be a file with lines such as 'node1 slots=8'" >&2
    exit 2
  fi
  where=(--hostfile "$HOSTFILE")
  if [ -n "${NODE_RANK:-}" ]; then
    where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-}")
    if [ -z "${MASTER_ADDR:-}" ]; then
      echo "distill.sh: NODE_RANK is $NODE_RANK, but MASTER_ADDR is not set; give the address of the first node" >&2
      exit 2
    fi
  elif [ -n "${MASTER_ADDR:-}" ]; then
    where+=(--master_addr "$MASTER_ADDR")
  fi
fi

bash "$root/launch/env.sh"
export PATH="$root/.venv/bin:$PATH"

# The same accelerator and threads as `megatron-spd distill` chooses.
if [ -z "${DS_ACCELERATOR:-}" ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt "$ranks" ]; then
  export DS_ACCELERATOR=cpu
fi
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
exec deepspeed --quiet "${where[@]}" --master_port "${MASTER_PORT:-29500}" "$root/tools/distill.py" "$@"
