"""The teachers beside the first: loaded, checked against it, and placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llava_kd.assembly.parts.data import same_tower, side_in
from llava_kd.assembly.parts.models import DTYPES
from llava_kd.assembly.parts.objective import terms_of
from llava_kd.assembly.parts.several.weights import log_weights
from llava_kd.config import TeacherConfig, TrainConfig
from llava_kd.data.sources.conversation import Source
from llava_kd.distill.objective import NO_MIXTURE, beyond_mixture
from llava_kd.distill.teaching.live import Teacher
from llava_kd.distill.teaching.several import SeveralTeachers
from llava_kd.models.files.checkpoint import Parts, load_stock
from llava_kd.models.fingerprint import weights_fingerprint
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.reading import existing
from llava_kd.models.vocabulary import left_out

Place = Callable[..., Teacher]


@dataclass(frozen=True, kw_only=True)
class Others:
    """Teachers after the first as they were loaded, and the log weights of all; None: of each record."""

    settings: tuple[TeacherConfig, ...]
    parts: tuple[Parts, ...]
    shares_tower: tuple[bool, ...]
    log_weights_M: Tensor | None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what a run with them relies on and does not save."""
        found = {
            f"teacher {number}": weights_fingerprint(one.stock.state_dict())
            for number, one in enumerate(self.parts, 2)
        }
        if self.log_weights_M is not None:
            found["weights of the teachers"] = weights_fingerprint({"weights": self.log_weights_M})
        return found

    def join(self, first: Teacher, placed: Place, *, beta: float) -> SeveralTeachers:
        """All of them where their settings want them; `placed` places one."""
        rest = [
            placed(settings, parts, shares_tower=shares)
            for settings, parts, shares in zip(self.settings, self.parts, self.shares_tower, strict=True)
        ]
        return SeveralTeachers([first, *rest], self.log_weights_M, beta=beta)


def check_several(config: TrainConfig) -> None:
    """ValueError where the terms need one teacher, or a directory is not there: before a model is read."""
    if config.teacher is None or config.teacher.several is None:
        return
    if beyond := beyond_mixture(terms_of(config.objective)):
        raise ValueError(f"`teacher.several` cannot serve {' and '.join(beyond)}; {NO_MIXTURE}")
    if "response_kl" not in terms_of(config.objective):
        raise ValueError(
            "`teacher.several` works only with response_kl, which `objective` does not have; add it"
        )
    for name in config.teacher.several.checkpoints:
        existing(name, "the LLaVA checkpoint")


def other_teachers(
    config: TrainConfig, student: Parts, first: AnyParts | None, source: Source, say: Callable[[str], None]
) -> Others | None:
    """Those that `teacher.several` names, None without it. ValueError for one that reads otherwise."""
    if first is None or config.teacher is None or config.teacher.several is None:
        return None
    names = config.teacher.several.checkpoints
    whole = as_llava(first, "`teacher.several`")
    settings = tuple(replace(config.teacher, checkpoint=name, several=None) for name in names)
    parts = tuple(load_stock(name, dtype=DTYPES[config.teacher.dtype]) for name in names)
    for one, its in zip(parts, settings, strict=True):
        _refuse_other_reader(config, whole, one, its)
    found = log_weights(config, source, whole.tokenizer)
    _say_weights([config.teacher.checkpoint, *names], found, say)
    return Others(
        settings=settings,
        parts=parts,
        shares_tower=tuple(same_tower(config, student, one) for one in parts),
        log_weights_M=found,
    )


def _say_weights(names: Sequence[str], found: Tensor | None, say: Callable[[str], None]) -> None:
    if found is None:
        say(f"{len(names)} teachers, weighted per record by the likelihood of its labels")
        return
    weighed = (f"{name} {weight:.3f}" for name, weight in zip(names, found.exp().tolist(), strict=True))
    say(f"weights of the teachers: {', '.join(weighed)}")


def _refuse_other_reader(config: TrainConfig, first: Parts, other: Parts, its: TeacherConfig) -> None:
    """All teachers answer to the same tokens and pixels."""
    assert config.teacher is not None
    tokenizers = first.processor.tokenizer, other.processor.tokenizer
    if (differing := left_out(*tokenizers)) is not None:
        raise ValueError(
            f"all teachers must have the same vocabulary; {its.checkpoint} differs from "
            f"{config.teacher.checkpoint} in {differing}: remove it from teacher.several.checkpoints"
        )
    ours, theirs = side_in(config, first, config.teacher), side_in(config, other, its)
    if ours.transform != theirs.transform or not theirs.reads_as(ours):
        raise ValueError(
            f"all teachers must read the same tokens and pixels; {its.checkpoint} and "
            f"{config.teacher.checkpoint} differ in template, visual tokens or image preprocessing. Set "
            "teacher.template, or remove it from teacher.several.checkpoints"
        )
