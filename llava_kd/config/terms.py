"""The settings of terms from other methods than LLaVA-KD's; one that is absent is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from annotated_types import Ge
from typing_extensions import Doc

from llava_kd.config.ranges import NotNegativeFloat, PositiveFloat, Share, require

_Weight = Annotated[NotNegativeFloat, Doc("What the term is multiplied by.")]


@dataclass(frozen=True, kw_only=True)
class DBiLDConfig:
    weight: _Weight = 1.0
    temperature: Annotated[PositiveFloat, Doc("What differences of logits are divided by.")] = 3.0
    candidates: Annotated[int, Ge(4), Doc("Largest logits among which the knee is looked for.")] = 64


@dataclass(frozen=True, kw_only=True)
class VisualSwitchConfig(DBiLDConfig):
    source: Annotated[
        Literal["tower", "projector"],
        Doc("Into the teacher: the `tower`'s features, or the `projector`'s through a fixed map."),
    ] = "tower"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    weight: _Weight = 1.0
    first: Annotated[Share, Doc("Share of the decoder's depth where its layers begin.")] = 0.3
    last: Annotated[Share, Doc("Share of the decoder's depth below which they end.")] = 0.7
    drop_sinks: Annotated[bool, Doc("Leave out entries above mean + standard deviation of either side.")] = (
        True
    )

    def __post_init__(self) -> None:
        require(
            self.first < self.last,
            f"`objective.attention.first` ({self.first:g}) must be less than `last` ({self.last:g})",
        )


class Weighted(Protocol):
    """A term of the objective."""

    @property
    def weight(self) -> float: ...


def check_moves(terms: Mapping[str, Weighted], trainable: Sequence[str]) -> None:
    """ValueError where nothing that is trained has a part in any term that counts."""
    counting = {name: term for name, term in terms.items() if term.weight > 0}
    before_the_decoder = {"visual_switch"} | {
        name for name, term in counting.items() if getattr(term, "tap", None) == "projector"
    }
    if set(trainable) == {"language_model"} and counting.keys() <= before_the_decoder:
        raise ValueError(
            f"`trainable` names the language model alone, and no term of `objective` reads it "
            f"({', '.join(counting)}): nothing would be learned; add multi_modal_projector, or another term"
        )


def check_switch(switch: VisualSwitchConfig, trainable: list[str], placement: str) -> None:
    """ValueError for a switch that could move nothing, or whose teacher cannot be run backwards."""
    if switch.source == "tower":
        require(
            "vision_tower" in trainable,
            "`objective.visual_switch.source` is tower, but the tower is frozen and the term constant; add "
            "vision_tower to `trainable`, or set source to projector",
        )
    else:
        require(
            bool({"vision_tower", "multi_modal_projector"} & set(trainable)),
            "`objective.visual_switch.source` is projector, but neither projector nor tower is trained and "
            "the term constant; add multi_modal_projector to `trainable`, or remove the term",
        )
    require(
        placement == "replicated",
        "`objective.visual_switch` runs backwards through the teacher, which must be whole on every rank; "
        "set teacher.placement to replicated",
    )


def check_needs_the_model(settings: dict[str, object], cache: str | None) -> None:
    """ValueError for settings that need the teacher itself where a cache stands in for it."""
    named = " and ".join(f"`{name}`" for name, value in settings.items() if value)
    require(
        not named or cache is None,
        f"{named} need the teacher itself, but teacher.cache is {cache}; set it to null, or leave them out",
    )
