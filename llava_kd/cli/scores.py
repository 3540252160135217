"""Commands that score models, and show what came out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llava_kd.cli.words import Commands, add_plugins, command, count, is_first_rank, plugins, show


def add(commands: Commands) -> None:
    evaluate = command(commands, "eval", _eval, "answer and score a test file, or benchmarks")
    evaluate.add_argument("--model", required=True, help="stock LLaVA directory")
    evaluate.add_argument(
        "--benchmark", help="names joined by commas, or `all`; without it, a LLaVA JSON file"
    )
    evaluate.add_argument("--data", required=True, help="the LLaVA JSON file, or the root of the benchmarks")
    evaluate.add_argument("--out", required=True, help="directory for answers and scores")
    evaluate.add_argument("--images", help="image root of the file (default: its folder)")
    evaluate.add_argument("--follow_symlinks", action="store_true", help="links may leave the image root")
    evaluate.add_argument("--batch_size", type=count, default=32)
    evaluate.add_argument("--max_new_tokens", type=count, help="default: 32, or each benchmark's own")
    add_plugins(evaluate, "benchmarks, or the tower of the model")
    evaluate.add_argument("--limit", type=count, help="ask the first questions of each benchmark only")

    report = command(commands, "report", _report, "write a page of any runs: one, several, or a comparison")
    report.add_argument(
        "runs", nargs="*", metavar="RUN", help="a run's output_dir, or a folder that holds runs"
    )
    report.add_argument("--run", dest="directory", help="the same, for one")
    report.add_argument("--out", help="the page to write (default: report.html in the first)")
    add_plugins(report, "terms that its stages were trained with")


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _eval(arguments: argparse.Namespace) -> int:
    from llava_kd.evaluation.runner import Asking, evaluate

    tables = plugins(arguments)
    asking = Asking(
        batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens, limit=arguments.limit
    )
    if arguments.benchmark:
        from llava_kd.evaluation.benchmarks.run import evaluate_benchmarks

        evaluate_benchmarks(
            arguments.model,
            arguments.benchmark,
            arguments.data,
            arguments.out,
            asking=asking,
            table=tables.benchmarks,
        )
        if is_first_rank():
            show((Path(arguments.out) / "table.md").read_text())
        return 0
    summary = evaluate(
        arguments.model,
        arguments.data,
        arguments.out,
        image_root=arguments.images,
        follow_symlinks=arguments.follow_symlinks,
        asking=asking,
    )
    if is_first_rank():
        shown = {name: summary[name] for name in ("accuracy", "count", "unreadable", "by_type")}
        show(json.dumps(shown, indent=2))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.settings import labels
    from llava_kd.evaluation.report.page import report
    from llava_kd.evaluation.report.results import is_comparison, read_run, table
    from llava_kd.evaluation.report.runs_page import write_runs_page
    from llava_kd.evaluation.report.stage_runs import find_runs

    named = [*([arguments.directory] if arguments.directory else []), *arguments.runs]
    if not named:
        raise ValueError("name a run: its output_dir, or a folder that holds runs")
    terms = labels(arguments.plugin)
    if len(named) == 1 and is_comparison(named[0]):
        if arguments.out:
            raise ValueError(f"{named[0]} is a comparison: its page is report.html there; leave --out away")
        written = report(named[0], terms=terms)
        show(table(read_run(named[0])))
    else:
        runs = find_runs(named)
        written = write_runs_page(runs, arguments.out or Path(named[0]) / "report.html", terms)
        show("\n".join(f"{run.name}: {run.state}" for run in runs))
    show(f"open {written}")
    return 0
