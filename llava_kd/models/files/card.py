"""What model cards say: where a model comes from, with names in place of paths, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import LlavaProcessor

from llava_kd.models.files.upright import reads_upright

HEADING = "## Provenance"
# An absolute path, or one from the home or a parent folder, inside a longer text; not the slashes of an URL.
_INSIDE = re.compile(r"(?<![\w/.~])(?:~[\w.-]*|\.{1,2})?/(?!/)(?:[^\s?&,;:'\"|]*/)?([^\s?&,;:'\"|/]*)")
_WHOLE = re.compile(r"(?:/(?!/)|~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)")


def public(text: str) -> str:
    """A setting with the names of its files and folders in place of their paths; hub ids stay."""
    if "\n" in text:
        return "\n".join(public(line) for line in text.split("\n"))
    if not _WHOLE.match(text):
        is_relative_path = text.count("/") > 1 and ":" not in text and " " not in text
        return PurePosixPath(text).name if is_relative_path else _INSIDE.sub(r"\1", text)
    is_windows = "\\" in text
    path = (PureWindowsPath if is_windows else PurePosixPath)(text)
    of_a_run = path.name == "model" and Path(text).with_name("config.yaml").is_file()
    return path.parent.name if of_a_run else path.name


def public_tree(tree: object) -> object:
    """`public` for every text of a tree of settings."""
    if isinstance(tree, str):
        return public(tree)
    if isinstance(tree, Mapping):
        return {public_tree(key): public_tree(value) for key, value in tree.items()}
    if isinstance(tree, Sequence):
        return [public_tree(value) for value in tree]
    return tree


def front_matter(name: str, scores: Sequence[tuple[str, float, int]]) -> str:
    """What the hub reads of a card: how the model is loaded, and its scores by data set, in its own YAML."""
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=data,
            dataset_name=data,
            metric_type="accuracy",
            metric_value=round(accuracy, 4),
        )
        for data, accuracy, _ in scores
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava_kd", "distillation"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()


def provenance(record: Mapping) -> str:
    """The section of a card about a finished run, from its `run.json`, whose settings are YAML text."""
    config = public_tree(yaml.safe_load(str(record.get("config", "{}"))))
    assert isinstance(config, dict)
    student, teacher, data = (config.get(part) or {} for part in ("student", "teacher", "data"))
    mixture = ", ".join(f"{part['path']} x {part.get('weight', 1):g}" for part in data.get("sources") or ())
    rows = {
        "started from": student.get("checkpoint")
        or f"{student.get('vision_tower')} and {student.get('language_model')}",
        "teacher": teacher.get("checkpoint", "none"),
        "trained parts": ", ".join(config.get("trainable") or ()),
        "data": data.get("path") or mixture,
        "optimiser steps": record.get("steps"),
        "exported": _exported(record.get("exported")),
        "commit": record.get("commit") or "not in a repository",
    }
    rows |= {f"fingerprint: {what}": value for what, value in record.get("fingerprints", {}).items()}
    rows |= {f"version: {name}": value for name, value in record.get("versions", {}).items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return (
        f"{HEADING}\n\n| | |\n|---|---|\n{table}\n\n{_lineage(record.get('parent'))}"
        f"The settings of its last stage:\n\n```yaml\n{settings}```\n"
    )


def _exported(best: object) -> str:
    if not isinstance(best, Mapping):
        return "the last step"
    return f"step {best['step']}, the best by {best['figure']}: {best['value']:.4f}"


def _lineage(parent: object) -> str:
    runs = []
    while isinstance(parent, Mapping):
        runs.append(PurePosixPath(str(parent["run"])).name)
        parent = parent["parent"]
    return f"Stages before it: {' -> '.join(reversed(runs))}.\n\n" if runs else ""


def reading_notes(processor: LlavaProcessor) -> list[str]:
    """What somebody must know who opens pictures, or renders text before tokens, without our code."""
    return [*_orientation_note(processor), *_bos_note(processor)]


def _orientation_note(processor: LlavaProcessor) -> list[str]:
    """Nothing for what the published models do too."""
    if not reads_upright(processor):
        return []
    return [
        "Photos were turned upright by their EXIF orientation before anything else. The image processor "
        "remembers it (`do_exif_transpose`), and `llava-kd eval` and `chat` do so; no stock image processor "
        "does. Give it pictures that are already upright: "
        "`PIL.ImageOps.exif_transpose(PIL.Image.open(path))`, or "
        "`transformers.image_utils.load_image(path)`, which turns them too; `PIL.Image.open` alone does not."
    ]


def _bos_note(processor: LlavaProcessor) -> list[str]:
    tokenizer = processor.tokenizer
    bos, template = tokenizer.bos_token, processor.chat_template
    if bos is None or not isinstance(template, str) or not ("bos_token" in template or bos in template):
        return []
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return []
    return [
        f"Both the chat template and the tokenizer begin a text with `{bos}`, and training used one. "
        "`processor.apply_chat_template(..., tokenize=True)` writes one; text that is rendered first "
        "(`tokenize=False`) must be read with `add_special_tokens=False`, or it begins with two."
    ]
