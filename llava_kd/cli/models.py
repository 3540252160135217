"""Commands that take models in, hand them out, and talk with them."""

from __future__ import annotations

import argparse
import sys

from llava_kd.assembly.early import look_at_checkpoint, look_at_file, look_at_model, look_at_source
from llava_kd.cli.words import Commands, add_plugins, command, count, plugins, show


def add(commands: Commands) -> None:
    convert = command(
        commands, "convert", _convert, "convert a TinyLLaVA or LLaVA-1.5 directory to a stock LLaVA directory"
    )
    convert.add_argument(
        "source", help="a model directory; or a GGUF language model, for student.language_model"
    )
    convert.add_argument("--out", required=True)
    tower = (
        "vision tower (default: the one that the source names); if the source has tower weights, only the "
        "image processor is read"
    )
    convert.add_argument("--vision_tower", help=tower)
    prompt = "conversation template of its training (default: taken from its files)"
    convert.add_argument("--template", default="auto", help=prompt)

    export = command(commands, "export", _export, "write a checked stock directory with a model card")
    export.add_argument("source", help="stock LLaVA directory, such as a run's model/")
    export.add_argument("--out", required=True)
    layout = "hf: stock transformers; gguf: llama.cpp and Ollama (needs the extra gguf)"
    export.add_argument("--format", choices=["hf", "gguf"], default="hf", help=layout)
    kinds = ["float32", "bfloat16", "float16", "q8_0", "q4_0"]
    types = "dtype of the weights (default: unchanged); q8_0 and q4_0 (8 and 4 bits) only with GGUF"
    export.add_argument("--dtype", choices=kinds, help=types)
    export.add_argument("--scores", nargs="*", default=[], help="summary.json files of `llava-kd eval`")

    add_plugins(export, "the tower of the model")

    push = command(
        commands, "push", _push, "upload an export with scores in its card to the Hugging Face hub"
    )
    push.add_argument("directory", help="directory written by `llava-kd export --scores`")
    push.add_argument(
        "repo_id", metavar="OWNER/NAME", help="repository on the hub; created if it does not exist"
    )
    push.add_argument("--private", action="store_true", help="if the repository is created, make it private")

    chat = command(commands, "chat", _chat, "chat about images")
    chat.add_argument("--model", required=True, help="stock LLaVA directory")
    chat.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    chat.add_argument("--max_new_tokens", type=count, default=256)
    add_plugins(chat, "the tower of the model")
    chat.add_argument(
        "question", nargs="?", help="one question; without it, questions are read from stdin, one per line"
    )


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _convert(arguments: argparse.Namespace) -> int:
    look_at_source(arguments.source)
    from llava_kd.assembly.checkpoints import convert_to

    for line in convert_to(
        arguments.source, arguments.out, vision_tower=arguments.vision_tower, template=arguments.template
    ):
        print(f"note: {line}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    look_at_checkpoint(arguments.source)
    from llava_kd.assembly.checkpoints import export_to

    plugins(arguments)
    for note in export_to(
        arguments.source,
        arguments.out,
        dtype=arguments.dtype,
        scores=arguments.scores,
        layout=arguments.format,
    ):
        print(f"note: {note}")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.checkpoints import push_to

    show(push_to(arguments.directory, arguments.repo_id, private=arguments.private))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    look_at_model(arguments.model)
    for image in arguments.image:
        look_at_file(image, "image", "give the file of a picture")
    from llava_kd.evaluation.generation.chat import Chat

    plugins(arguments)
    chat = Chat.load(arguments.model, arguments.image, max_new_tokens=arguments.max_new_tokens)
    for question in sys.stdin if arguments.question is None else [arguments.question]:
        if arguments.question is None and not question.strip():
            continue
        for piece in chat.stream(question.strip()):
            print(piece, end="", flush=True)
        print()
    return 0
