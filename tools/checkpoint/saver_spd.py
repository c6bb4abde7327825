"""Saver for Megatron-LM's tools/checkpoint/convert.py: writes a Hugging Face folder, an SPD export if there is a plan.

usage: PYTHONPATH=tools/checkpoint python MEGATRON/tools/checkpoint/convert.py --model-type GPT --loader core
       --load-dir DIR --saver spd --save-dir OUT --hf-config HF_DIR

--hf-config names the Hugging Face folder of the model, whose config.json and tokenizer go with the weights; from
--loader spd they come by themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_spd.errors import UserError
from megatron_spd.exchange import receive_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="SPD saver")
    group.add_argument(
        "--hf-config", help="Hugging Face folder with the config and the tokenizer of the model"
    )


def save_checkpoint(queue: Any, args: argparse.Namespace) -> None:
    try:
        fingerprint = receive_model(queue, Path(args.save_dir), args.hf_config, args.checking)
    except UserError as error:
        print(f"saver_spd: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"saved {args.save_dir}, fingerprint {fingerprint[:12]}")
