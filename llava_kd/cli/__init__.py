"""`llava-kd` on the command line."""

from llava_kd.cli.main import main

__all__ = ["main"]
