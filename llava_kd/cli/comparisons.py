"""Commands that compare ways to train."""

from __future__ import annotations

import argparse

from llava_kd.assembly.early import look_at_file
from llava_kd.cli.words import Commands, command, count


def add(commands: Commands) -> None:
    what = "train and score the arms of an ablation file over its seeds; go on with what is there"
    ablate = command(commands, "ablate", _ablate, what, takes_settings=True)
    ablate.add_argument("file", help="YAML file; settings that follow as --a.b=value go to every stage")
    ablate.add_argument("--out", help="directory (default: the file's `output`)")
    ablate.add_argument("--arms", type=_names, help="names joined by commas (default: all)")
    ablate.add_argument(
        "--seeds", type=_numbers, help="of those of the file, joined by commas (default: all)"
    )
    ablate.add_argument("--jobs", type=count, help="how many at once (default: one a GPU, or one a core)")
    ablate.add_argument(
        "--dry_run", action="store_true", help="say what is to be trained, and how long it takes"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [count(name, least=0) for name in _names(text)]


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _ablate(arguments: argparse.Namespace) -> int:
    look_at_file(arguments.file, "ablation", "examples are in ablations/")
    from llava_kd.assembly.ablate import Choice, ablate

    choice = Choice(output=arguments.out, arms=arguments.arms, seeds=arguments.seeds, num_jobs=arguments.jobs)
    return ablate(arguments.file, arguments.overrides, choice, is_dry=arguments.dry_run)
