"""The weighted sum of the terms that are on, over one micro-batch.

Shape legend: N selected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llava_kd.batch import Batch, Counts
from llava_kd.distill.formulas import Common
from llava_kd.distill.head_terms import HeadTerms, head_requests
from llava_kd.distill.learned_weights import LearnedWeights
from llava_kd.distill.rows import Place, count
from llava_kd.distill.taught import MixedPrediction, Taught, TopKPrediction
from llava_kd.distill.terms.seen import Seen
from llava_kd.distill.terms.term import IMAGES, Term
from llava_kd.models.mllm import Prediction

# Where a teacher is always read: its own cross-entropy on the responses stands in the log.
OWN_PLACES: tuple[Place, ...] = ("response",)
NO_MIXTURE = (
    "only response_kl, with a number as temperature and trust `all`, compares the student with several "
    "teachers: remove the other terms, or use one teacher"
)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """`loss` is the weighted sum over this micro-batch, already divided by the global counts.

    `means` holds each term unweighted, divided by the same counts: summed over micro-batches and ranks they
    are the global means that the log shows.
    """

    loss: Tensor
    means: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`terms` are those that are on, by their names in the table; `modules` the weights that they brought.

    `learned` holds the weights of terms where they are learned; a term's own setting is where they begin.
    `watch` is shown the global means of every step, and may stop the run by a ValueError.
    """

    terms: Mapping[str, Term]
    common: Common = field(default_factory=Common)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    learned: LearnedWeights | None = None
    watch: Callable[[Mapping[str, Tensor]], None] | None = None

    def __post_init__(self) -> None:
        head_requests(self.terms)
        counted: dict[str, object] = {}
        for name, term in self.terms.items():
            denominator = term.denominator
            if counted.setdefault(denominator.name, denominator.count) is not denominator.count:
                raise ValueError(
                    f"two terms count {denominator.name!r} in two ways; give the denominator of {name} "
                    "a name of its own"
                )

    @property
    def needs_teacher(self) -> bool:
        return any(term.reads.teacher != "nothing" for term in self.terms.values())

    def counts(self, batch: Batch) -> Counts:
        """What a micro-batch adds to each denominator: what it counts itself, and what terms bring."""
        own = {t.denominator.name: t.denominator.count for t in self.terms.values()}
        counted = batch.counts()
        if taken := [name for name, ask in own.items() if ask is not None and name in counted]:
            raise ValueError(f"a term counts {taken[0]!r} by itself, which a batch counts already; rename it")
        return Counts({**counted, **{name: ask(batch) for name, ask in own.items() if ask is not None}})

    def __call__(self, student: Prediction, taught: Taught, batch: Batch, counts: Counts) -> Losses:
        """Raises ValueError if a term needs a prediction that is not there, or the sides do not line up."""
        states = self._states(taught)
        loss = touch(student)
        means: dict[str, Tensor] = {}
        log_variance_K = None if self.learned is None else self.learned()
        factors: dict[str, Tensor] = {}
        if self.learned is not None and log_variance_K is not None:
            factors = self.learned.factors(log_variance_K)
        head = HeadTerms(
            terms=self.terms,
            common=self.common,
            student=student,
            teacher=taught.prediction,
            batch=batch,
            counts=counts,
            factors=factors,
            policy=taught.policy,
            label_weight_N=taught.label_weight_N,
            dependency=taught.dependency,
        )()
        if head is not None:
            loss = loss + head[0]
            means |= head[1]
        for name, term in self.terms.items():
            if term.head_request() is not None:
                continue
            seen = Seen(
                name,
                term.reads,
                batch,
                self.common,
                student=student,
                teacher=states,
                switched=taught.switched,
                module=self.modules.get(name),
            )
            share, means[name] = _weighted(term, seen, counts)
            means |= {f"{name}/{what}": value for what, value in _figures(term, seen, counts).items()}
            loss = loss + share * factors.get(name, 1.0)
        if self.learned is not None and log_variance_K is not None:
            added, figures = self.learned.loss(log_variance_K, self.terms, means, self.counts(batch), counts)
            loss, means = loss + added, means | figures
        return Losses(loss=loss, means=means)

    def _states(self, taught: Taught) -> Prediction | None:
        """The prediction, where it is more than logits. ValueError where it does not serve the terms."""
        if self.needs_teacher and taught.prediction is None:
            raise ValueError("the objective has distillation terms but got no teacher prediction")
        if isinstance(taught.prediction, MixedPrediction):
            if beyond := beyond_mixture(self.terms):
                raise ValueError(f"a mixture of teachers cannot serve {' and '.join(beyond)}; {NO_MIXTURE}")
            return None
        if not isinstance(taught.prediction, TopKPrediction):
            return taught.prediction
        if beyond := beyond_top_k(self.terms):
            raise ValueError(f"the largest logits cannot serve {' and '.join(beyond)}; drop these terms")
        return None


def beyond_top_k(terms: Mapping[str, Term]) -> list[str]:
    """The terms that read more of a teacher than its largest logits."""
    return [name for name, term in terms.items() if term.reads.teacher in ("states", "model")]


def beyond_mixture(terms: Mapping[str, Term]) -> list[str]:
    """The terms that read more than what several teachers say together of all response tokens, by setting."""
    requests, found = head_requests(terms), []
    for name, term in terms.items():
        if term.reads.teacher == "nothing" and term.reads.switched is None:
            continue
        request = requests.get(name)
        if request is None or request.place != "response":
            found.append(name)
        elif request.trust != "all":
            found.append(f"{name}.trust")
        elif isinstance(request.temperature, str):
            found.append(f"{name}.temperature {request.temperature}")
    return found


def places_read(terms: Mapping[str, Term]) -> tuple[Place, ...]:
    """Where in a record the teacher is read, by the terms or for the log."""
    read = {
        place for term in terms.values() if term.reads.teacher != "nothing" for place in term.reads.places
    }
    every: tuple[Place, ...] = ("response", "visual")
    return tuple(place for place in every if place in read or place in OWN_PLACES)


def _weighted(term: Term, seen: Seen, counts: Counts) -> tuple[Tensor, Tensor]:
    """A term's share of the loss, and its unweighted mean."""
    denominator = term.denominator
    number = count(counts, denominator.name)
    if denominator == IMAGES and seen.batch.student.num_images == 0 and not seen.has_module:
        zero = torch.zeros_like(number, dtype=torch.float32)  # the two sides' sizes of nothing need not agree
        return zero, zero
    total = term.total(seen)
    if denominator.by_share:
        share = (1.0 / number).float()
        return term.weight * share * total, share * total.detach()
    mean = total / number.float()
    return term.weight * mean, mean.detach()


def _figures(term: Term, seen: Seen, counts: Counts) -> dict[str, Tensor]:
    """What the term has left for the log beside its value."""
    if not seen.figures:
        return {}
    number = count(counts, term.denominator.name).float()
    return {what: value.detach() / number for what, value in seen.figures.items()}


def touch(student: Prediction) -> Tensor:
    """Zero, with a zero gradient for every weight that the prediction comes from: engines wait for each.

    Sums of nothing: what a prediction holds where no term reads it cannot matter.
    """
    read = [student.hidden_BTD, student.head_VD, student.bias_V]
    return torch.stack([tensor[:0].float().sum() for tensor in read if tensor is not None]).sum()
