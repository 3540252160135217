"""Commands that run a stage, or several, or predict what one needs."""

from __future__ import annotations

import argparse
import signal
from functools import partial

from llava_kd.assembly.early import look_at_file, look_at_stage
from llava_kd.assembly.runs.stopping import status_after, stoppable
from llava_kd.cli.words import Commands, add_rates, command, count, network, show, steps


def add(commands: Commands) -> None:
    train = command(commands, "train", _train, "run one stage from its YAML file", takes_settings=True)
    train.add_argument("config", help="YAML file; any setting may follow as --a.b=value")
    train.add_argument(
        "--dry_run", action="store_true", help="print what the run would do and need, without training"
    )
    train.add_argument(
        "--ranks", type=count, help="for --dry_run: number of ranks (default: that of this launch)"
    )
    traced = "trace steps A to B into output_dir/profile (default: 11-13); as profile.steps=[A,B]"
    train.add_argument("--profile", nargs="?", const="[11,13]", type=steps, metavar="A-B", help=traced)
    add_rates(train, "for --dry_run: ")

    run = command(
        commands,
        "run",
        _run,
        "run the stages of a pipeline file; skip finished stages, resume the others",
        takes_settings=True,
    )
    run.add_argument("pipeline", help="YAML file; settings after it, as --a.b=value, apply to every stage")

    look = "check the models, data and memory needs of a stage before a long run"
    check = command(commands, "check", _check, look, takes_settings=True)
    check.add_argument("config", help="YAML file; any setting may follow as --a.b=value")
    check.add_argument("--ranks", type=count, default=1, help="number of ranks of the run")
    check.add_argument("--records", type=count, default=64, help="number of records to read and encode")
    exchanged = (
        "number of records to score with their own and with another record's picture (default: 32, for "
        "small models)"
    )
    check.add_argument("--pictures", type=partial(count, least=0), help=exchanged)
    add_rates(check)

    once = "run the teacher of a stage once and store its predictions"
    cache = command(commands, "cache-teacher", _cache_teacher, once, takes_settings=True)
    cache.add_argument("config", help="YAML file of the stage; any setting may follow as --a.b=value")
    cache.add_argument("--out", required=True, help="directory; an interrupted cache in it is continued")
    kept = "store hidden states, or the largest logits (default: hidden; with --server: topk)"
    cache.add_argument("--mode", choices=["hidden", "topk"], help=kept)
    cache.add_argument("--topk", type=count, help="number of logits per token, for --mode topk")
    size = "size of a file; a kill loses at most one file of work; 0 writes one file per record"
    cache.add_argument("--shard_mb", type=partial(count, least=0), default=512, help=size)
    _add_server(cache)


def _add_server(cache: argparse.ArgumentParser) -> None:
    where = (
        "http://HOST:PORT of a vLLM server that runs the teacher; teacher.checkpoint then needs no weights"
    )
    cache.add_argument("--server", metavar="URL", help=where)
    cache.add_argument(
        "--model", metavar="NAME", help="name of the model on the server (default: its only model)"
    )
    key = "environment variable with the server's API key"
    cache.add_argument("--server_key_env", metavar="NAME", help=key)
    cache.add_argument("--server_jobs", type=count, help="number of parallel requests (default: 8)")
    cache.add_argument("--server_timeout", type=count, help="seconds for one answer (default: 600)")
    again = "number of retries of a request, after 1, 2, 4, ... s, at most 60 (default: 6)"
    cache.add_argument("--server_retries", type=partial(count, least=0), help=again)


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _train(arguments: argparse.Namespace) -> int:
    if arguments.profile is not None:
        arguments.overrides = [*arguments.overrides, f"--profile.steps={arguments.profile}"]
    if arguments.dry_run:
        look_at_stage(arguments.config, arguments.overrides)
        from llava_kd.assembly.settings import load

        config = load(arguments.config, arguments.overrides)
        from llava_kd.assembly.planning.dry_run import plan, ranks_from_environment

        ranks = arguments.ranks or ranks_from_environment()
        show(plan(config, ranks, arguments.measured, network(arguments)))
        return 0
    with stoppable():
        look_at_stage(arguments.config, arguments.overrides)
        from llava_kd.assembly.settings import load

        config = load(arguments.config, arguments.overrides)
        from llava_kd.assembly.train import train

        stopped = train(config)
        return 0 if stopped is None else status_after(signal.Signals[stopped])


def _run(arguments: argparse.Namespace) -> int:
    look_at_file(arguments.pipeline, "pipeline", "an example is scripts/pipeline.yaml")
    from llava_kd.assembly.pipeline import read_pipeline, run_pipeline

    return run_pipeline(read_pipeline(arguments.pipeline, arguments.overrides))


def _check(arguments: argparse.Namespace) -> int:
    look_at_stage(arguments.config, arguments.overrides)
    from llava_kd.assembly.check import check
    from llava_kd.assembly.settings import load

    config = load(arguments.config, arguments.overrides)

    show(
        check(
            config,
            ranks=arguments.ranks,
            num_records=arguments.records,
            num_pictures=arguments.pictures,
            measured=arguments.measured,
            network=network(arguments),
        )
    )
    return 0


def _cache_teacher(arguments: argparse.Namespace) -> int:
    look_at_stage(arguments.config, arguments.overrides)
    from llava_kd.assembly.cache_teacher import cache_teacher
    from llava_kd.assembly.settings import load

    config = load(arguments.config, arguments.overrides)
    names = {
        "model": "model",
        **{name: f"server_{name}" for name in ("key_env", "jobs", "timeout", "retries")},
    }
    given = {name: value for name, flag in names.items() if (value := getattr(arguments, flag)) is not None}
    if arguments.server is not None:
        from llava_kd.assembly.asking.client import ServerSettings
        from llava_kd.assembly.served.cache import cache_from_server

        if arguments.mode == "hidden":
            raise ValueError(
                "--server needs --mode topk, because a server returns no hidden states; got --mode hidden"
            )
        server = ServerSettings(url=arguments.server, **given)
        cache_from_server(config, arguments.out, server, top_k=arguments.topk, shard_mb=arguments.shard_mb)
        return 0
    if given:
        raise ValueError(f"--{names[next(iter(given))]} needs --server URL; give it, or leave the option out")
    mode = arguments.mode or "hidden"
    cache_teacher(config, arguments.out, mode=mode, top_k=arguments.topk, shard_mb=arguments.shard_mb)
    return 0
