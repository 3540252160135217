"""A peer: the stage as it sees it, its model, and how it teaches and learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from llava_kd.assembly.parts.adapters import adapt_student
from llava_kd.assembly.parts.first_projector import begin_projector
from llava_kd.assembly.parts.identity import frozen_fingerprints
from llava_kd.assembly.parts.lending import tap_both
from llava_kd.assembly.parts.models import compute_dtype, placed_student, student_in
from llava_kd.assembly.parts.objective import objective
from llava_kd.assembly.runs.provenance import checked_parent
from llava_kd.config import PeerConfig, TrainConfig
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.objective import Objective
from llava_kd.distill.teaching.peer import Peer
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.mllm import MLLM
from llava_kd.parallel.world import World

Say = Callable[[str], None]


def mirrored(config: TrainConfig) -> TrainConfig:
    """The stage as its peer sees it: the peer is the student, and the student its peer.

    Its seed is the next one, so that two students of the same settings do not begin alike.
    """
    assert config.peer is not None
    own = PeerConfig(**{f.name: getattr(config.student, f.name) for f in fields(config.student)})
    return replace(
        config,
        student=config.peer,
        peer=own,
        objective=config.objective.mirrored(),
        seed=config.seed + 1,
    )


def peer_parts(config: TrainConfig, source: Source, world: World, say: Say) -> Parts | None:
    """The peer that the settings name, None without. ValueError where it cannot be read."""
    if config.peer is None:
        return None
    its = mirrored(config)
    peer = student_in(its, lambda line: say(f"template of the peer: {line}"))
    begin_projector(its, peer, source, world, lambda line: say(f"peer: {line}"))
    return peer


def check_peer_parent(config: TrainConfig) -> None:
    """ValueError for a checkpoint of a run that is not complete, or that was changed."""
    if config.peer is not None:
        checked_parent(config.peer.checkpoint, whose="peer")


def peer_fingerprints(config: TrainConfig, peer: Parts | None) -> dict[str, str]:
    """Of what of it a run relies on and does not save."""
    if config.peer is None or peer is None:
        return {}
    found = frozen_fingerprints(mirrored(config), peer, None)
    return {"frozen part of the peer": found["frozen part of the student"]}


def peer_terms(its: TrainConfig, peer: Parts, student: Parts) -> Objective:
    """The peer's objective in the stage as it sees it. ValueError where it cannot learn from the student."""
    try:
        return objective(its.objective, peer, student, its.data.visual_alignment, seed=its.seed)
    except ValueError as error:
        raise ValueError(f"of the peer, which the student teaches: {error}") from error


def peer_of(
    config: TrainConfig,
    world: World,
    student: tuple[Parts, MLLM],
    peer: Parts,
    say: Say,
    *,
    shares_tower: bool,
) -> Peer:
    """The peer behind the door, placed as a student is. `student`: as it was loaded, and as it is placed.

    To be called before an engine shards the student. ValueError for a peer of another vocabulary.
    """
    its = mirrored(config)
    adapt_student(
        peer,
        its.student,
        compute_dtype=compute_dtype(its),
        seed=its.seed,
        say=lambda line: say(f"peer: {line}"),
    )
    mllm, kernel = placed_student(its, world, peer, whose="peer")
    tap_both(config, student[1], its, mllm)
    terms = peer_terms(its, peer, student[0])
    say("the tower runs once for both students" if shares_tower else "each student runs its own tower")
    say(f"attention of the peer: {kernel}")
    return Peer(mllm, terms, shares_tower=shares_tower)
