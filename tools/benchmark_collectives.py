"""All-reduces in full against low-bit ones, on links of a set speed: the same as `megatron-spd collectives`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["collectives", *sys.argv[1:]]))
