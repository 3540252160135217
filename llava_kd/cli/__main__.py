"""`python -m llava_kd.cli`, for launchers that start modules."""

import sys

from llava_kd.cli.main import command

if __name__ == "__main__":
    sys.exit(command())
