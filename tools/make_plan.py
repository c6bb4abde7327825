"""Choose the sync points to drop: the same as `megatron-spd plan`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
