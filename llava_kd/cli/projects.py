"""Commands of a user's own project: begin one, watch its runs, describe the machine for a bug report."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_kd.cli.words import Commands, command, count, show


def add(commands: Commands) -> None:
    what = "create a project of three stages from your own pictures and a table of questions and answers"
    init = command(commands, "init", _init, what, takes_settings=True)
    init.add_argument(
        "directory", help="new folder; settings after it, as --a.b=value, go into its stage files"
    )
    init.add_argument(
        "--images", help="folder of pictures (default: the folder of --data, or the current folder)"
    )
    table = (
        ".csv or .xlsx (columns image, question, answer) or LLaVA .json (default: the only such file next "
        "to the pictures)"
    )
    init.add_argument("--data", help=table)
    init.add_argument("--columns", type=_columns, default={}, metavar="image=A,question=B,answer=C")
    init.add_argument("--question", help="the question for every picture, if the table has no questions")
    init.add_argument(
        "--teacher", help="stock LLaVA directory (default: DIRECTORY/teacher; put the teacher there)"
    )
    init.add_argument("--student", help="stock LLaVA directory to continue from, instead of the next two")
    init.add_argument("--vision_tower", help="of a new student: directory or id")
    init.add_argument("--language_model", help="of a new student: directory or id")
    held = "share of the records for choosing the checkpoint, and the same share for the test (default: 0.1)"
    init.add_argument("--held_out", type=_held_out, default=0.1, help=held)
    init.add_argument(
        "--skip_bad", action="store_true", help="leave out bad records, such as records with missing pictures"
    )

    recipes = commands.add_parser("recipes", help="list or copy the recipes of the package")
    kinds = recipes.add_subparsers(dest="command", required=True)
    command(kinds, "list", _recipes_list, "list the recipes")
    taken = command(
        kinds, "copy", _recipes_copy, "copy the files of a recipe into a new folder, for you to edit"
    )
    taken.add_argument("name", help="a name from `llava-kd recipes list`")
    taken.add_argument("directory", help="new folder")

    watch = command(
        commands, "watch", _watch, "show losses, speed and time left of a run, read from its files"
    )
    watch.add_argument(
        "directory",
        metavar="RUN",
        help="output_dir of a run, or a folder of runs (the most recent run is shown)",
    )
    watch.add_argument("--every", type=count, default=5, help="seconds between updates")
    watch.add_argument(
        "--once", action="store_true", help="print once and exit (the default without a terminal)"
    )

    what = "print versions, GPUs and optional packages for a bug report; no paths, no environment variables"
    command(commands, "env", _env, what)


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not key.strip() or not name.strip() for key, _, name in pairs):
        raise argparse.ArgumentTypeError(f"must be image=A,question=B,answer=C; got {text}")
    return {key.strip(): name.strip() for key, _, name in pairs}


def _held_out(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.4:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 0.4; got {text}")
    return value


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _init(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.projects.own_data import Given, find_data, refuse_taken

    refuse_taken(Path(arguments.directory).absolute())
    given = Given(
        images=arguments.images,
        data=arguments.data,
        columns=arguments.columns,
        question=arguments.question,
        held_out=arguments.held_out,
        skip_bad=arguments.skip_bad,
    )
    data = find_data(given, Path.cwd())
    from llava_kd.assembly.projects.init import Models, begin  # late: what is wrong above is said at once

    models = Models(
        teacher=arguments.teacher,
        student=arguments.student,
        vision_tower=arguments.vision_tower,
        language_model=arguments.language_model,
    )
    show("\n".join(begin(arguments.directory, data, models, arguments.overrides)))
    return 0


def _recipes_list(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.projects.recipes import listed

    show("\n".join(listed()))
    return 0


def _recipes_copy(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.projects.recipes import copy

    show("\n".join(copy(arguments.name, arguments.directory)))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.watching.watch import watch

    watch(arguments.directory, every=arguments.every, once=arguments.once)
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.projects.environment import describe

    show(describe())
    return 0
