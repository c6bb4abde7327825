"""Write the SPD model as a Hugging Face folder: the same as `megatron-spd export`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
