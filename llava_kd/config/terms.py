"""The settings of terms from other methods than LLaVA-KD's; one that is absent is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llava_kd.config.checks import require


@dataclass(frozen=True, kw_only=True)
class DBiLDConfig:
    """Differences of logits among each side's own largest, up to the knee of the `candidates` largest."""

    weight: float = 1.0
    temperature: float = 3.0
    candidates: int = 64

    def __post_init__(self) -> None:
        require(
            self.candidates >= 4, f"`candidates` of a DBiLD term must be at least 4; got {self.candidates}"
        )


@dataclass(frozen=True, kw_only=True)
class VisualSwitchConfig(DBiLDConfig):
    """The same between the teacher and its own language path over the student's visual output.

    `source`: `tower`, through the teacher's projector, as in Switch-KD; or `projector`, through a fixed map
    between the text embeddings of both models, for students whose tower is frozen.
    """

    source: Literal["tower", "projector"] = "tower"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Visual attention in decoder layers, from the share `first` of the depth to below the share `last`.

    `drop_sinks` leaves out entries above mean + standard deviation of either side.
    """

    weight: float = 1.0
    first: float = 0.3
    last: float = 0.7
    drop_sinks: bool = True

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
