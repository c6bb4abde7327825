"""Recover the blocks that a plan marks: the same as `megatron-spd distill`.

Also the program that the deepspeed launcher (launch/distill.sh) and torchrun start on every rank.
"""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
