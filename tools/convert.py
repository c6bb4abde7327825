"""Between Hugging Face folders, Megatron checkpoints and SPD exports: the same as `megatron-spd convert`."""

import sys

from megatron_spd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
