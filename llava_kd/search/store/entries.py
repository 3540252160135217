"""What the store keeps of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_kd.search.grids.sharing import deciding

_LOWER = "loss/"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`settings` by dotted names, the seed among them. `failure` says why it has no scores of its end.

    `data` is the fingerprint of the records that it was trained on; None where they could not be read.
    """

    key: str
    name: str
    settings: Mapping[str, object]
    data: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Records that runs were trained on, as the figures of features.py."""

    fingerprint: str
    name: str
    features: Mapping[str, float]


def is_lower_better(score: str) -> bool:
    """Of a figure such as slice/NAME, loss/NAME or eval/NAME."""
    return score.startswith(_LOWER)


def better(score: str, value: float) -> float:
    """The value such that more is better."""
    return -value if is_lower_better(score) else value


def settings_of(tree: Mapping[str, object]) -> dict[str, object]:
    """What decides a result, by dotted names, as JSON has it; `tree` holds the defaults too."""
    return json.loads(json.dumps(deciding(tree), sort_keys=True, default=str))


def key_of(directory: Path, tree: Mapping[str, object]) -> str:
    """The same for the same run, however often it is entered."""
    text = json.dumps([str(directory.resolve()), settings_of(tree)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(entry: Entry) -> str:
    return json.dumps(dataclasses.asdict(entry), sort_keys=True)


def from_json(text: str) -> Entry:
    return Entry(**json.loads(text))
