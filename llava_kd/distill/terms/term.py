"""What a loss term is: a frozen dataclass whose fields are its settings, and what it says of itself.

A new term is a file like those beside this one and a line in the table `TERMS`. The settings, the objective,
a cache of the teacher, the checks before a run and the report read what they need here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from annotated_types import Ge
from torch import Tensor, nn
from typing_extensions import Doc

from llava_kd.batch import Batch
from llava_kd.distill.rows import Place
from llava_kd.losses.divergence import Divergence, Temperature
from llava_kd.models.attention.answers import LookedAtBy
from llava_kd.models.towers.stages import STAGE

if TYPE_CHECKING:
    from llava_kd.distill.terms.seen import Seen

Need = Literal["nothing", "logits", "states", "model"]
Trust = Literal["all", "first", "probability", "better", "worse", "label_listed", "choice_listed"]

LISTED: tuple[Trust, ...] = ("label_listed", "choice_listed")


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What must be there for a term. What is not named here, a term is not shown.

    `teacher`: `nothing` of it; its `logits`, for which a cache of the largest ones serves; its `states`,
    hidden or projected, which a cache of hidden states holds; or the `model` itself. `places`: whose rows, of
    student and teacher. `projector`: its output. `vocabulary`: tokens are compared by their number in it.
    `grids`: visual tokens are compared one by one. `head_gram`: the Gram matrix of a head, computed once for
    a frozen one. `attention`: in layers from one share of the depth to another. `attended`: how much the
    teacher's answers, or its questions, attend to each visual token, in such layers. `switched`: the teacher
    over the student's visual output, of its tower or projector. `student_taps` and `teacher_taps`: what goes
    through modules of a model, by their paths, as `models.taps` writes them; a teacher's need the `model`.
    `before_decoder`: no gradient of the term reaches the language model. `centroids`: what the student said
    before, a mean for each label. `labels`: the answers' tokens, as the truth that a student's own are not.
    `stretches`: answers as text, which two tokenizers may cut otherwise.
    """

    teacher: Need = "nothing"
    places: tuple[Place, ...] = ()
    projector: bool = False
    vocabulary: bool = False
    grids: bool = False
    head_gram: bool = False
    attention: tuple[float, float] | None = None
    attended: tuple[float, float, LookedAtBy] | None = None
    switched: Literal["tower", "projector"] | None = None
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    before_decoder: bool = False
    centroids: bool = False
    labels: bool = False
    stretches: bool = False

    def __post_init__(self) -> None:
        if self.teacher_taps and self.teacher != "model":
            raise ValueError(
                f"taps of the teacher ({', '.join(self.teacher_taps)}) need the model itself: declare "
                f"teacher='model' in `reads`, not {self.teacher!r}"
            )
        if stages := [tap for tap in self.teacher_taps if tap.startswith(STAGE)]:
            raise ValueError(
                f"stages can be read from the student's tower only, not {stages[0]!r} from the teacher's"
            )
        if self.attended is not None and self.teacher != "model":
            raise ValueError(
                "what the teacher attends to is not stored: declare teacher='model' in `reads`, not "
                f"{self.teacher!r}"
            )

    @property
    def at_final_states(self) -> bool:
        """Whether all that the term reads of the student are its final hidden states."""
        elsewhere = self.projector or self.before_decoder or self.attention or self.student_taps
        return bool(self.places) and not elsewhere


@dataclass(frozen=True, kw_only=True)
class Denominator:
    """What a sum is divided by, counted over all ranks and micro-batches of a step.

    `count`: of one micro-batch, where it is none of those that a batch counts itself. `by_share`: a sum is
    multiplied by one over the count, as rows of the head are, instead of divided: the two round differently.
    """

    name: str
    count: Callable[[Batch], Tensor] | None = None
    by_share: bool = False


RESPONSE_TOKENS = Denominator(name="response_tokens", by_share=True)
VISUAL_TOKENS = Denominator(name="visual_tokens", by_share=True)
IMAGES = Denominator(name="images")


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """Logits that a term needs: the cross-entropy of their targets, or T^2 times a divergence, row by row.

    Requests of equal temperature and divergence go through the head together. `share`: of the visual tokens
    of an image, those that the teacher's text attends to most, each counting as one over the share rows;
    where they are `weighed`, by how much it attends to each, to the same sum. `trust` in the teacher at a
    response token: full, full or none by whether its first choice is the label, its probability of the
    label, or full where its cross-entropy there is below the student's (`better`), or above it (`worse`), or
    where its `listed` largest logits hold the label or the student's first choice, and none elsewhere; a
    row's divergence is multiplied by it.
    """

    place: Place
    share: float = 1.0
    weighed: bool = False
    trust: Trust = "all"
    listed: int = 1
    temperature: Temperature = 1.0
    divergence: Divergence | None = None


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """A mean below `below` from the first steps on, which hardly moves, has little to tell; then `remedy`."""

    below: float
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Of the hidden states that a term with weights of its own may join.

    `student_taps` and `teacher_taps`: of what goes through the modules that it reads, by their paths.
    """

    student: int
    teacher: int | None
    student_taps: Mapping[str, int] = field(default_factory=dict)
    teacher_taps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A sum over rows of one micro-batch, times `weight`, divided by a count of the whole step.

    `label` is for a report, `paper` where it comes from. A term either asks the head for
    rows, or gives its `total`.
    """

    weight: Annotated[float, Ge(0), Doc("Factor of this term in the loss.")] = 1.0

    label: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    denominator: ClassVar[Denominator] = RESPONSE_TOKENS
    compares_rows: ClassVar[bool] = False
    """Whether rows of a micro-batch are compared with each other, so that its size changes the value."""
    goes_below_zero: ClassVar[bool] = False
    """Whether a row may be less than 0, as minus a bound is; its weight is then never learned."""

    @property
    def reads(self) -> Reads:
        return Reads()

    def head_request(self) -> HeadRequest | None:
        return None

    def total(self, seen: Seen) -> Tensor:
        """The differentiable sum over the rows of a micro-batch; none of them may be of an image that is
        a stand-in. A term with a module must call it for every batch, be it with no row.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a total nor a request to the head")

    def module(self, widths: Widths) -> nn.Module | None:
        """Weights of the term's own, made anew: the student's engine trains, shards and saves them."""
        del widths
        return None

    def saturation(self) -> Saturation | None:
        """Below what the term, so set, has nothing to teach from the start; None where that is not known."""
        return None

    def mirrored(self) -> Self:
        """The same where student and teacher change places, as a peer learns by it from the student."""
        return self

    def fits(self, trainable: Sequence[str], placement: str) -> None:
        """ValueError where the term could move nothing that is trained, or not run the teacher so placed."""
        stages = [tap for tap in self.reads.student_taps if tap.startswith(STAGE)]
        if stages and "vision_tower" not in trainable:
            raise ValueError(
                f"{stages[0]} belongs to a frozen tower, so the term would train nothing there; add "
                "vision_tower to `trainable`, or leave the stages out"
            )
