"""Commands that compare ways to train."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_kd.assembly.early import look_at_file
from llava_kd.cli.words import Commands, command, count, show

STORE = "runs/store.sqlite"  # as in search/proposing/space.py, which reads YAML


def add(commands: Commands) -> None:
    what = "train and score the arms of an ablation file over its seeds; resume unfinished work"
    ablate = command(commands, "ablate", _ablate, what, takes_settings=True)
    ablate.add_argument("file", help="YAML file; settings after it, as --a.b=value, apply to every stage")
    ablate.add_argument("--out", help="directory (default: the file's `output`)")
    ablate.add_argument("--arms", type=_names, help="arm names separated by commas (default: all)")
    ablate.add_argument(
        "--seeds", type=_numbers, help="seeds of the file, separated by commas (default: all)"
    )
    ablate.add_argument(
        "--with",
        dest="elsewhere",
        action="append",
        type=Path,
        default=[],
        metavar="RESULTS.json",
        help="results of other arms or seeds of this file from another machine; may be given several times",
    )
    ablate.add_argument("--jobs", type=count, help="how many at once (default: one a GPU, or one a core)")
    ablate.add_argument(
        "--dry_run", action="store_true", help="print what would be trained and how long it would take"
    )

    what = (
        "search for the best recipe within the budget of a search file; `search add RUN ...` adds runs to "
        "the store"
    )
    search = command(commands, "search", _search, what, takes_settings=True)
    search.add_argument(
        "words",
        nargs="+",
        metavar="FILE | add RUN",
        help="YAML file; settings after it, as --a.b=value, apply to every trial. After `add`: runs",
    )
    search.add_argument("--out", help="directory (default: the file's `output`)")
    search.add_argument("--store", help=f"store of runs (default: the file's `store`, or {STORE})")
    search.add_argument("--jobs", type=count, help="how many at once (default: one a GPU, or one a core)")

    what = "rank recipes for a dataset by the runs in the store, and show the evidence"
    recommend = command(commands, "recommend", _recommend, what)
    recommend.add_argument("data", help="LLaVA .json or .jsonl file, .tar or .parquet")
    recommend.add_argument("--images", help="image root of the file (default: its folder)")
    recommend.add_argument("--store", default=STORE, help=f"store of runs (default: {STORE})")
    recommend.add_argument("--top", type=count, default=5, help="number of recipes to print (default: 5)")
    recommend.add_argument("--out", help="JSON file for all recipes")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [count(name, least=0) for name in _names(text)]


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _ablate(arguments: argparse.Namespace) -> int:
    look_at_file(arguments.file, "ablation", "examples are in ablations/")
    from llava_kd.assembly.ablate import Choice, ablate

    choice = Choice(
        output=arguments.out,
        arms=arguments.arms,
        seeds=arguments.seeds,
        num_jobs=arguments.jobs,
        elsewhere=arguments.elsewhere,
    )
    return ablate(arguments.file, arguments.overrides, choice, is_dry=arguments.dry_run)


def _search(arguments: argparse.Namespace) -> int:
    first, *rest = arguments.words
    if first == "add":
        return _add(arguments, rest)
    if rest:
        raise ValueError(f"`search` takes one search file; got {' '.join(arguments.words)}")
    look_at_file(first, "search", "docs/search.md shows an example")
    from llava_kd.search.proposing.proposer import optuna

    optuna()
    from llava_kd.assembly.searching.search import Choice, search

    choice = Choice(output=arguments.out, store=arguments.store, num_jobs=arguments.jobs)
    return search(first, arguments.overrides, choice)


def _add(arguments: argparse.Namespace, runs: list[str]) -> int:
    if arguments.overrides or arguments.out or arguments.jobs:
        raise ValueError("`search add` takes only runs and --store; leave out the other options")
    if not runs:
        raise ValueError(
            "`search add` needs at least one run: give its output_dir, or a folder that contains runs"
        )
    from llava_kd.assembly.searching.entering import add_runs
    from llava_kd.search.store.database import Store

    for line in add_runs(runs, Store(arguments.store or STORE)):
        show(line)
    return 0


def _recommend(arguments: argparse.Namespace) -> int:
    from llava_kd.search.store.database import Store

    store = Store(arguments.store)
    store.entries()  # one that cannot be used is said before PyTorch is read
    from llava_kd.assembly.searching.recommend import recommend_for

    said = recommend_for(
        arguments.data, store, images=arguments.images, most=arguments.top, out=arguments.out
    )
    for line in said:
        show(line)
    return 0
