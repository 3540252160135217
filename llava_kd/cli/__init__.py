"""`llava-kd` on the command line."""

from llava_kd.cli.main import command, main

__all__ = ["command", "main"]
