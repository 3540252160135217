"""Where a student comes from: what a finished run says of itself, and what the next stage makes sure of."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_kd import __version__
from llava_kd.checksums import meta_checksum, sealed
from llava_kd.config import TrainConfig, dump
from llava_kd.durable import write_text
from llava_kd.models.files.card import provenance
from llava_kd.relative import looked_from
from llava_kd.training.checkpoint import Best

VERSIONED = ("torch", "transformers", "numpy", "pillow")
_UNSEALED = {
    *("completed", "steps", "exported", "commit", "versions", "fingerprints", "parent", "config", "model")
}
EXPORTS = ("model", "peer")  # directories of a run's finished students
WRITTEN_BY = "written_by"  # the models whose answers were learned, where models wrote some
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


def checked_parent(checkpoint: str | None, *, whose: str = "student") -> dict[str, object] | None:
    """The run that `checkpoint` is a model of, or None if it is not a model of a run.

    Raises ValueError if that run is not complete, or its model is no longer what it wrote.
    """
    if checkpoint is None:
        return None
    if not Path(checkpoint).is_dir():
        if Path(checkpoint).name in EXPORTS and checkpoint.count("/") != 1:
            raise ValueError(
                f"`{whose}.checkpoint` {checkpoint} does not exist{looked_from(checkpoint)}: a stage writes "
                "it at its end; finish that stage first"
            )
        return None
    model = Path(checkpoint).resolve()
    run = model.parent
    if (
        model.name not in EXPORTS
        or not (run / "config.yaml").is_file()
        or not (run / "metrics.jsonl").is_file()
    ):
        return None
    if not (run / "run.json").is_file():
        raise ValueError(
            f"{checkpoint} belongs to the run {run}, which is not complete; finish that stage first"
        )
    record = read_run(run / "run.json")
    written, found = record.get(model.name, {}), file_hashes(model)
    changed = sorted(name for name in {**written, **found} if written.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{checkpoint} must be as its run wrote it, but {', '.join(changed)} changed. Move the edited "
            f"model out of {run}, or remove run.json and run that stage again to export the model again"
        )
    above = {"run": str(Path(checkpoint).parent), "model": found, "parent": record.get("parent")}
    return above | ({WRITTEN_BY: record[WRITTEN_BY]} if WRITTEN_BY in record else {})


def finish(
    config: TrainConfig,
    *,
    num_steps: int,
    identity: Mapping[str, str],
    parent: Mapping[str, object] | None,
    written_by: Sequence[Mapping[str, str]] = (),
    exported: Best | None = None,
    readings: Mapping[str, Sequence[str]],
) -> None:
    """Write the model cards, then `run.json`, which makes the run complete.

    `written_by`: the models that answered the data's questions, where any did. `exported` is the checkpoint
    that the model was taken from, None for the last weights. `readings`: of each directory of a finished
    student, what its card says of the processor.
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
        **({WRITTEN_BY: list(written_by)} if written_by else {}),
        **_not_repeatable(config),
    }
    for name, reading in readings.items():
        title = output.name if name == "model" else f"{output.name}, {name}"
        write_text(output / name / CARD, card(title, record, reading))
    hashes = {name: file_hashes(output / name) for name in readings}
    write_text(output / "run.json", json.dumps(sealed({**record, **hashes}), indent=2))


def _not_repeatable(config: TrainConfig) -> dict[str, str]:
    """Why the same command does not give the same weights, where it does not."""
    if config.on_policy is None or config.on_policy.server is None:
        return {}
    return {
        "not_repeatable": (
            "a server generated answers during training (on_policy.server): repeating or resuming the run "
            "gives different weights"
        )
    }


def read_run(path: Path) -> dict:
    """What a finished run wrote of itself. ValueError where that has changed since.

    A file of a version without a checksum, which had these entries alone, is trusted.
    """
    try:
        record = json.loads(path.read_bytes())
        is_sealed = "checksum" in record
        is_whole = record["checksum"] == meta_checksum(record) if is_sealed else set(record) <= _UNSEALED
    except (ValueError, TypeError, AttributeError):
        is_whole, record = False, {}
    if not is_whole:
        raise ValueError(
            f"{path} is damaged: its checksum has changed; remove it, then run the same command again to "
            "finish that run from its last checkpoint"
        )
    return record


def card(name: str, record: Mapping[str, object], reading: Sequence[str]) -> str:
    """Model card: how to load the student, and where it comes from."""
    notes = "".join(f"\n{note}\n" for note in reading)
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A stock LLaVA student, trained by llava_kd. transformers 5 reads it; `llava-kd export` writes it for others
too.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```
{notes}
{provenance(record)}"""
