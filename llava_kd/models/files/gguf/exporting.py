"""A student as a directory for llama.cpp and Ollama: two GGUF files, a Modelfile and a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaProcessor

from llava_kd.durable import named, replacing_folder
from llava_kd.models.files.checkpoint import load_config, load_processor
from llava_kd.models.files.export import REQUEST, made_of, provenance_of, read_summary
from llava_kd.models.files.gguf.language import (
    LanguageFamily,
    describe_language,
    family_of,
    language_entries,
    picture_scale,
)
from llava_kd.models.files.gguf.ollama import modelfile
from llava_kd.models.files.gguf.package import gguf_package
from llava_kd.models.files.gguf.pictures import chat_template
from llava_kd.models.files.gguf.runtime_limits import limits
from llava_kd.models.files.gguf.tokens import (
    Vocabulary,
    describe_vocabulary,
    name_for_vocabulary,
    read_vocabulary,
)
from llava_kd.models.files.gguf.vision import ARCHITECTURE, check_vision, describe_vision, vision_entries
from llava_kd.models.files.gguf.weights import StockWeights
from llava_kd.models.files.gguf.writing import BLOCKED, KINDS, Entry, unblocked, write_gguf
from llava_kd.models.files.served import served_processor
from llava_kd.models.reading import read_json
from llava_kd.models.towers.vision_tower import text_config, vision_config

LANGUAGE, VISION, MODELFILE, CARD = "model.gguf", "mmproj.gguf", "Modelfile", "README.md"
_OF_DTYPE = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class _Student:
    """What the files are made of; no weight is in memory."""

    name: str
    config: LlavaConfig
    processor: LlavaProcessor
    family: LanguageFamily
    vocabulary: Vocabulary
    language: list[Entry]
    vision: list[Entry]
    kind: str


def export_gguf(
    source: str | Path, out: str | Path, *, dtype: str | None = None, scores: Sequence[str | Path] = ()
) -> list[str]:
    """Write `out`, read it back, and return what llama.cpp does otherwise than training.

    `dtype` is one of `KINDS`; None keeps what the weights are in. `out` is there whole or not at all; where
    it is this export already, nothing is done. Raises ValueError for a student that llama.cpp has no map for,
    for an `out` that holds anything else or was cut, and for numbers that the type cannot hold.
    """
    gguf_package()
    source, out = Path(source).resolve(), Path(out)
    summaries = [read_summary(Path(path)) for path in scores]
    student = _read(source, dtype)
    entries = [*student.language, *student.vision]
    notes = [
        f"llama.cpp: {note}"
        for note in limits(
            student.config, student.processor, student.family, student.vocabulary, entries, student.kind
        )
    ]
    request = {**made_of(source, student.kind, summaries), "format": "gguf"}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _refuse_another(out, request)
        return [f"{out} is this very export already: nothing to do", *notes]
    with named(out), replacing_folder(out) as scratch:
        _write(student, scratch)
        (scratch / CARD).write_text(_card(source, student, notes, summaries), encoding="utf-8")
        files = {path.name: _digest(path) for path in sorted(scratch.iterdir())}
        text = json.dumps({**request, "files": files}, indent=2)
        (scratch / REQUEST).write_text(text + "\n", encoding="utf-8")
    return notes


def _read(source: Path, dtype: str | None) -> _Student:
    name = str(source)
    config, processor = load_config(name), served_processor(load_processor(name))
    check_vision(config, processor, name)
    text = text_config(config)
    family = family_of(text, name)
    weights = StockWeights(source, config)
    vocabulary = read_vocabulary(processor.tokenizer, text.vocab_size, name)
    language = language_entries(weights, text, family, name)
    kind = KINDS[dtype or _OF_DTYPE.get(weights.dtype(), "float32")]
    if kind in BLOCKED and len(unblocked(language)) == sum(e.kind(kind) != "F32" for e in language):
        raise ValueError(
            f"{name} has no weight of the language model whose rows are multiples of 32 numbers, as {dtype} "
            f"needs them (its width is {text.hidden_size}); take --dtype float16"
        )
    vision = vision_entries(weights, config, picture_scale=picture_scale(text, family))
    return _Student(
        name=source.parent.name if source.name == "model" else source.name,
        config=config,
        processor=processor,
        family=family,
        vocabulary=vocabulary,
        language=language,
        vision=vision,
        kind=kind,
    )


def _refuse_another(out: Path, request: dict) -> None:
    """ValueError where `out` is not what `request` asks for, whole."""
    path = out / REQUEST
    found = read_json(path) if path.is_file() else {}
    files = found.pop("files", {})
    if found != request or not isinstance(files, dict):
        raise ValueError(f"the export directory {out} holds another model or other files; give a new one")
    for name, digest in files.items():
        if not (out / name).is_file() or _digest(out / name) != digest:
            raise ValueError(
                f"{out / name} was cut or changed since the export; remove {out} and export again"
            )


def _write(student: _Student, scratch: Path) -> None:
    def language(writer: Any) -> None:
        describe_language(writer, text_config(student.config), student.family)
        describe_vocabulary(
            writer, student.vocabulary, student.processor.tokenizer, chat_template(student.processor)
        )
        writer.add_name(name_for_vocabulary(student.name, student.processor.tokenizer))

    def vision(writer: Any) -> None:
        describe_vision(writer, student.config, student.processor)
        writer.add_name(student.name)

    write_gguf(scratch / LANGUAGE, student.family.arch, student.language, language, kind=student.kind)
    pictures = "Q8_0" if student.kind == "Q4_0" else student.kind
    write_gguf(scratch / VISION, ARCHITECTURE, student.vision, vision, kind=pictures)
    text = modelfile(student.processor, LANGUAGE, VISION)
    (scratch / MODELFILE).write_text(text, encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _card(
    source: Path, student: _Student, notes: Sequence[str], scores: Sequence[tuple[str, float, int]]
) -> str:
    config = student.config
    lines = [
        "---",
        "library_name: gguf",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {student.name}",
        "",
        f"A LLaVA model distilled with llava_kd, for llama.cpp: `llama-server -m {LANGUAGE} --mmproj "
        f"{VISION} --temp 0`. For Ollama: `ollama create NAME -f {MODELFILE}` (written for it, not run with "
        "it).",
        "",
        f"- vision tower: {vision_config(config).model_type}, layer {config.vision_feature_layer}",
        f"- language model: {text_config(config).model_type}, as llama.cpp's {student.family.arch!r}",
        f"- weights in {student.kind}; text is split into words by the rule {student.vocabulary.rule!r}",
        "",
        "## What llama.cpp does differently",
        "",
        *(f"- {note.removeprefix('llama.cpp: ')}" for note in notes),
    ]
    if section := provenance_of(source):
        lines += ["", section.rstrip()]
    if scores:
        lines += ["", "## Scores", "", "Of the weights before this export:", ""]
        lines += ["| data | accuracy | questions |", "|---|---|---|"]
    lines += [f"| {name} | {accuracy:.4f} | {count} |" for name, accuracy, count in scores]
    return "\n".join(lines) + "\n"
