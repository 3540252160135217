"""Commands that make data, and look at them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llava_kd.assembly.early import look_at_file, look_at_model
from llava_kd.cli import curation
from llava_kd.cli.words import Commands, add_plugins, command, count, plugins, show


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="make and check data").add_subparsers(
        dest="command", required=True
    )
    verify = command(data, "verify", _verify, "find bad records, or missing benchmark files, before a run")
    verify.add_argument("--benchmark", help="names separated by commas, or `all`")
    verify.add_argument(
        "--data", required=True, help="data file as in data.path, or the root of the benchmarks"
    )
    verify.add_argument("--images", help="image root of the file (default: its folder)")
    verify.add_argument("--threads", type=count, default=4)
    verify.add_argument(
        "--follow_symlinks", action="store_true", help="allow links that lead out of the image root"
    )
    verify.add_argument("--model", help="stock LLaVA directory; its tokenizer is used to check lengths too")
    verify.add_argument("--template", default="auto", help="for lengths: data.template of the run")
    verify.add_argument(
        "--max_length", type=count, default=2048, help="for lengths: data.max_length of the run"
    )
    verify.add_argument("--write_sound", metavar="FILE", help="copy the valid records to FILE")
    verify.add_argument("--report", metavar="FILE", help="write all problems to FILE as JSON")
    add_plugins(verify, "benchmarks, sources or templates")
    shapes = command(data, "shapes", _shapes, "generate pictures of shapes with captions and questions")
    shapes.add_argument("--out", required=True)
    shapes.add_argument("--num_train", type=int, default=4000, help="training scenes")
    shapes.add_argument("--num_validation", type=int, default=200)
    shapes.add_argument("--num_test", type=int, default=200)
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument(
        "--hard",
        action="store_true",
        help=(
            "96 pixels, up to nine small shapes, labels to read, relations; two more test sets: unseen "
            "pairs, and a different look"
        ),
    )
    curation.add(data)


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _verify(arguments: argparse.Namespace) -> int:
    """Exit status 1 where something is wrong, so that a script stops before a GPU is touched."""
    if not arguments.benchmark and arguments.data.endswith((".json", ".jsonl")):
        look_at_file(arguments.data, "data", "give a LLaVA .json or .jsonl file")
    if arguments.model:
        look_at_model(arguments.model)
    if arguments.report and not (folder := Path(arguments.report).parent).is_dir():
        raise ValueError(f"the folder of --report must exist; there is no {folder}: create it")
    tables = plugins(arguments)
    if arguments.benchmark:
        from llava_kd.evaluation.benchmarks.run import describe, verify

        found = verify(
            arguments.benchmark, arguments.data, num_threads=arguments.threads, table=tables.benchmarks
        )
        show(describe(found))
        return int(any(verification.problems for verification in found.values()))
    from llava_kd.assembly.verify import verify_data
    from llava_kd.config import DataConfig

    config = DataConfig(
        path=arguments.data,
        images=arguments.images,
        follow_symlinks=arguments.follow_symlinks,
        template=arguments.template,
        max_length=arguments.max_length,
    )
    report = verify_data(
        config,
        model=arguments.model,
        sound=arguments.write_sound,
        num_threads=arguments.threads,
        tables=tables,
    )
    show(report.summary())
    if arguments.report:
        report.save(arguments.report)
    if arguments.write_sound:
        show(f"wrote {arguments.write_sound} without {len(report.unsound)} bad records")
    return int(not report.is_sound)


def _shapes(arguments: argparse.Namespace) -> int:
    from llava_kd.data.shapes.settings import SETTINGS
    from llava_kd.data.shapes.writing import write_shapes

    blind = write_shapes(
        Path(arguments.out),
        num_train=arguments.num_train,
        num_validation=arguments.num_validation,
        num_test=arguments.num_test,
        seed=arguments.seed,
        setting=SETTINGS["hard" if arguments.hard else "easy"],
    )
    for split, accuracy in blind.items():
        of_split = "" if split == "test" else f" in {split}.json"
        show(f"accuracy without looking{of_split}: {json.dumps(dict(accuracy))}")
    return 0
