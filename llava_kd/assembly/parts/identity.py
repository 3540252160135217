"""Hashes of what a run relies on and does not save."""

from __future__ import annotations

from pathlib import Path

from llava_kd.assembly.parts.models import wholly_trained
from llava_kd.assembly.parts.tuning.centroids import centroids_fingerprint
from llava_kd.assembly.settings import tables_of
from llava_kd.config import TrainConfig
from llava_kd.data.teacher_store.store import Manifest
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.fingerprint import weights_fingerprint
from llava_kd.models.foreign.loading import AnyParts
from llava_kd.models.trained import PREFIXES, trained_of


def frozen_fingerprints(config: TrainConfig, student: Parts, teacher: AnyParts | None) -> dict[str, str]:
    """Hashes of the weights that a run relies on and does not save, as they are on disk."""
    stock = student.stock
    trained = trained_of(stock, wholly_trained(config), config.vision_tower_last_layers)
    # By part, and the number of the module in it: the names that older runs have hashed.
    places = [(part, i, place) for part, own in PREFIXES.items() for i, place in enumerate(own)]
    weights = {
        f"{part}.{index}.{name}": tensor
        for part, index, place in places
        for name, tensor in stock.get_submodule(place.rstrip(".")).state_dict(keep_vars=True).items()
        if f"{place}{name}" not in trained
    }
    prints = {"frozen part of the student": weights_fingerprint(weights)}
    prints |= centroids_fingerprint(config)
    return prints | _teacher_fingerprints(config, teacher) | tables_of(config).fingerprints


def _teacher_fingerprints(config: TrainConfig, teacher: AnyParts | None) -> dict[str, str]:
    """What a run relies on and does not save: the teacher's weights, or the cache of its predictions."""
    if teacher is None or config.teacher is None:
        return {}
    if config.teacher.cache is None:
        return {"teacher": weights_fingerprint(teacher.stock.state_dict())}
    manifest = Manifest.read(Path(config.teacher.cache))
    return {"teacher": manifest.identity["weights of the teacher"], "cache of the teacher": manifest.digest}
