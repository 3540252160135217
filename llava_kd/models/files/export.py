"""A finished student as a stock directory for others: checked, cast, and with a model card.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_kd.models.files.card import HEADING, front_matter, provenance, public, reading_notes
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.files.older_tools import INNER_TOWERS, make_portable
from llava_kd.models.files.served import served_processor
from llava_kd.models.projectors.conv_attention import ConvAttentionConfig
from llava_kd.models.projectors.from_teacher import folded
from llava_kd.models.reading import read_json
from llava_kd.models.towers.adapted import AdaptedTowerConfig
from llava_kd.models.towers.vision_tower import family, text_config, vision_config

_FOLDED = 1e-4  # two matrices in one round differently
REQUEST = "export.json"
# Small models with towers and language models of these kinds were read by both versions, and answered alike.
VERSION_OF_4 = "4.57.6"
TOWERS_OF_4 = ("siglip_vision_model", "clip_vision_model")
LANGUAGES_OF_4 = ("qwen2", "qwen3", "llama")
_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.1, torch.float16: 0.02}


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    scores: Sequence[str | Path] = (),
) -> list[str]:
    """Write `out`, check that stock transformers gives equal logits from it, and return notes on other tools.

    `out` is there whole or not at all; where it is this export already, nothing is done. `scores` are
    summaries of `llava-kd eval`. Raises ValueError for a student that stock LLaVA cannot express, for an
    `out` that holds anything else, and where the written logits differ.
    """
    source, out = Path(source).resolve(), Path(out)
    summaries = [read_summary(Path(path)) for path in scores]
    parts = load_stock(str(source))
    check_stock(parts, str(source))
    written = folded(parts, str(source))
    notes = [*vllm_notes(written), *llama_cpp_notes(written), transformers_note(written)]
    request = made_of(source, None if dtype is None else str(dtype).removeprefix("torch."), summaries)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if request_of(out) != request:
            raise ValueError(f"the export directory {out} is not empty; give a new one")
        return [f"{out} is this very export already: nothing to do", *notes]

    def complete(scratch: Path) -> None:
        make_portable(scratch, written.stock.config)
        stock = LlavaForConditionalGeneration.from_pretrained(scratch, dtype=dtype or torch.float32)
        tolerance = max(_TOLERANCE[dtype or torch.float32], 0.0 if written is parts else _FOLDED)
        difference = _check_logits(parts, stock, out, tolerance)
        whole = Parts(stock=stock, processor=served_processor(written.processor))
        card = model_card(source, whole, notes, summaries, difference)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        (scratch / REQUEST).write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")

    save_stock(written, out, dtype=dtype, complete=complete)
    return notes


def made_of(source: Path, dtype: str | None, scores: Sequence[tuple[str, float, int]]) -> dict:
    """What an export is made of, so that the same command finds its work done after a kill at its end."""
    digest = hashlib.sha256()
    for path in sorted(source.glob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return {
        "source": digest.hexdigest(),
        "dtype": dtype,
        "scores": [list(score) for score in scores],
    }


def request_of(out: Path) -> dict | None:
    """What the export in `out` was made of; None where it is none."""
    path = out / REQUEST
    return read_json(path) if path.is_file() else None


def read_summary(path: Path) -> tuple[str, float, int]:
    """Name, accuracy and number of questions of a summary.json of `llava-kd eval`."""
    if not path.is_file():
        raise ValueError(f"there are no scores {path}; give the summary.json of `llava-kd eval`")
    tree = read_json(path)
    if not {"accuracy", "count"} <= set(tree):
        raise ValueError(
            f"{path} must hold accuracy and count, as the summary.json of `llava-kd eval` does; it has "
            f"{sorted(tree)}"
        )
    return path.parent.name, float(tree["accuracy"]), int(tree["count"])


def check_stock(parts: Parts, name: str) -> None:
    """ValueError, with what would make it loadable, where stock LLaVA has no class for tower or connector."""
    config = parts.stock.config
    odd, imports, instead = [], [], []
    if isinstance(config, ConvAttentionConfig):
        odd.append("the connector conv_attention")
        imports.append("llava_kd.models.projectors.conv_attention")
        instead.append("projector: own")
    if not family(config).is_stock:
        vision = vision_config(config)
        kind = vision.model_type
        if isinstance(vision, AdaptedTowerConfig):
            kind = f"{vision.library}:{vision.architecture}"
        odd.append(f"the tower {kind}")
        imports.append(type(parts.stock.model.vision_tower).__module__)
        instead.append("a tower of docs/towers.md that is marked stock")
    if odd:
        raise ValueError(
            f"{name} has {' and '.join(odd)}, for which stock LLaVA has no class, so no stock export is "
            f"possible. It loads where llava_kd is installed, after `import {', '.join(imports)}`; or train "
            f"with {' and '.join(instead)}"
        )


@torch.no_grad()
def _check_logits(parts: Parts, written: LlavaForConditionalGeneration, out: Path, tolerance: float) -> float:
    """Largest difference, as a share of the largest logit, between the source and what stock reads back."""
    inputs = _probe(parts)
    before_BTV = parts.stock.eval()(**inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"].to(written.dtype)
    after_BTV = written.eval()(**inputs).logits.float()
    difference = float((before_BTV - after_BTV).abs().max() / before_BTV.abs().max().clamp_min(1e-6))
    if not difference <= tolerance:
        raise ValueError(
            f"the logits of {out} differ from those of its source by {difference:.3g} of the largest, more "
            f"than {tolerance:g} for {written.dtype}; do not use it"
        )
    return difference


def _probe(parts: Parts) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 80), generator=generator, dtype=torch.uint8)
    encoded = parts.processor(
        images=[image], text="<image> What is it?", text_kwargs={"return_tensors": "pt"}
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def vllm_notes(parts: Parts) -> list[str]:
    """What stands against serving with vLLM's LLaVA; empty if nothing. `tests/tools` runs it.

    Read in vllm/model_executor/models/llava.py: `init_vision_tower_for_llava` takes CLIP, SigLIP and Pixtral
    towers, builds layers up to `vision_feature_layer` without the final normalisation, as the stock hidden
    states have it, and drops the first token for strategy `default`, also of SigLIP, as stock does.
    """
    tower = vision_config(parts.stock.config).model_type
    if tower in INNER_TOWERS:
        return []
    return [f"vLLM reads LLaVA with a SigLIP or CLIP tower; this one is {tower!r}"]


def llama_cpp_notes(parts: Parts) -> list[str]:
    """What stands against llama.cpp's converter: of stock LLaVA directories it takes Pixtral's tower only.

    Read in conversion/llava.py and base.py of ggml-org/llama.cpp: `LlavaVisionModel` raises for every
    `model_type` of a tower but pixtral's; the text converter goes by `text_config.architectures`.
    """
    tower = vision_config(parts.stock.config).model_type
    own = "`llava-kd export --format gguf` writes its files; " if tower in INNER_TOWERS else ""
    return [
        f"llama.cpp: {own}its `convert_hf_to_gguf.py --mmproj` refuses a LLaVA with a {tower!r} tower (it "
        "takes Pixtral's only), and without --mmproj converts the language model alone"
    ]


def transformers_note(parts: Parts) -> str:
    """Which versions of transformers read the export; `tests/test_transformers_4.py` asks both."""
    config = parts.stock.config
    tower, text = vision_config(config).model_type, text_config(config).model_type
    if tower in TOWERS_OF_4 and text in LANGUAGES_OF_4:
        return (
            "transformers: version 5 reads it. Exports of small models with this kind of tower "
            f"({tower}) and of language model ({text}) were tried in {VERSION_OF_4} too: every weight was "
            "found there; prompts and greedy answers, one by one and in batches, were those of version 5. "
            "This very model was not tried there"
        )
    return f"transformers: needs version 5; {tower!r} with {text!r} was not tried under transformers 4"


def model_card(
    source: Path,
    parts: Parts,
    notes: Sequence[str],
    scores: Sequence[tuple[str, float, int]],
    difference: float,
) -> str:
    """README.md: parts, how it was trained (from the run beside the model), scores, and notes."""
    config = parts.stock.config
    name = source.parent.name if source.name == "model" else source.name
    lines = [
        "---",
        front_matter(name, scores),
        "---",
        f"# {name}",
        "",
        "A LLaVA model distilled with llava_kd; `AutoModelForImageTextToText.from_pretrained` loads it.",
        "",
        f"- vision tower: {vision_config(config).model_type}, {parts.tokens_per_image} tokens an image, "
        f"layer {config.vision_feature_layer}, strategy {config.vision_feature_select_strategy}",
        f"- language model: {config.get_text_config().model_type}",
        f"- parameters: {sum(p.numel() for p in parts.stock.parameters()):,}",
        f"- weights in {str(parts.stock.dtype).removeprefix('torch.')}; logits differ from the trained "
        f"ones by at most {difference:.2g} of the largest",
    ]
    if reading := reading_notes(parts.processor):
        lines += ["", "## Reading it", "", *reading]
    if section := provenance_of(source):
        lines += ["", section.rstrip()]
    if scores:
        lines += ["", "## Scores", "", "| data | accuracy | questions |", "|---|---|---|"]
    lines += [f"| {name} | {accuracy:.4f} | {count} |" for name, accuracy, count in scores]
    if notes:
        lines += ["", "## Other tools", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def provenance_of(source: Path) -> str:
    """From the run that the model is of, or else from the card that the model came with."""
    run, card = source.parent / "run.json", source / "README.md"
    if source.name == "model" and run.is_file():
        return provenance(read_json(run))
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    _, heading, section = text.partition(f"{HEADING}\n")
    return public(heading + section.partition("\n## ")[0])
