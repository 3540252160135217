"""A small search file, data that it may read, and runs for the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from tiny_runs import write_stage

from llava_kd.search.store.entries import DataSet, Entry

SPACE = {
    "optim.lr": {"from": "1e-4", "to": 0.1, "log": True},
    "objective.response_kl.weight": {"from": 0.0, "to": 2.0},
    "objective.response_kl.divergence": ["forward", "reverse", "jsd"],
}


def write_records(path: Path, answers: list[str], question: str = "What colour is it?") -> Path:
    """One turn a record, about pictures that need not be there."""
    records = [
        {
            "id": str(k),
            "image": f"{k}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for k, answer in enumerate(answers)
    ]
    path.write_text(json.dumps(records))
    return path


def write_search(folder: Path, space: Mapping[str, object] = SPACE, **more: object) -> Path:
    """`search.yaml` beside a recipe `taught.yaml` whose models need not be there."""
    models = {"student": folder / "student", "teacher": folder / "teacher"}
    write_stage(folder / "taught", data=folder, max_steps=10, **models)
    write_records(folder / "instructions.json", ["red", "blue", "red", "green"])
    tree = {
        "name": "rates",
        "recipe": "taught.yaml",
        "overrides": {"evaluate": {"every": 5, "slices": {"val": {"data": "v.json"}}}},
        "space": dict(space),
        "budget": {"trials": 6},
        "store": str(folder / "store.sqlite"),
        "output": str(folder / "out"),
        **more,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def entry(key: str, data: str = "a", **more: object) -> Entry:
    return Entry(**{"key": key, "name": f"run {key}", "settings": {}, "data": data, **more})  # type: ignore[arg-type]


def data_set(fingerprint: str, **features: float) -> DataSet:
    plain = {"records": 100.0, "words an answer": 1.0, "asks: what": 1.0}
    return DataSet(fingerprint=fingerprint, name=f"data {fingerprint}", features={**plain, **features})
