"""Commands that score models, and show what came out."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from llava_kd.assembly.early import look_at_file, look_at_model, look_at_runs
from llava_kd.cli.words import Commands, add_plugins, command, count, is_first_rank, plugins, show


def add(commands: Commands) -> None:
    evaluate = command(commands, "eval", _eval, "evaluate a model on a test file or on benchmarks")
    evaluate.add_argument("--model", required=True, help="stock LLaVA directory")
    evaluate.add_argument(
        "--benchmark", help="names separated by commas, or `all`; without it, --data is a LLaVA JSON file"
    )
    evaluate.add_argument("--data", required=True, help="the LLaVA JSON file, or the root of the benchmarks")
    evaluate.add_argument("--out", required=True, help="directory for answers and scores")
    evaluate.add_argument("--images", help="image root of the file (default: its folder)")
    evaluate.add_argument(
        "--follow_symlinks", action="store_true", help="allow links that lead out of the image root"
    )
    evaluate.add_argument("--batch_size", type=count, default=32)
    evaluate.add_argument("--max_new_tokens", type=count, help="default: 32, or each benchmark's own")
    add_plugins(evaluate, "benchmarks, or the tower of the model")
    evaluate.add_argument(
        "--noise", help="noise levels separated by commas, such as 0.1,0.2: evaluate on noisy pictures too"
    )
    evaluate.add_argument("--noise_seed", type=int, default=0, help="seed of the noise")
    evaluate.add_argument("--limit", type=count, help="evaluate only the first questions of each benchmark")

    report = command(
        commands, "report", _report, "write an HTML report of one run, several runs, or a comparison"
    )
    report.add_argument(
        "runs", nargs="*", metavar="RUN", help="a run's output_dir, or a folder that contains runs"
    )
    report.add_argument("--run", dest="directory", help="the same, for one run")
    report.add_argument("--out", help="HTML file to write (default: report.html in the first RUN)")
    add_plugins(report, "terms that its stages were trained with")

    demo = command(
        commands, "demo", _demo, "serve a web page that asks several models the same question, side by side"
    )
    kinds = "a stock directory, a run, or an id on the hub; NAME=MODEL sets its name on the page; up to 4"
    demo.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help=kinds)
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: reachable from this machine only)"
    )
    demo.add_argument("--port", type=partial(count, least=0), default=7860, help="port; 0 chooses a free one")
    demo.add_argument("--max_new_tokens", type=count, default=64)
    demo.add_argument(
        "--image", help="with --question: the example that the page shows at the start, with answers"
    )
    demo.add_argument("--question")
    add_plugins(demo, "the tower of a model")


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and not arguments.benchmark:
        raise ValueError(
            "--limit needs --benchmark; a LLaVA JSON file is always evaluated whole: leave --limit out"
        )
    if arguments.noise is not None and arguments.benchmark:
        raise ValueError(
            "--noise needs a LLaVA JSON file; benchmark pictures are never changed: leave --noise out"
        )
    levels = _levels(arguments.noise)
    look_at_model(arguments.model)
    if not arguments.benchmark:
        advice = "give a LLaVA .json or .jsonl file"
        if Path(arguments.data).is_dir():
            advice = "name the benchmarks of a folder with --benchmark"
        look_at_file(arguments.data, "test", advice)
    from llava_kd.evaluation.runner import Asking, evaluate

    tables = plugins(arguments)
    asking = Asking(
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        limit=arguments.limit,
        noise=levels,
        noise_seed=arguments.noise_seed,
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
        if "noise" in summary:
            show((Path(arguments.out) / "noise.md").read_text())
    return 0


def _levels(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--noise must be numbers separated by commas, such as 0.1,0.2; got {text!r}"
        ) from None


def _demo(arguments: argparse.Namespace) -> int:
    import transformers

    from llava_kd.evaluation.demo.page import demo

    transformers.logging.disable_progress_bar()
    plugins(arguments)
    demo(
        arguments.models,
        host=arguments.host,
        port=arguments.port,
        max_new_tokens=arguments.max_new_tokens,
        first=(arguments.image, arguments.question),
        say=show,
    )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    named = [*([arguments.directory] if arguments.directory else []), *arguments.runs]
    look_at_runs(named)
    from llava_kd.assembly.settings import labels
    from llava_kd.evaluation.report.entry import report_on

    written, said = report_on(named, terms=labels(arguments.plugin), out=arguments.out)
    show(said)
    show(f"open {written}")
    return 0
