"""Measure the perplexity of a plain or an exported SPD folder: the same as `megatron-spd evaluate`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
