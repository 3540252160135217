"""YAML of small stages, for tests that run them."""

from __future__ import annotations

from pathlib import Path

import yaml

DISTILLED = {
    "cross_entropy": {"weight": 1.0},
    "response_kl": {"weight": 1.0},
    "visual_kl": {"weight": 1.0},
    "relation": {"weight": 0.5},
}


def write_stage(
    output_dir: Path,
    *,
    data: Path,
    student: Path,
    teacher: Path | None,
    distilled: bool = True,
    template: str = "vicuna",
    trainable: tuple[str, ...] = ("multi_modal_projector", "language_model"),
    global_batch_size: int = 4,
    micro_batch_size: int = 2,
    max_steps: int = 3,
    engine: str = "single",
    lr: float = 1e-3,
    **more: object,
) -> Path:
    """Write `<output_dir>.yaml` and return its path."""
    tree: dict[str, object] = {
        "output_dir": str(output_dir),
        "student": {"checkpoint": str(student)},
        "data": {
            "path": str(data / ("captions.json" if template == "plain" else "instructions.json")),
            "images": str(data),
            "template": template,
            "max_length": 512,
            "num_workers": 0,
        },
        "objective": dict(DISTILLED) if distilled else {"cross_entropy": {"weight": 1.0}},
        "optim": {"lr": lr},
        "trainable": list(trainable),
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "max_steps": max_steps,
        "engine": {"kind": engine, "precision": "fp32", "device": "cpu"},
        "log": {"every": 1, "progress": False},
        "checkpoint": {"every": 100, "keep": 2},
        **more,
    }
    if distilled:
        tree["teacher"] = {"checkpoint": str(teacher), "dtype": "float32"}
    path = output_dir.with_name(output_dir.name + ".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path
