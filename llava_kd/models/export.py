"""A finished student as a stock directory for others: checked, cast, and with a model card.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_kd.models.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.portable import INNER_TOWERS, make_portable
from llava_kd.models.reading import read_json
from llava_kd.models.teacher_projector import folded
from llava_kd.models.vision_tower import family, vision_config

_FOLDED = 1e-4  # two matrices in one round differently
_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.1, torch.float16: 0.02}


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    scores: Sequence[str | Path] = (),
) -> list[str]:
    """Write `out`, check that stock transformers gives equal logits from it, and return notes on other tools.

    `scores` are summaries of `llava-kd eval`. Raises ValueError for a student that stock LLaVA cannot
    express, for an `out` that is not empty, and where the written logits differ.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"the export directory {out} is not empty; give a new one")
    summaries = [read_summary(Path(path)) for path in scores]
    parts = load_stock(str(source))
    check_stock(parts, str(source))
    written = folded(parts, str(source))
    save_stock(written, out, dtype=dtype)
    make_portable(out, written.stock.config)
    stock = LlavaForConditionalGeneration.from_pretrained(out, dtype=dtype or torch.float32)
    tolerance = max(_TOLERANCE[dtype or torch.float32], 0.0 if written is parts else _FOLDED)
    difference = _check_logits(parts, stock, out, tolerance)
    notes = [*vllm_notes(written), *llama_cpp_notes(written)]
    whole = Parts(stock=stock, processor=written.processor)
    (out / "README.md").write_text(model_card(source, whole, notes, summaries, difference))
    return notes


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
    """ValueError, with what would make it loadable, where stock LLaVA has no class for the tower."""
    if family(parts.stock.config).is_stock:
        return
    vision = vision_config(parts.stock.config).to_dict()
    raise ValueError(
        f"{name} has the tower {vision['library']}:{vision['architecture']}, for which stock LLaVA has no "
        "class, so no stock export is possible. It loads where llava_kd is installed, after `import "
        "llava_kd.models.adapted_tower`; or train with a tower of docs/towers.md that is marked stock"
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
    """What stands against serving with vLLM's LLaVA; empty if nothing.

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
    return [
        f"llama.cpp: `convert_hf_to_gguf.py --mmproj` refuses a LLaVA with a {tower!r} tower (it takes "
        "Pixtral's only); without --mmproj it converts the language model alone. Its legacy scripts for "
        "tower and projector read the names of LLaVA-1.5, not of transformers"
    ]


def model_card(
    source: Path,
    parts: Parts,
    notes: Sequence[str],
    scores: Sequence[tuple[str, float, int]],
    difference: float,
) -> str:
    """README.md: parts, how it was trained (from the run beside the model), scores, and notes."""
    config = parts.stock.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {source.parent.name if source.name == 'model' else source.name}",
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
    run = source.parent / "run.json"
    if run.is_file():
        versions = json.loads(run.read_text()).get("versions", {})
        lines += ["", "## Trained with", "", *(f"- {name} {version}" for name, version in versions.items())]
    settings = source.parent / "config.yaml"
    if settings.is_file():
        lines += ["", "## Settings", "", "```yaml", settings.read_text().rstrip(), "```"]
    if scores:
        lines += ["", "## Scores", "", "| data | accuracy | questions |", "|---|---|---|"]
    lines += [f"| {name} | {accuracy:.4f} | {count} |" for name, accuracy, count in scores]
    if notes:
        lines += ["", "## Other tools", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
