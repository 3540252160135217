"""The settings of the objective: a section that is made from the table of terms that is handed in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, Self, get_args, get_type_hints

from annotated_types import Gt
from typing_extensions import Doc

from llava_kd.config.ranges import PositiveFloat, require

if TYPE_CHECKING:
    from llava_kd.config.sections import TrainConfig


class Reads(Protocol):
    """Of what a term says that it reads, what other settings must fit."""

    @property
    def teacher(self) -> str: ...
    @property
    def before_decoder(self) -> bool: ...
    @property
    def attention(self) -> object: ...
    @property
    def attended(self) -> object: ...
    @property
    def switched(self) -> object: ...
    @property
    def centroids(self) -> bool: ...
    @property
    def stretches(self) -> bool: ...
    @property
    def places(self) -> Sequence[str]: ...
    @property
    def labels(self) -> bool: ...


class TermSettings(Protocol):
    """A term of the objective: a dataclass of its settings. `label` says in a line what is compared."""

    label: ClassVar[str]

    @property
    def weight(self) -> float: ...
    @property
    def reads(self) -> Reads: ...
    def mirrored(self) -> Self: ...
    def fits(self, trainable: Sequence[str], placement: str) -> None: ...


Table = Mapping[str, type[TermSettings]]


@dataclass(frozen=True, kw_only=True)
class LearnedWeightsConfig:
    """Weights of the terms that read the teacher, learned as log-variances; they begin at `weight`."""

    lr: Annotated[
        PositiveFloat, Doc("Learning rate of the weights; it follows the schedule of `optim.lr`.")
    ] = 1e-2
    strength: Annotated[
        PositiveFloat, Doc("Value that each of these terms, times its weight, approaches in the loss.")
    ] = 1.0
    most: Annotated[float, Gt(1), Doc("Each weight stays within this factor of its setting.")] = 100.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A term that is absent is off. `objective_type` adds a setting for each term of a table."""

    losses: Annotated[
        Literal["fast", "reference"],
        Doc("`fast` kernels, or the plain `reference` formulas that the kernels are tested against."),
    ] = "fast"
    learned_weights: Annotated[
        LearnedWeightsConfig | None, Doc("Learn the weights of terms; null: keep them as set.")
    ] = None

    def __post_init__(self) -> None:
        require(bool(self.terms), "`objective` has no term; give it at least one")
        require(
            any(term.weight > 0 for term in self.terms.values()),
            f"the weights of `objective` are all 0 ({', '.join(self.terms)}): nothing would be learned; set "
            "one of them to more",
        )
        require(
            self.learned_weights is None
            or any(t.weight > 0 and t.reads.teacher != "nothing" for t in self.terms.values()),
            f"`objective.learned_weights` has no weight to learn: none of {', '.join(self.terms)} reads "
            "the teacher with a weight above 0; add a term such as response_kl, or set learned_weights to "
            "null",
        )

    @property
    def terms(self) -> dict[str, TermSettings]:
        """Those that are on, by name, in the order of the table."""
        own = {f.name for f in fields(ObjectiveConfig)}
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def needs_teacher(self) -> bool:
        return any(term.reads.teacher != "nothing" for term in self.terms.values())

    def mirrored(self) -> Self:
        """The same terms where student and teacher change places."""
        return replace(self, **{name: term.mirrored() for name, term in self.terms.items()})

    def check_stage(
        self,
        trainable: Sequence[str],
        *,
        placement: str | None,
        cache: str | None,
        others: Mapping[str, bool],
    ) -> None:
        """ValueError where the terms do not fit what is trained, or the teacher as it is placed or cached.

        `placement` is None where there is no teacher. `others` need the teacher itself as some terms do.
        """
        if placement is not None:
            needs = {f"objective.{n}": t.reads.teacher == "model" for n, t in self.terms.items()}
            named = " and ".join(f"`{name}`" for name, value in {**needs, **others}.items() if value)
            require(
                not named or cache is None,
                f"{named} need the teacher model itself, but teacher.cache is {cache}; set it to null, or "
                "leave them out",
            )
            for term in self.terms.values():
                term.fits(trainable, placement)
        self._check_moves(trainable)

    def check_teacher(self, *, has_teacher: bool, is_used: bool) -> None:
        """ValueError for terms without their teacher; for a teacher without terms, unless it `is_used`."""
        reading = [name for name, term in self.terms.items() if term.reads.teacher != "nothing"]
        require(
            has_teacher or not reading,
            "`objective` has distillation terms but `teacher` is null; set teacher.checkpoint, or remove "
            f"{' and '.join(reading)}",
        )
        require(
            not has_teacher or bool(reading) or is_used,
            "`teacher` is set but no term of `objective` uses it; add a term that reads it, such as "
            "response_kl, or set teacher to null",
        )

    def _check_moves(self, trainable: Sequence[str]) -> None:
        """ValueError where nothing that is trained has a part in any term that counts."""
        counting = {name: term for name, term in self.terms.items() if term.weight > 0}
        if set(trainable) == {"language_model"} and all(t.reads.before_decoder for t in counting.values()):
            raise ValueError(
                f"`trainable` names the language model alone, and no term of `objective` reads it "
                f"({', '.join(counting)}): nothing would be learned; add multi_modal_projector, or another "
                "term"
            )


def objective_type(terms: Table) -> type[ObjectiveConfig]:
    """The section with a setting for each term; the same type for the same table."""
    return _objective_type(tuple(terms.items()))


def stage_type(stage: type[TrainConfig], terms: Table) -> type[TrainConfig]:
    """The settings `stage` with those of the terms."""
    return _stage_type(stage, objective_type(terms))


@functools.cache
def _objective_type(terms: tuple[tuple[str, type[TermSettings]], ...]) -> type[ObjectiveConfig]:
    taken = {f.name for f in fields(ObjectiveConfig)}
    require(not taken & {name for name, _ in terms}, f"a term may not be named {sorted(taken)}")
    made = make_dataclass(
        ObjectiveConfig.__name__,
        [(name, Annotated[kind | None, Doc(_sentence(kind.label))], None) for name, kind in terms],
        bases=(ObjectiveConfig,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = ObjectiveConfig.__doc__
    return made


def _sentence(label: str) -> str:
    return f"{label[:1].upper()}{label[1:]}."


@functools.cache
def _stage_type(stage: type[TrainConfig], objective: type[ObjectiveConfig]) -> type[TrainConfig]:
    _, *annotations = get_args(get_type_hints(stage, include_extras=True)["objective"])
    field = ("objective", Annotated[objective, *annotations])
    made = make_dataclass(stage.__name__, [field], bases=(stage,), frozen=True, kw_only=True)
    made.__doc__ = stage.__doc__
    return made
