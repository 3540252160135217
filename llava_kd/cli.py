"""`llava-kd`: each command parses its words and calls one function."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llava_kd import __version__
from llava_kd.build.stopping import INTERRUPTED, end_with_torchrun, status_after, stoppable, was_told

if TYPE_CHECKING:
    from llava_kd.build.throughput import Network


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. A mistake that the user can mend is one line on stderr and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.run not in (_train, _run, _check, _cache_teacher):
        parser.error(f"unknown words: {' '.join(rest)}")
    engines = sorted({word for word in rest if word.startswith("--engine.kind=")})
    if len(engines) > 1:
        parser.error(f"two engines at once, {' and '.join(engines)}; name one")
    arguments.overrides = rest
    end_with_torchrun()
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"llava-kd {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:  # another rank is gone: its own message says more than a traceback here
        if was_told():
            return 0  # it had nothing to save, and left before this one
        print(f"llava-kd {arguments.command}: {error}", file=sys.stderr)
        return 1
    except (OSError, ImportError) as error:  # a file, a directory, a disk; a package that is not there
        what = "; install what is missing" if isinstance(error, ImportError) else ""
        print(f"llava-kd {arguments.command}: {' '.join(str(error).split())}{what}", file=sys.stderr)
        return 2
    except (RecursionError, MemoryError) as error:  # of other libraries' readers
        what = (
            "is nested too deeply" if isinstance(error, RecursionError) else "needs more memory than there is"
        )
        print(f"llava-kd {arguments.command}: a file that it reads {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"llava-kd {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-kd", description="Distil large LLaVA models into small.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = _command(commands, "train", _train, "run one stage from its YAML file")
    train.add_argument("config", help="YAML file; any setting may follow as --a.b=value")
    train.add_argument("--dry_run", action="store_true", help="say what it would do, and need, and stop")
    train.add_argument("--ranks", type=_count, help="for --dry_run: how many (default: those of this launch)")
    _add_rates(train, "for --dry_run: ")

    run = _command(
        commands, "run", _run, "run the stages of a pipeline file; skip finished ones, go on with others"
    )
    run.add_argument("pipeline", help="YAML file; overrides that follow go to every stage")

    check = _command(commands, "check", _check, "look at a stage's models, data and needs before a long run")
    check.add_argument("config", help="YAML file; any setting may follow as --a.b=value")
    check.add_argument("--ranks", type=_count, default=1, help="how many the run will have")
    check.add_argument("--records", type=_count, default=64, help="how many to read and encode")
    _add_rates(check)

    evaluate = _command(commands, "eval", _eval, "answer and score a test file, or benchmarks")
    evaluate.add_argument("--model", required=True, help="stock LLaVA directory")
    evaluate.add_argument(
        "--benchmark", help="names joined by commas, or `all`; without it, a LLaVA JSON file"
    )
    evaluate.add_argument("--data", required=True, help="the LLaVA JSON file, or the root of the benchmarks")
    evaluate.add_argument("--out", required=True, help="directory for answers and scores")
    evaluate.add_argument("--images", help="image root of the file (default: its folder)")
    evaluate.add_argument("--follow_symlinks", action="store_true", help="links may leave the image root")
    evaluate.add_argument("--batch_size", type=_count, default=32)
    evaluate.add_argument("--max_new_tokens", type=_count, help="default: 32, or each benchmark's own")
    evaluate.add_argument("--limit", type=_count, help="ask the first questions of each benchmark only")

    _add_checkpoint_commands(commands)

    report = _command(commands, "report", _report, "write results.json and report.html of a comparison run")
    report.add_argument("--run", required=True, dest="directory")

    _add_data_commands(commands)
    return parser


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Make data, and look at them."""
    data = commands.add_parser("data", help="make and check data").add_subparsers(
        dest="command", required=True
    )
    verify = _command(
        data, "verify", _verify, "find bad records, or missing files of benchmarks, before a run"
    )
    verify.add_argument("--benchmark", help="names joined by commas, or `all`")
    verify.add_argument("--data", required=True, help="as data.path, or the root of the benchmarks")
    verify.add_argument("--images", help="image root of the file (default: its folder)")
    verify.add_argument("--threads", type=_count, default=4)
    verify.add_argument("--follow_symlinks", action="store_true", help="links may leave the image root")
    verify.add_argument("--model", help="stock LLaVA directory: check the lengths of its tokens too")
    verify.add_argument("--template", default="auto", help="of the lengths: data.template of the run")
    verify.add_argument("--max_length", type=_count, default=2048, help="of the lengths: data.max_length")
    verify.add_argument("--write_sound", metavar="FILE", help="copy the records without a fault to FILE")
    verify.add_argument("--report", metavar="FILE", help="write everything that was found, as JSON")
    shapes = _command(data, "shapes", _shapes, "generate pictures of shapes with captions and questions")
    shapes.add_argument("--out", required=True)
    shapes.add_argument("--num_train", type=int, default=4000, help="training scenes")
    shapes.add_argument("--num_validation", type=int, default=200)
    shapes.add_argument("--num_test", type=int, default=200)
    shapes.add_argument("--seed", type=int, default=0)


