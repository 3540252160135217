"""Where a student comes from: what a finished run says of itself, and what the next stage makes sure of."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from llava_kd import __version__
from llava_kd.config import TrainConfig, dump
from llava_kd.training.checkpoint import Best, write_text

VERSIONED = ("torch", "transformers", "numpy", "pillow")
CARD = "README.md"  # prose that a user may edit; not part of the hashes


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"llava_kd": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}}


def commit() -> str | None:
    """Commit of the source tree that runs, with `-dirty` if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a model directory, by name."""
    hashes = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != CARD:
            with path.open("rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def checked_parent(checkpoint: str | None) -> dict[str, object] | None:
    """The run that `checkpoint` is the model of, or None if it is not the model of a run.

    Raises ValueError if that run is not complete, or its model is no longer what it wrote.
    """
    if checkpoint is None:
        return None
    if not Path(checkpoint).is_dir():
        if Path(checkpoint).name == "model" and checkpoint.count("/") != 1:
            raise ValueError(
                f"`student.checkpoint` {checkpoint} does not exist: a stage writes it at its end; run that "
                "stage first, or to its end"
            )
        return None
    model = Path(checkpoint).resolve()
    run = model.parent
    if model.name != "model" or not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        return None
    if not (run / "run.json").is_file():
        raise ValueError(
            f"{checkpoint} belongs to the run {run}, which is not complete; finish that stage first"
        )
    record = json.loads((run / "run.json").read_text())
    written, found = record.get("model", {}), file_hashes(model)
    changed = sorted(name for name in {**written, **found} if written.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{checkpoint} is no longer what its run wrote: {', '.join(changed)} changed. Copy a model "
            f"that you edit out of {run}, or remove run.json and run that stage again to export it anew"
        )
    return {"run": str(Path(checkpoint).parent), "model": found, "parent": record.get("parent")}


def finish(
    config: TrainConfig,
    *,
    num_steps: int,
    identity: Mapping[str, str],
    parent: Mapping[str, object] | None,
    exported: Best | None = None,
) -> None:
    """Write the model card, then `run.json`, which makes the run complete.

    `exported` is the checkpoint that the model was taken from, None for the last weights.
    """
    output = Path(config.output_dir)
    record = {
        "completed": True,
        "steps": num_steps,
        "exported": None if exported is None else dataclasses.asdict(exported),
        "commit": commit(),
        "versions": versions(),
        "fingerprints": dict(identity),
        "parent": parent,
        "config": dump(config),
    }
    write_text(output / "model" / CARD, card(config, record))
    model = file_hashes(output / "model")
    write_text(output / "run.json", json.dumps({**record, "model": model}, indent=2))


def card(config: TrainConfig, record: Mapping[str, object]) -> str:
    """Model card: how to load the student, and where it comes from."""
    student, teacher = config.student, config.teacher
    parts = f"{student.vision_tower} and {student.language_model}"
    rows = {
        "started from": student.checkpoint or parts,
        "teacher": "none" if teacher is None else teacher.checkpoint,
        "trained parts": ", ".join(config.trainable),
        "data": config.data.path or ", ".join(f"{s.path} x {s.weight:g}" for s in config.data.sources),
        "optimiser steps": record["steps"],
        "exported": _exported(record.get("exported")),
        "commit": record["commit"] or "not in a repository",
    }
    prints, used = record["fingerprints"], record["versions"]
    assert isinstance(prints, dict)
    assert isinstance(used, dict)
    rows |= {f"fingerprint: {what}": value for what, value in prints.items()}
    rows |= {f"version: {name}": value for name, value in used.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {Path(config.output_dir).name}

A stock LLaVA student, trained by llava_kd.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```

| provenance | |
|---|---|
{table}

{_lineage(record.get("parent"))}The settings of its last stage:

```yaml
{record["config"]}```
"""


def _exported(best: object) -> str:
    if not isinstance(best, dict):
        return "the last step"
    return f"step {best['step']}, the best by {best['figure']}: {best['value']:.4f}"


def _lineage(parent: object) -> str:
    runs = []
    while isinstance(parent, dict):
        runs.append(str(parent["run"]))
        parent = parent["parent"]
    return f"Stages before it: {' -> '.join(reversed(runs))}.\n\n" if runs else ""
