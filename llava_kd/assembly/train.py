"""A stage from its settings to its end: the composition root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from llava_kd.assembly.parts.adapters import check_bits, write_student
from llava_kd.assembly.parts.data import BAD_RECORDS, bad_records, served, source_in, tagger_in
from llava_kd.assembly.parts.first_projector import begin_projector
from llava_kd.assembly.parts.held_out import read_held_out
from llava_kd.assembly.parts.identity import frozen_fingerprints
from llava_kd.assembly.parts.lending import with_projector
from llava_kd.assembly.parts.models import student_in
from llava_kd.assembly.parts.objective import token_policy
from llava_kd.assembly.parts.several.teachers import check_several, other_teachers
from llava_kd.assembly.parts.slices import read_slices
from llava_kd.assembly.parts.teacher import (
    check_foreign,
    teacher_parts,
    teacher_template,
)
from llava_kd.assembly.parts.teaching.peer import (
    check_peer_parent,
    mirrored,
    peer_fingerprints,
    peer_parts,
)
from llava_kd.assembly.parts.teaching.visual_dependency import check_visual_dependency
from llava_kd.assembly.planning.estimate import ModelSizes, memory, refuse_too_large, together
from llava_kd.assembly.runs.logs import logged, speaker
from llava_kd.assembly.runs.provenance import checked_parent, finish
from llava_kd.assembly.runs.run_dir import check_world, claim
from llava_kd.assembly.runs.written_by import checked_writers
from llava_kd.assembly.stage import assemble
from llava_kd.config import TrainConfig
from llava_kd.data.sources.conversation import Source
from llava_kd.models.files.card import reading_notes
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.files.other_tools import unopened
from llava_kd.models.foreign.loading import AnyParts
from llava_kd.parallel.world import World, join, peers


def train(config: TrainConfig) -> str | None:
    """Run one stage to its end, or go on with it. The name of the signal, if one stopped it.

    Writes `metrics.jsonl`, `checkpoints/` and, at the end, the student as a stock LLaVA directory `model/`,
    and a peer as `peer/`, into `config.output_dir`. Raises ValueError for settings that do not fit the
    models, data or machine.
    """
    with peers():
        world = join(config.engine.device, timeout_minutes=config.engine.timeout_minutes)
        check_world(config, world)
        with claim(config, world) as is_complete:
            if not is_complete:
                with logged(Path(config.output_dir), world):
                    return _train(config, world)
            output = Path(config.output_dir)
            speaker(world)(f"{output} is complete: nothing to do; the student is {output / 'model'}")
            return None


def _train(config: TrainConfig, world: World) -> str | None:
    output = Path(config.output_dir)
    say = speaker(world)
    with world.together():
        parent = _parent(config) if world.is_main else None
        source = _checked_source(config, world)
        written_by = checked_writers(config, parent)
    torch.manual_seed(config.seed)
    transformers.logging.disable_progress_bar()
    student = student_in(config, lambda line: say(f"template of the student: {line}"))
    teacher, peer = teacher_parts(config), peer_parts(config, source, world, say)
    if teacher is not None:
        say(f"template of the teacher: {teacher_template(config, teacher)}")
    student = with_projector(config, student, teacher)
    for one, name in ((student, "student"), (peer, "peer")):
        for line in [] if one is None else unopened(served(one, config.data)):
            say(f"some tools cannot open the finished {name}: {line}")
    begin_projector(config, student, source, world, say)
    others = other_teachers(config, student, teacher, source, say)
    identity = frozen_fingerprints(config, student, teacher) | (others.fingerprints if others else {})
    identity |= peer_fingerprints(config, peer)
    teachers = [one for one in (teacher, *(others.parts if others else ())) if one is not None]
    _refuse_too_large(config, world, student, teachers, peer)
    trainer, engine = assemble(
        config, world, student, teacher or peer, say, identity=identity, source=source, others=others
    )
    if (stopped := trainer.fit()) is not None:
        return stopped
    weights = engine.parameters()
    with world.together():
        if world.is_main:
            best = None
            if config.checkpoint.export == "best":
                best, moved = trainer.best_weights()
                weights |= moved
            readings = {"model": _export(config, student, weights, "mllm.", output / "model")}
            if peer is not None:
                its = mirrored(config)
                readings["peer"] = _export(its, peer, weights, "teaching.mllm.", output / "peer")
            finish(
                config,
                num_steps=trainer.num_steps,
                identity=trainer.identity,
                parent=parent,
                written_by=written_by,
                exported=best,
                readings=readings,
            )
    if world.is_main and (bad := bad_records(output)):
        say(f"{bad} bad records were skipped; they are listed in {output / BAD_RECORDS}")
    also = "" if peer is None else f", its peer {output / 'peer'}"
    say(f"done: the student is {output / 'model'}{also}")
    return None


def _parent(config: TrainConfig) -> dict[str, object] | None:
    """The run that the student comes from. ValueError where it, or a peer's, is not whole."""
    check_peer_parent(config)
    return checked_parent(config.student.checkpoint)


def _checked_source(config: TrainConfig, world: World) -> Source:
    """The records. What is wrong with settings and data is said here, before a model is read."""
    check_bits(config, world.device)
    read_slices(config)
    read_held_out(config)
    token_policy(config)
    check_several(config)
    check_visual_dependency(config)
    tagger_in(config)
    source = source_in(config)
    check_foreign(config)
    return source


def _export(
    config: TrainConfig, student: Parts, weights: Mapping[str, Tensor], prefix: str, out: Path
) -> Sequence[str]:
    """Write a finished student, whose weights have this prefix; what its card says of its processor.

    What terms bring stays behind.
    """
    return reading_notes(write_student(config, student, weights, prefix, out).processor)


def _refuse_too_large(
    config: TrainConfig, world: World, student: Parts, teachers: Sequence[AnyParts], peer: Parts | None
) -> None:
    """ValueError where a GPU is too small for the models as they are loaded."""
    if world.device.type != "cuda":
        return
    sizes = [ModelSizes.of(one.stock) for one in teachers]
    first = sizes[0] if sizes else None
    own = ModelSizes.of(student.stock, config)
    needs = memory(config, world.size, own, first, sizes[1:])
    if peer is not None:
        its = mirrored(config)
        needs = together(needs, memory(its, world.size, ModelSizes.of(peer.stock, its), None))
    refuse_too_large(needs, torch.cuda.get_device_properties(world.device).total_memory)
