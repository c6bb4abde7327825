"""Measure what dropping each sync point costs: the same as `megatron-spd sensitivity`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["sensitivity", *sys.argv[1:]]))