def _add_rates(command: argparse.ArgumentParser, when: str = "") -> None:
    """What samples per second on several machines are foretold from."""
    command.add_argument("--measured", metavar="RUN", help=f"{when}output_dir of a run on one whole machine")
    for name, ranks in (("inside", "of one machine"), ("between", "on several machines")):
        what = f"{when}GB/s of busbw that all_reduce_perf of nccl-tests gives for ranks {ranks}"
        command.add_argument(f"--{name}", type=float, help=what)


def _network(arguments: argparse.Namespace) -> Network:
    from llava_kd.build.throughput import Network

    given = {name: getattr(arguments, name) for name in ("inside", "between")}
    return Network(**{name: value for name, value in given.items() if value is not None})


def _add_checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    """Models in, out, and at work."""
    convert = _command(
        commands, "convert", _convert, "make a stock directory of a TinyLLaVA or LLaVA-1.5 one"
    )
    convert.add_argument("source")
    convert.add_argument("--out", required=True)
    tower = (
        "the tower, if not the one that it names; its image processor alone where it has weights of its own"
    )
    convert.add_argument("--vision_tower", help=tower)
    prompt = "the conversation it was trained on, if not the one that its files point to"
    convert.add_argument("--template", default="auto", help=prompt)

    export = _command(commands, "export", _export, "write a checked stock directory with a model card")
    export.add_argument("source", help="stock LLaVA directory, such as a run's model/")
    export.add_argument("--out", required=True)
    export.add_argument("--format", choices=["hf"], default="hf")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    export.add_argument("--scores", nargs="*", default=[], help="summary.json files of `llava-kd eval`")

    cache = _command(
        commands, "cache-teacher", _cache_teacher, "run a stage's teacher once, and keep what it says"
    )
    cache.add_argument("config", help="YAML file of the stage; any setting may follow as --a.b=value")
    cache.add_argument("--out", required=True, help="directory; a cache that was broken off there goes on")
    cache.add_argument("--mode", choices=["hidden", "topk"], default="hidden", help="states, or logits")
    cache.add_argument("--topk", type=_count, help="how many logits, for --mode topk")
    size = "of a file, what a kill may cost; 0 gives every record its own"
    cache.add_argument("--shard_mb", type=partial(_count, least=0), default=512, help=size)

    chat = _command(commands, "chat", _chat, "talk about images, answer by answer")
    chat.add_argument("--model", required=True, help="stock LLaVA directory")
    chat.add_argument("--image", action="append", default=[], help="may be given several times")
    chat.add_argument("--max_new_tokens", type=_count, default=256)
    chat.add_argument("question", nargs="?", help="one question; without it, questions are read line by line")


def _count(text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text}")
    return int(text)


def _command(
    group: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], what: str
) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run, command=name)
    return parser


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _train(arguments: argparse.Namespace) -> int:
    from llava_kd.config import load

    if arguments.dry_run:
        config = load(arguments.config, arguments.overrides)
        from llava_kd.build.plan import plan, ranks_from_environment

        ranks = arguments.ranks or ranks_from_environment()
        print(plan(config, ranks, arguments.measured, _network(arguments)))
        return 0
    with stoppable():
        config = load(arguments.config, arguments.overrides)
        from llava_kd.build.train import train

        stopped = train(config)
        return 0 if stopped is None else status_after(signal.Signals[stopped])


