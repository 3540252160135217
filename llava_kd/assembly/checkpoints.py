"""Checkpoints of other layouts in, stock checkpoints out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_kd.assembly.parts.models import DTYPES, speak
from llava_kd.data.text.template_choice import AUTO
from llava_kd.data.text.template_origin import original_template
from llava_kd.models.files.checkpoint import save_stock
from llava_kd.models.files.convert.converting import convert
from llava_kd.models.files.export import export
from llava_kd.models.files.gguf.exporting import export_gguf
from llava_kd.models.files.gguf.reading import gguf_file, write_language_model
from llava_kd.models.files.hub import push
from llava_kd.models.towers.vision_tower import text_config


def convert_to(source: str, out: str, *, vision_tower: str | None = None, template: str = AUTO) -> list[str]:
    """Write the stock form of `source` into a new `out`; what a user should know of it, in lines.

    A GGUF file, or a folder with one, becomes the directory of a language model. The chat template of a LLaVA
    becomes the one that it was trained on, as its files tell, or the one that is named.
    """
    if Path(out).exists():
        raise ValueError(f"the output directory must be new; {out} exists: name another")
    if (path := gguf_file(source)) is not None:
        if vision_tower is not None or template != AUTO:
            raise ValueError(
                f"{path} is only a language model: leave --vision_tower and --template out; set both in a "
                "stage, next to student.language_model"
            )
        write_language_model(path, out)
        return [f"{out} is a float32 language model, for student.language_model"]
    parts, origin = convert(source, vision_tower=vision_tower)
    choice = original_template(
        template,
        is_tiny=origin.is_tiny,
        conversation=origin.conversation,
        names=origin.names,
        model_type=text_config(parts.stock.config).model_type,
        tokenizer=parts.processor.tokenizer,
        chat_template=parts.processor.chat_template,
        image_marks=origin.image_marks,
    )
    speak(parts, choice.template)
    save_stock(parts, out)
    lines = [f"template: {choice}; use --template to change it"]
    if origin.has_frozen_language_model:
        lines.append(
            "the language model was frozen in training: after a first stage the model knows captions, but "
            "no prompt format"
        )
    return lines


def export_to(
    source: str, out: str, *, dtype: str | None, scores: Sequence[str], layout: str = "hf"
) -> list[str]:
    """Notes on other tools; see `export`, and `export_gguf` for the layout `gguf`."""
    if layout == "gguf":
        return export_gguf(source, out, dtype=dtype, scores=scores)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"--dtype {dtype} needs --format gguf; with --format hf, --dtype must be one of {sorted(DTYPES)}"
        )
    return export(source, out, dtype=None if dtype is None else DTYPES[dtype], scores=scores)


def push_to(directory: str, repo_id: str, *, private: bool = False) -> str:
    """The address of an export on the hub; see `push`."""
    return push(directory, repo_id, private=private)
