"""What a stage would do: `--dry_run`. Models are read on the CPU, or only their shapes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_kd.assembly.parts.data import side_of, source_in, tagger_in
from llava_kd.assembly.parts.held_out import read_held_out
from llava_kd.assembly.parts.models import student_in
from llava_kd.assembly.parts.objective import policy_lines
from llava_kd.assembly.parts.on_policy.assembling import on_policy_lines
from llava_kd.assembly.parts.several.teachers import check_several
from llava_kd.assembly.parts.slices import read_slices
from llava_kd.assembly.parts.teacher import check_foreign
from llava_kd.assembly.parts.teaching.peer import check_peer_parent, mirrored
from llava_kd.assembly.parts.teaching.visual_dependency import check_visual_dependency
from llava_kd.assembly.planning.estimate import (
    GB,
    ModelSizes,
    accumulation,
    engine_kind,
    memory,
    refuse_too_large,
    together,
    traffic,
    without_weights,
)
from llava_kd.assembly.planning.formula import loss_formula
from llava_kd.assembly.planning.throughput import Network, Rate, throughput
from llava_kd.assembly.runs.provenance import checked_parent
from llava_kd.assembly.runs.run_dir import check_world, refuse_other_run
from llava_kd.assembly.runs.written_by import checked_writers
from llava_kd.assembly.settings import tables_of
from llava_kd.assembly.stage import few_steps, num_steps
from llava_kd.config import TrainConfig
from llava_kd.data.foreign.talks import Talks
from llava_kd.models.files.checkpoint import load_config, load_processor
from llava_kd.models.foreign.loading import foreign_without_weights, is_foreign, load_foreign_processor
from llava_kd.parallel.world import World


def plan(config: TrainConfig, ranks: int, measured: str | None = None, network: Network | None = None) -> str:
    """Lines that say what `train` would do on so many ranks.

    `measured` is the directory of a run on one machine, to foretell samples per second from.
    Raises ValueError for what it would refuse: the ranks, the models, the data, or too small a device.
    """
    _check(config, ranks)
    rate = None if measured is None else Rate.of(measured)
    student_stock, teacher_stock = _stocks(config)
    student = ModelSizes.of(student_stock, config)
    teacher = None if teacher_stock is None else ModelSizes.of(teacher_stock)
    records = len(source_in(config))
    per_epoch = -(-records // config.global_batch_size)
    steps = num_steps(config, per_epoch)
    names = [] if config.teacher is None else config.teacher.others
    others = [ModelSizes.of_directory(name) for name in names]
    peer_stock, peer = _peer(config)
    found, sent = memory(config, ranks, student, teacher, others), traffic(config, ranks, student, teacher)
    trained = student.trained
    if peer is not None:
        its = mirrored(config)
        found = together(found, memory(its, ranks, peer, None))
        sent, trained = sent + traffic(its, ranks, peer), trained + peer.trained
    output = Path(config.output_dir)
    lines = [
        f"ranks            {ranks}, engine {engine_kind(config, ranks)}, {config.engine.precision}",
        f"global batch     {config.global_batch_size} = {ranks} ranks x {accumulation(config, ranks)} "
        f"micro-batches of up to {config.micro_batch_size}",
        f"steps            {steps} ({per_epoch} an epoch of {records} records)",
        *(f"  warning        {line}" for line in [few_steps(steps)] if line is not None),
        f"student          {_parts(student)}; trained: {', '.join(config.trainable)} "
        f"({student.trained / 1e6:.2f} M)",
        f"teacher          {'none' if teacher is None else _parts(teacher)}",
        *(f"  also           {_parts(one)}, {name}" for name, one in zip(names, others, strict=True)),
        *(
            []
            if peer is None
            else [f"peer             {_parts(peer)}; the same parts are trained ({peer.trained / 1e6:.2f} M)"]
        ),
        *loss_formula(config.objective, student_stock, teacher_stock or peer_stock),
        *policy_lines(config),
        *on_policy_lines(config),
        f"memory of a rank {sum(found.values()) / GB:.2f} GB estimated",
        *(f"  {what:<14} {size / GB:8.2f} GB" for what, size in found.items() if size),
        f"sent by a rank   {sent / GB:.2f} GB per step",
        f"output           {output}: {_state(output)}",
        f"checkpoints      every {config.checkpoint.every} steps, {config.checkpoint.keep} kept, "
        f"{12 * trained / GB:.2f} GB each; {_free(output) / GB:.0f} GB free there",
    ]
    if torch.cuda.is_available() and config.engine.device != "cpu":
        available = torch.cuda.get_device_properties(0).total_memory
        lines.append(f"device           {available / GB:.1f} GB")
        refuse_too_large(found, available)
    if rate is not None:
        lines += throughput(config, ranks, rate, network or Network(), student, teacher)
    return "\n".join(lines)


def _check(config: TrainConfig, ranks: int) -> None:
    """ValueError for what is known to be wrong before a model is read."""
    check_world(config, World(rank=0, size=ranks, device=torch.device("cpu")))
    _check_output(Path(config.output_dir))
    refuse_other_run(config)
    checked_writers(config, checked_parent(config.student.checkpoint))
    check_peer_parent(config)
    read_slices(config)
    read_held_out(config)
    check_several(config)
    check_visual_dependency(config)
    tagger_in(config)
    _check_sides(config)


def _stocks(
    config: TrainConfig,
) -> tuple[LlavaForConditionalGeneration, PreTrainedModel | None]:
    """Student and teacher without their weights; a student to be composed is composed on the CPU."""
    checkpoint = config.student.checkpoint
    student = student_in(config).stock if checkpoint is None else without_weights(checkpoint)
    if config.teacher is None:
        return student, None
    name = config.teacher.checkpoint
    return student, foreign_without_weights(name) if is_foreign(name) else without_weights(name)


def _peer(config: TrainConfig) -> tuple[LlavaForConditionalGeneration | None, ModelSizes | None]:
    """A second student, as `_stocks` reads the first."""
    if config.peer is None:
        return None, None
    its = mirrored(config)
    checkpoint = its.student.checkpoint
    stock = student_in(its).stock if checkpoint is None else without_weights(checkpoint)
    return stock, ModelSizes.of(stock, its)


def _check_sides(config: TrainConfig) -> None:
    """Raises ValueError for a processor or template with which no record can be read."""
    sides = [(config.student.checkpoint, config.student.template)]
    check_foreign(config)
    if config.peer is not None:
        sides.append((config.peer.checkpoint, config.peer.template))
    if config.teacher is not None and is_foreign(name := config.teacher.checkpoint):
        Talks(load_foreign_processor(name))
    elif config.teacher is not None:
        names = [config.teacher.checkpoint, *config.teacher.others]
        sides += [(name, config.teacher.template) for name in names]
    for checkpoint, template in sides:
        if checkpoint is not None:
            model = load_config(checkpoint)
            templates = tables_of(config).templates
            side_of(load_processor(checkpoint), model, config.data, template, templates=templates).encoder()


def ranks_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _parts(found: ModelSizes) -> str:
    listed = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in found.parameters.items())
    return f"{sum(found.parameters.values()) / 1e6:.2f} M parameters ({listed})"


def _state(output: Path) -> str:
    if (output / "run.json").is_file():
        return "complete, nothing to do"
    return "resumes from the last checkpoint" if (output / "checkpoints").is_dir() else "new"


def _check_output(output: Path) -> None:
    there = _existing(output)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is not writable" if there.is_dir() else "is a file"
        raise ValueError(
            f"output_dir {output} cannot be created: {there} {reason}; name a directory that you can write to"
        )


def _existing(output: Path) -> Path:
    """The directory itself, or the nearest above it that is there."""
    return next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())


def _free(output: Path) -> int:
    return shutil.disk_usage(_existing(output)).free
