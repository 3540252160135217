"""What a loss term is: a frozen dataclass whose fields are its settings, with a description of its needs.

A new term is a file like those in this folder and a line in the table `TERMS`. The settings, the objective,
the teacher cache, the checks before a run and the report read what they need from this class.
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
    """What a term needs. It cannot access what is not named here.

    `teacher`: `nothing`; its `logits`, which a cache of the largest ones also provides; its `states`, hidden
    or projected, which a cache of hidden states also provides; or the `model` itself. `places`: which rows of
    student and teacher. `projector`: its output. `vocabulary`: tokens are compared by their ids. `grids`:
    visual tokens are compared one by one. `head_gram`: the Gram matrix of a head, computed once if the head
    is frozen. `attention`: attention maps of the layers from one share of the depth to another. `attended`:
    how much the teacher's answers, or its questions, attend to each visual token, in such layers. `switched`:
    the teacher's prediction from the student's visual output, of its tower or projector. `student_taps` and
    `teacher_taps`: inputs or outputs of modules, by paths as in `models.taps`; those of a teacher need the
    `model`. `before_decoder`: no gradient of the term reaches the language model. `centroids`: the student's
    earlier predictions, a mean for each label. `labels`: the answers' tokens as ground truth, so not answers
    that the student wrote. `stretches`: answers as text, which two tokenizers may cut differently.
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
        """Whether the term reads only the final hidden states of the student."""
        elsewhere = self.projector or self.before_decoder or self.attention or self.student_taps
        return bool(self.places) and not elsewhere


@dataclass(frozen=True, kw_only=True)
class Denominator:
    """What a sum is divided by, counted over all ranks and micro-batches of a step.

    `count`: the count of one micro-batch, needed if the batch does not count it itself. `by_share`: a sum is
    multiplied by one over the count, like rows of the head, instead of divided: the two round differently.
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

    Requests of equal temperature and divergence go through the head together. `share`: the share of an
    image's visual tokens that count, those that the teacher's text attends to most; each counts as one over
    the share rows. If `weighed`, each counts by how much the text attends to it, with the same sum. `trust`:
    a factor of the divergence at a response token. `all`: 1. `first`: 1 if the teacher's first choice is the
    label. `probability`: its probability of the label. `better`, `worse`: 1 if its cross-entropy is below,
    or above, the student's. `label_listed`, `choice_listed`: 1 if its `listed` largest logits hold the
    label, or the student's first choice. Otherwise 0.
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
    """A mean that stays below `below` from the first steps on has little to teach; `remedy` is the advice."""

    below: float
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of the hidden states that a term with its own weights may connect.

    `student_taps` and `teacher_taps`: widths at the modules that it reads, by their paths.
    """

    student: int
    teacher: int | None
    student_taps: Mapping[str, int] = field(default_factory=dict)
    teacher_taps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A sum over rows of one micro-batch, times `weight`, divided by a count of the whole step.

    `label` describes it in reports, `paper` names its source. A term either requests rows of the head, or
    returns its `total`.
    """

    weight: Annotated[float, Ge(0), Doc("Factor of this term in the loss.")] = 1.0

    label: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    denominator: ClassVar[Denominator] = RESPONSE_TOKENS
    compares_rows: ClassVar[bool] = False
    """Whether rows of a micro-batch are compared with each other, so that its size changes the value."""
    goes_below_zero: ClassVar[bool] = False
    """Whether a row may be below 0, like minus a bound; then its weight is never learned."""

    @property
    def reads(self) -> Reads:
        return Reads()

    def head_request(self) -> HeadRequest | None:
        return None

    def total(self, seen: Seen) -> Tensor:
        """The differentiable sum over the rows of a micro-batch, without rows of stand-in images.

        A term with a module must call it for every batch, even without rows.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a total nor a request to the head")

    def module(self, widths: Widths) -> nn.Module | None:
        """New weights of the term's own: the student's engine trains, shards and saves them."""
        del widths
        return None

    def saturation(self) -> Saturation | None:
        """Below which value the term, with these settings, has nothing to teach; None if not known."""
        return None

    def mirrored(self) -> Self:
        """The same term with student and teacher exchanged: a peer learns from the student by it."""
        return self

    def fits(self, trainable: Sequence[str], placement: str) -> None:
        """ValueError if it trains nothing of `trainable`, or cannot run the teacher with this placement."""
        stages = [tap for tap in self.reads.student_taps if tap.startswith(STAGE)]
        if stages and "vision_tower" not in trainable:
            raise ValueError(
                f"{stages[0]} belongs to a frozen tower, so the term would train nothing there; add "
                "vision_tower to `trainable`, or leave the stages out"
            )
