"""Loader for Megatron-LM's tools/checkpoint/convert.py: Hugging Face folders, SPD exports, Megatron checkpoints.

usage: PYTHONPATH=tools/checkpoint python MEGATRON/tools/checkpoint/convert.py --model-type GPT --loader spd
       --load-dir DIR --saver core --save-dir OUT

An SPD model goes to --saver spd only: other savers would lose its plan.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_spd.checkpoint.megatron import open_checkpoint
from megatron_spd.errors import UserError
from megatron_spd.exchange import send_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="SPD loader")
    group.add_argument(
        "--hf-config", help="Hugging Face folder with the config of a Megatron checkpoint that has none"
    )


def load_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    try:
        reader = open_checkpoint(Path(args.load_dir), args.hf_config)
        send_model(queue, reader, args.saver, args.model_type)
    except UserError as error:
        queue.put("exit")
        print(f"loader_spd: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BaseException:
        queue.put("exit")
        raise
