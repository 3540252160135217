"""Centroids of what a model said before it is tuned: their file, whose they are, and the objective with them.

Shape legend: K labels with a centroid, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llava_kd.assembly.parts.data import side_in, source_in
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.assembly.parts.stored_teacher import identity, refuse_other
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.batches.model_side import Side
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.objective import Objective
from llava_kd.distill.terms.tuning.collapse import Collapse
from llava_kd.distill.terms.tuning.mcmi import MCMI
from llava_kd.losses.tuning.information import Centroids
from llava_kd.models.files.checkpoint import Parts

HOW = "`llava-kd data centroids CONFIG --out FILE` writes them"
_FORMAT = 1
_SUM_ERROR = 1e-3  # of a centroid's probabilities: fp32 over a large vocabulary


@dataclass(frozen=True, kw_only=True)
class StoredCentroids:
    """Mean predictions [K, V] after the tokens [K], over `rows_K` rows each, and whose they are.

    `cross_entropy` is the model's over all answer tokens, in nats, at temperature 1.
    """

    tokens_K: Tensor
    centroids_KV: Tensor
    rows_K: Tensor
    cross_entropy: float
    identity: Mapping[str, str]

    def write(self) -> bytes:
        """As one safetensors file, the identity in its header."""
        tensors = {"tokens": self.tokens_K, "centroids": self.centroids_KV, "rows": self.rows_K}
        said = {"format": _FORMAT, "cross_entropy": self.cross_entropy, "identity": dict(self.identity)}
        return save({n: t.cpu().contiguous() for n, t in tensors.items()}, {"centroids": json.dumps(said)})

    @staticmethod
    def read(path: str | Path) -> StoredCentroids:
        """Raises ValueError for what is no such file."""
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})["centroids"])
                tokens_K, centroids_KV, rows_K = (
                    file.get_tensor(name) for name in ("tokens", "centroids", "rows")
                )
            if said["format"] != _FORMAT:
                raise ValueError(f"its format is {said['format']}, but must be {_FORMAT}")
            found = StoredCentroids(
                tokens_K=tokens_K,
                centroids_KV=centroids_KV,
                rows_K=rows_K,
                cross_entropy=float(said["cross_entropy"]),
                identity={str(name): str(value) for name, value in said["identity"].items()},
            )
            found._check()
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the centroids {path} cannot be read ({type(error).__name__}: {error}); {HOW} anew"
            ) from error
        return found

    def _check(self) -> None:
        tokens_K, centroids_KV = self.tokens_K, self.centroids_KV
        if tokens_K.dtype != torch.long or tokens_K.ndim != 1 or centroids_KV.dtype != torch.float32:
            raise ValueError("tokens must be whole numbers and centroids fp32")
        if centroids_KV.ndim != 2 or len(centroids_KV) != len(tokens_K) or not len(tokens_K):
            raise ValueError(f"{len(tokens_K)} tokens, centroids {list(centroids_KV.shape)}")
        in_range = (tokens_K >= 0) & (tokens_K < centroids_KV.shape[1])
        if not bool(in_range.all()) or len(tokens_K.unique()) < len(tokens_K):
            raise ValueError("tokens must be different and in the vocabulary")
        sums_K = centroids_KV.sum(1)
        if bool((centroids_KV < 0).any()) or not bool(((sums_K - 1).abs() < _SUM_ERROR).all()):
            raise ValueError("each centroid must contain probabilities with sum 1")


def mcmi_of(config: TrainConfig) -> MCMI | None:
    return next((term for term in terms_of(config.objective).values() if isinstance(term, MCMI)), None)


def tuned_checkpoint(config: TrainConfig) -> str:
    """The model that the stage tunes. ValueError where it makes a new one, or keeps no label."""
    if config.student.checkpoint is None:
        raise ValueError(
            "`objective.mcmi` needs a trained model; set student.checkpoint to it, instead of "
            "student.vision_tower and language_model"
        )
    if not any(name == "cross_entropy" and t.weight > 0 for name, t in config.objective.terms.items()):
        raise ValueError(
            "`objective.mcmi` must be combined with cross-entropy, because without it the model unlearns "
            "its answers; add objective.cross_entropy with a weight above 0"
        )
    return config.student.checkpoint


def identity_of(config: TrainConfig, reader: Side, source: Source, temperature: float) -> dict[str, str]:
    """Everything that decides centroids, by name; `reader`: how the model that is tuned reads these data."""
    found = identity(TeacherConfig(checkpoint=tuned_checkpoint(config)), reader, source)
    own = {
        name.replace("of the teacher", "of the model"): value
        for name, value in found.items()
        if not name.startswith("teacher.")
    }
    return {**own, "objective.mcmi.temperature": f"{temperature:g}"}


def with_centroids(config: TrainConfig, terms: Objective, student: Parts, source: Source | None) -> Objective:
    """The objective with the centroids that its settings name, and a watch; unchanged where none reads any.

    ValueError where they are not there, or are of another model, tokenizer, temperature or of other data.
    """
    term = mcmi_of(config)
    if term is None:
        return terms
    tuned_checkpoint(config)
    if term.centroids is None:
        raise ValueError(f"`objective.mcmi.centroids` is null; {HOW} before the stage, then set it to FILE")
    stored = StoredCentroids.read(term.centroids)
    reader = side_in(config, student, config.student)
    here = identity_of(config, reader, source or source_in(config), term.temperature)
    remedy = "write a new file with `llava-kd data centroids`"
    refuse_other(stored.identity, here, f"the file of centroids {term.centroids}", remedy)
    made = Centroids.of(stored.tokens_K, stored.centroids_KV).to(student.stock.lm_head.weight.device)
    advice = "Lower objective.mcmi.weight or clamp, or optim.lr, and start in a new output_dir"
    watch = Collapse(before=stored.cross_entropy, margin=term.margin, advice=advice)
    return replace(terms, common=replace(terms.common, centroids=made), watch=watch)


def centroids_fingerprint(config: TrainConfig) -> dict[str, str]:
    """Of the file that a run relies on and does not save."""
    term = mcmi_of(config)
    if term is None or term.centroids is None or not Path(term.centroids).is_file():
        return {}
    with open(term.centroids, "rb") as file:
        return {"centroids": hashlib.file_digest(file, "sha256").hexdigest()}
