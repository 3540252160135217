"""Commands that plant codes in data, and ask a model what it remembers of them."""

from __future__ import annotations

import argparse
from functools import partial

from llava_kd.cli.words import Commands, command, count, show


def add(commands: Commands) -> None:
    what = "insert secret codes (canaries) into training data, and measure how much of them a model memorizes"
    canary = commands.add_parser("canary", help=what, description=what).add_subparsers(
        dest="command", required=True
    )
    insert = command(canary, "insert", _insert, "copy a data file and append canary records")
    insert.add_argument("--data", required=True, help="LLaVA .json or .jsonl file")
    insert.add_argument(
        "--out", required=True, help="output data file; the codes go to NAME.canaries.json in the same folder"
    )
    insert.add_argument("--canaries", type=count, default=10, help="number of codes")
    insert.add_argument("--digits", type=count, default=4, help="digits per code")
    insert.add_argument("--repeats", type=count, default=1, help="number of records that contain each code")
    insert.add_argument("--seed", type=partial(count, least=0), default=0, help="seed of the random codes")
    insert.add_argument("--render", action="store_true", help="also draw each code into a picture")
    insert.add_argument("--images", help="image root (default: the folder of --data)")
    exposure = command(canary, "exposure", _exposure, "measure the exposure of each code in bits")
    exposure.add_argument("--model", required=True, help="stock LLaVA directory")
    exposure.add_argument("--canaries", required=True, help="NAME.canaries.json, written by `canary insert`")
    exposure.add_argument("--images", help="image root (default: the folder of --canaries)")
    exposure.add_argument("--out", help="JSON file for the results")
    exposure.add_argument("--template", default="auto", help="data.template of the training run")
    exposure.add_argument(
        "--max_length", type=count, default=2048, help="data.max_length of the training run"
    )
    most = "number of codes that each canary is ranked among; a random sample if there are more"
    exposure.add_argument("--candidates", type=partial(count, least=2), default=10_000, help=most)
    exposure.add_argument("--seed", type=partial(count, least=0), default=0, help="seed of the random sample")
    exposure.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    exposure.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def _insert(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.canary import Planting, insert

    planting = Planting(
        data=arguments.data,
        out=arguments.out,
        count=arguments.canaries,
        digits=arguments.digits,
        repeats=arguments.repeats,
        seed=arguments.seed,
        renders=arguments.render,
        images=arguments.images,
    )
    show(insert(planting))
    return 0


def _exposure(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.canary import Audit, audit
    from llava_kd.config import DataConfig

    data = DataConfig(
        path=arguments.canaries,
        template=arguments.template,
        max_length=arguments.max_length,
        num_workers=0,
        max_bad_rate=0.0,
    )
    asked = Audit(
        model=arguments.model,
        canaries=arguments.canaries,
        images=arguments.images,
        out=arguments.out,
        most=arguments.candidates,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        data=data,
    )
    show(audit(asked))
    return 0
