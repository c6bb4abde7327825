"""Time to first token and between tokens, plain and SPD, on links of a set speed: the same as `megatron-spd bench`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
