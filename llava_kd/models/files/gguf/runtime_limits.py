"""What llama.cpp cannot express of a student, or does otherwise: printed, and written into the card."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlavaConfig, LlavaProcessor

from llava_kd.models.files.gguf.language import LanguageFamily, context_length, head_size
from llava_kd.models.files.gguf.pictures import template_with_marks
from llava_kd.models.files.gguf.tokens import UNKNOWN_RULE, Vocabulary
from llava_kd.models.files.gguf.writing import BLOCK, BLOCKED, Entry, unblocked
from llava_kd.models.towers.vision_tower import input_size, text_config, vision_config

PADDING = (122, 116, 104)  # its colour for `mlp` (tools/mtmd/clip.cpp)


def limits(
    config: LlavaConfig,
    processor: LlavaProcessor,
    family: LanguageFamily,
    vocabulary: Vocabulary,
    entries: Sequence[Entry],
    kind: str,
) -> list[str]:
    """One line each, of those that are true of this student."""
    return [
        *_pictures(config, processor),
        *_places(processor),
        *_words(vocabulary),
        *_computing(config, family),
        *(_blocks(entries, kind.lower()) if kind in BLOCKED else []),
    ]


def _pictures(config: LlavaConfig, processor: LlavaProcessor) -> list[str]:
    images = processor.image_processor.to_dict()
    height, width = input_size(processor.image_processor)
    if images.get("do_pad"):
        return [
            "oblong pictures are padded to a square around their middle, as in training, but after they are "
            f"resized, and in the colour {PADDING} whatever training padded with"
        ]
    how = "cropped" if images.get("do_center_crop") else "stretched"
    return [
        f"llama.cpp pads an oblong picture to a square in the colour {PADDING}; this student was trained on "
        f"pictures that were {how}. Send pictures of {width} x {height} pixels, made so by the client, or "
        "train with data.image_aspect: pad"
    ]


def _places(processor: LlavaProcessor) -> list[str]:
    if template_with_marks(processor) is not None:
        return []
    return [
        "pictures stand where the client puts them in its question, without the newline or the order that "
        "this student's chat template gives them; send the picture first, and a question that begins with a "
        "newline"
    ]


def _words(vocabulary: Vocabulary) -> list[str]:
    if vocabulary.model != "gpt2" or vocabulary.rule != UNKNOWN_RULE:
        return []
    return [
        "the rule by which this tokenizer cuts words is none of those known here, so the file names "
        "llama.cpp's default: it will load with a warning, split some words and numbers differently than in "
        "training, and may answer worse. Compare /tokenize of its server with the tokenizer before use"
    ]


def _computing(config: LlavaConfig, family: LanguageFamily) -> list[str]:
    text, vision = text_config(config), vision_config(config)
    lines = []
    if vision.model_type == "clip_vision_model":
        lines.append(
            "versions that put the class token after the patches (from May 2025; ggml-org/llama.cpp#25814) "
            "drop the first patch of a CLIP tower, read its class token for the last one, and shift "
            "positions by one; the file is as a version without that fault needs it. Score its answers "
            "before use, or take a SigLIP tower"
        )
    if vision.hidden_act == "gelu":
        lines.append("the tower's GELU is computed by its tanh form; features differ in the third digit")
    if (length := context_length(text, family)) < text.max_position_embeddings:
        lines.append(
            f"context_length is {length}, the window of its attention: llama.cpp attends to everything"
        )
    if head_size(text) % BLOCK:
        lines.append(
            f"a head is {head_size(text)} wide, no multiple of {BLOCK}, so its cache cannot be quantised: "
            "leave --cache-type-k and --cache-type-v at f16"
        )
    return lines


def _blocks(entries: Sequence[Entry], kind: str) -> list[str]:
    left = unblocked(entries)
    if not left:
        return []
    widths = sorted({entry.shape[-1] for entry in left})
    return [
        f"{len(left)} weights stay in float16: their rows are {widths} wide, and {kind} cuts rows into "
        f"blocks of {BLOCK}"
    ]
