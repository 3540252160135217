"""A change of the pictures, as the settings ask for it, around a teacher that is live.

Shape legend: I images, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from llava_kd.assembly.parts.data import source_in
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import HardConfig, TrainConfig
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.teaching.door import Teaching
from llava_kd.distill.teaching.from_teacher import FromTeacher
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.pictures.change import ChangedPictures, PictureChange
from llava_kd.distill.teaching.pictures.compared import Compared
from llava_kd.distill.teaching.pictures.hard import Hard, Pace, Room
from llava_kd.distill.teaching.pictures.mixup import Mixup
from llava_kd.distill.teaching.pictures.warps import Pixels, Warps
from llava_kd.distill.terms.kl import KL
from llava_kd.durable import make_folder, replacing
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.mllm import MLLM
from llava_kd.models.vocabulary import num_common_columns
from llava_kd.parallel.world import World

SHOWN = "pictures"  # of a run: what a change made of some pictures, the originals above
_MOST_SHOWN = 8


def with_changed_pictures(
    config: TrainConfig,
    world: World,
    models: tuple[tuple[Parts, MLLM], Parts],
    teaching: Teaching,
    source: Source | None,
    say: Callable[[str], None],
) -> Teaching:
    """The teaching behind a change of its pictures. `models`: the student, as loaded and placed, the teacher.

    `source` is the records, where they are read already.
    """
    assert isinstance(teaching, FromTeacher)
    assert config.pictures is not None
    (parts, mllm), teacher = models
    if config.pictures.mixup is not None:
        mixup = config.pictures.mixup
        name = "mixup"
        change: PictureChange = Mixup(share=mixup.share, alpha=mixup.alpha, seed=config.seed)
    else:
        assert config.pictures.hard is not None
        name, hard = "hard", config.pictures.hard
        frozen = teaching.predict
        assert isinstance(frozen, Teacher)
        kept = kept_records(hard, source or source_in(config))
        say(f"pictures.hard leaves the pictures of {len(kept)} records as they are")
        pixels = tuple(pixels_of(config, side) for side in (parts, teacher))
        room = Room(
            pixels=(pixels[0], pixels[1]),
            kept=kept,
            total=world.sum,
            show=Shown(Path(config.output_dir) / SHOWN, pixels[0], say) if world.is_main else None,
            show_every=hard.show_every,
        )
        change = _hard(config, hard, (mllm, frozen), _compared(config, parts, teacher), room)
    change = change.to(world.device)
    return ChangedPictures(name, change, teaching.predict, teaching.switch, head_loss=teaching.head_loss)


def _hard(
    config: TrainConfig, hard: HardConfig, models: tuple[MLLM, Teacher], compared: Compared, room: Room
) -> Hard:
    ranges = ("translate", "scale", "rotate", "crop", "colour", "blur")
    return Hard(
        models,
        Warps(**{name: getattr(hard, name) for name in ranges}),
        compared,
        room,
        pace=Pace(
            student=hard.student_weight, teacher=hard.teacher_weight, lower=hard.lower, upper=hard.upper
        ),
        lr=hard.lr,
        seed=config.seed,
    )


def _compared(config: TrainConfig, student: Parts, teacher: Parts) -> Compared:
    """As objective.response_kl compares."""
    term = terms_of(config.objective)["response_kl"]
    assert isinstance(term, KL)
    request = term.head_request()
    assert request.divergence is not None
    num_common = num_common_columns(
        student.processor.tokenizer,
        teacher.processor.tokenizer,
        student_rows=student.stock.lm_head.weight.shape[0],
        teacher_rows=teacher.stock.lm_head.weight.shape[0],
    )
    return Compared(temperature=request.temperature, divergence=request.divergence, num_common=num_common)


def pixels_of(config: TrainConfig, parts: Parts) -> Pixels:
    transform = ImageTransform.from_processor(parts.processor.image_processor, config.data.image_aspect)
    return Pixels(mean=transform.mean, std=transform.std)


def kept_records(hard: HardConfig, source: Source) -> frozenset[str]:
    """Ids of records whose pictures stay: one of whose questions matches, or whose type is named."""
    pattern = None if hard.keep_prompts is None else re.compile(hard.keep_prompts)
    if pattern is None and not hard.keep_types:
        return frozenset()
    types, kept = set(hard.keep_types), set()
    for i in range(len(source)):
        record = source.record(i)
        questions = (turn.text for turn in record.turns if turn.role == "user")
        if record.extra.get("type") in types or (pattern and any(map(pattern.search, questions))):
            kept.add(record.id)
    return frozenset(kept)


class Shown:
    """Writes PNG grids: pictures as they are in the upper row, what became of them in the lower.

    One that cannot be written is said, and stops nothing.
    """

    def __init__(self, folder: Path, pixels: Pixels, say: Callable[[str], None]) -> None:
        self._folder, self._pixels, self._say = folder, pixels, say

    def __call__(self, step: int, before_ICHW: Tensor, after_ICHW: Tensor) -> None:
        rows = [self._row(side_ICHW[:_MOST_SHOWN]) for side_ICHW in (before_ICHW, after_ICHW)]
        path = self._folder / f"step-{step:08d}.png"
        try:
            make_folder(self._folder)
            with replacing(path) as scratch:
                Image.fromarray(torch.cat(rows).numpy()).save(scratch, format="PNG")
        except OSError as error:
            self._say(f"{path} could not be written ({error}); the run continues without it")

    def _row(self, side_ICHW: Tensor) -> Tensor:
        """uint8 [H, I W, C], with a light gap after each picture."""
        mean_C11, std_C11 = (
            side_ICHW.new_tensor(v).view(-1, 1, 1) for v in (self._pixels.mean, self._pixels.std)
        )
        shown_ICHW = (side_ICHW * std_C11 + mean_C11).float().clamp(0, 1)
        shown_ICHW = torch.nn.functional.pad(shown_ICHW, (0, 2, 0, 2), value=1.0)
        return (255 * torch.cat(list(shown_ICHW), 2)).round().byte().permute(1, 2, 0).cpu()
