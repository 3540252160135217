"""`python -m llava_kd`: the same command as `llava-kd`."""

import sys

from llava_kd.cli import command

if __name__ == "__main__":
    sys.exit(command())