def _run(arguments: argparse.Namespace) -> int:
    from llava_kd.build.pipeline import read_pipeline, run_pipeline

    return run_pipeline(read_pipeline(arguments.pipeline, arguments.overrides))


def _check(arguments: argparse.Namespace) -> int:
    from llava_kd.build.check import check
    from llava_kd.config import load

    config = load(arguments.config, arguments.overrides)

    print(
        check(
            config,
            ranks=arguments.ranks,
            num_records=arguments.records,
            measured=arguments.measured,
            network=_network(arguments),
        )
    )
    return 0


def _cache_teacher(arguments: argparse.Namespace) -> int:
    from llava_kd.build.cache_teacher import cache_teacher
    from llava_kd.config import load

    config = load(arguments.config, arguments.overrides)

    cache_teacher(
        config, arguments.out, mode=arguments.mode, top_k=arguments.topk, shard_mb=arguments.shard_mb
    )
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.benchmark:
        from llava_kd.evaluation.benchmarks.run import evaluate_benchmarks

        evaluate_benchmarks(
            arguments.model,
            arguments.benchmark,
            arguments.data,
            arguments.out,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            limit=arguments.limit,
        )
        if _is_first_rank():
            print((Path(arguments.out) / "table.md").read_text())
        return 0
    if arguments.limit is not None:
        raise ValueError("--limit goes with --benchmark; of a LLaVA JSON file every question is asked")
    from llava_kd.evaluation.runner import evaluate

    summary = evaluate(
        arguments.model,
        arguments.data,
        arguments.out,
        image_root=arguments.images,
        follow_symlinks=arguments.follow_symlinks,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens or 32,
    )
    if _is_first_rank():
        shown = {name: summary[name] for name in ("accuracy", "count", "unreadable", "by_type")}
        print(json.dumps(shown, indent=2))
    return 0


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _verify(arguments: argparse.Namespace) -> int:
    """Exit status 1 where something is wrong, so that a script stops before a GPU is touched."""
    if arguments.benchmark:
        from llava_kd.evaluation.benchmarks.run import describe, verify

        found = verify(arguments.benchmark, arguments.data, num_threads=arguments.threads)
        print(describe(found))
        return int(any(verification.problems for verification in found.values()))
    from llava_kd.build.verify import verify_data
    from llava_kd.config import DataConfig

    config = DataConfig(
        path=arguments.data,
        images=arguments.images,
        follow_symlinks=arguments.follow_symlinks,
        template=arguments.template,
        max_length=arguments.max_length,
    )
    report = verify_data(
        config, model=arguments.model, sound=arguments.write_sound, num_threads=arguments.threads
    )
    print(report.summary())
    if arguments.report:
        report.save(arguments.report)
    if arguments.write_sound:
        print(f"{len(report.unsound)} records left out of {arguments.write_sound}")
    return int(not report.is_sound)


def _convert(arguments: argparse.Namespace) -> int:
    from llava_kd.build.checkpoints import convert_to

    for line in convert_to(
        arguments.source, arguments.out, vision_tower=arguments.vision_tower, template=arguments.template
    ):
        print(f"note: {line}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from llava_kd.build.checkpoints import export_to

    for note in export_to(arguments.source, arguments.out, dtype=arguments.dtype, scores=arguments.scores):
        print(f"note: {note}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from llava_kd.evaluation.chat import Chat

    chat = Chat.load(arguments.model, arguments.image, max_new_tokens=arguments.max_new_tokens)
    for question in sys.stdin if arguments.question is None else [arguments.question]:
        if arguments.question is None and not question.strip():
            continue
        for piece in chat.stream(question.strip()):
            print(piece, end="", flush=True)
        print()
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from llava_kd.evaluation.report import report
    from llava_kd.evaluation.results import read_run, table

    written = report(arguments.directory)
    print(table(read_run(arguments.directory)))
    print(f"open {written}")
    return 0


def _shapes(arguments: argparse.Namespace) -> int:
    from llava_kd.data.shapes import write_shapes

    blind = write_shapes(
        Path(arguments.out),
        num_train=arguments.num_train,
        num_validation=arguments.num_validation,
        num_test=arguments.num_test,
        seed=arguments.seed,
    )
    print(f"accuracy without looking: {json.dumps(dict(blind))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
