"""Terms that need logits: those of equal temperature and divergence go through the head together.

Shape legend: B rows, T tokens, N selected rows, M visual tokens of an image, I images, D and E widths of
student and teacher, V and U rows of their heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.formulas import Common
from llava_kd.distill.row_choice import Chosen, choose
from llava_kd.distill.rows import Place, Rows, count, fill, visual_features
from llava_kd.distill.taught import LABELLED, AnyPrediction, Dependency, MixedPrediction, TopKPrediction
from llava_kd.distill.terms.term import HeadRequest, Term
from llava_kd.distill.token_policy import BEYOND_TOP_K, PolicyRows
from llava_kd.losses.divergence import Divergence, Temperature
from llava_kd.losses.reference import ChangeRows, HeadLoss
from llava_kd.models.mllm import Prediction

Softening = tuple[Temperature, Divergence]


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows of one place in a call of the head: what is asked of them, by the names of the terms."""

    place: Place
    cross_entropy: str | None = None
    kl: str | None = None


def head_requests(terms: Mapping[str, Term]) -> dict[str, HeadRequest]:
    """Of the terms that go through the head. ValueError for rows that a term does not declare to read."""
    found = {name: request for name, term in terms.items() if (request := term.head_request()) is not None}
    for name, request in found.items():
        if request.place not in terms[name].reads.places:
            raise ValueError(
                f"the term {name} asks for {request.place} rows, which its `reads` does not name"
            )
    return found


def blocks(requests: Mapping[str, HeadRequest]) -> dict[Softening | None, list[_Block]]:
    """One list a call of the head; cross-entropy joins the first call that has its rows already."""
    calls: dict[Softening | None, list[_Block]] = {}
    for name, request in requests.items():
        if request.divergence is not None:
            kind = request.temperature, request.divergence
            calls.setdefault(kind, []).append(_Block(place=request.place, kl=name))
    for name, request in requests.items():
        if request.divergence is None:
            _join(calls, name, request.place)
    return calls


def _join(calls: dict[Softening | None, list[_Block]], name: str, place: Place) -> None:
    for listed in calls.values():
        for number, block in enumerate(listed):
            if block.place == place and block.cross_entropy is None:
                listed[number] = replace(block, cross_entropy=name)
                return
    calls.setdefault(None, []).append(_Block(place=place, cross_entropy=name))


@dataclass(frozen=True, kw_only=True)
class HeadTerms:
    """The terms of an objective that go through the head, for one micro-batch.

    `factors`: scalars without gradient that multiply the weights of some terms. `policy`: what is taught of
    response tokens that may be private. `label_weight_N` and `dependency`: as of `Taught`.
    """

    terms: Mapping[str, Term]
    common: Common
    student: Prediction
    teacher: AnyPrediction | None
    batch: Batch
    counts: Counts
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    policy: PolicyRows | None = None
    label_weight_N: Tensor | None = None
    dependency: Dependency | None = None

    def __call__(self) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Their weighted sum and each one's mean; None where there is none of them."""
        calls = blocks(head_requests(self.terms))
        if not calls:
            return None
        loss = self.student.hidden_BTD.new_zeros((), dtype=torch.float32)
        means: dict[str, Tensor] = {}
        for kind, listed in calls.items():
            chosen = [self._choose(block, has_teacher=kind is not None) for block in listed]
            result = self._one_call(listed, chosen, kind)
            loss = loss + result.loss
            ends = list(accumulate(len(c.rows.student_N) for c in chosen))
            for begin, end, block, of_block in zip([0, *ends[:-1]], ends, listed, chosen, strict=True):
                if (name := block.cross_entropy) is not None:
                    values_N = _times(result.ce_N[begin:end], of_block.ce_factor_N)
                    means[name] = values_N.sum() * self._share(name).float()
                if (name := block.kl) is not None:
                    values_N = result.kl_N[begin:end] * of_block.factor_N
                    means[name] = values_N.sum() * self._share(name).float()
        return loss, means

    def _choose(self, block: _Block, *, has_teacher: bool) -> Chosen:
        with_teacher = has_teacher and not self._is_aligned(block.place)
        rows = Rows.select(block.place, self.batch, with_teacher=with_teacher)
        request = None if block.kl is None else self.terms[block.kl].head_request()
        chosen = choose(rows, request, self.batch, (self.student, self.teacher), self.common)
        if block.place != "response":
            return chosen
        if self.label_weight_N is not None:
            chosen = chosen.labelled(self.label_weight_N)
        if self.dependency is not None and block.kl is not None:
            chosen = chosen.weighed(self.dependency)
        return chosen if self.policy is None else chosen.under(self.policy)

    def _share(self, name: str) -> Tensor:
        denominator = self.terms[name].denominator.name
        request = self.terms[name].head_request()
        is_of_labels = request is not None and request.divergence is None and request.place == "response"
        return 1.0 / count(self.counts, LABELLED if is_of_labels and LABELLED in self.counts else denominator)

    def _weights(self, rows: Rows, name: str | None) -> Tensor:
        if name is None:
            return fill(rows, 0.0)
        return fill(rows, self.terms[name].weight * self._share(name) * self.factors.get(name, 1.0))

    def _one_call(self, listed: list[_Block], chosen: list[Chosen], kind: Softening | None) -> HeadLoss:
        student, teacher, formulas = self.student, self.teacher, self.common.formulas
        rows = [c.rows for c in chosen]
        flat_D = student.hidden_BTD.flatten(0, 1)
        student_ND = flat_D[torch.cat([r.student_N for r in rows])]
        targets_N = torch.cat([r.targets_N for r in rows])
        pairs = list(zip(listed, rows, strict=True))
        is_counted = all(c.is_counted for c in chosen)
        ce_N = torch.cat(
            [
                _times(self._weights(c.rows, block.cross_entropy), c.ce_factor_N)
                for block, c in zip(listed, chosen, strict=True)
            ]
        )
        common = {"student_bias_V": student.bias_V, "student_cap": student.cap, "ce_weight_N": ce_N}
        if kind is None or teacher is None:
            active = (0, sum(len(r.targets_N) for block, r in pairs if self._counts(block.cross_entropy)))
            common["active_rows"] = active if is_counted else None
            return formulas.head_loss(student_ND, student.head_VD, targets_N, **common)
        common["kl_weight_N"] = torch.cat(
            [self._weights(c.rows, block.kl) * c.factor_N for block, c in zip(listed, chosen, strict=True)]
        )
        common |= {"temperature": kind[0], "divergence": kind[1], "num_common": self.common.num_common}
        change = self._change(pairs, kind)
        if isinstance(teacher, TopKPrediction):
            if change is not None:
                raise ValueError(f"the largest logits of a teacher cannot serve {BEYOND_TOP_K}")
            top = teacher.top_k(torch.cat([r.teacher_N for r in rows]))
            return formulas.top_k_head_loss(student_ND, student.head_VD, targets_N, **common, top=top)
        if isinstance(teacher, MixedPrediction):
            teacher = teacher.parts[0]  # the change brings the others
        return formulas.head_loss(
            student_ND,
            student.head_VD,
            targets_N,
            **common,
            teacher_NE=torch.cat([self._teacher_rows(c, teacher) for c in chosen]),
            teacher_head_UE=teacher.head_VD,
            teacher_bias_U=teacher.bias_V,
            teacher_cap=teacher.cap,
            active_rows=self._active_rows(pairs) if is_counted else None,
            **({} if change is None else {"teacher_change": change}),
        )

    def _change(self, pairs: list[tuple[_Block, Rows]], kind: Softening) -> ChangeRows | None:
        """What other teachers, other readings, then the policy make of the first teacher's rows of a call."""
        found = [self._mixed(pairs, kind[0]), self._contrasted(pairs, kind), self._hidden(pairs, kind[0])]
        changes = [change for change in found if change is not None]

        def in_turn(index_C: Tensor, logits_CU: Tensor) -> None:
            for change in changes:
                change(index_C, logits_CU)

        return in_turn if changes else None

    def _mixed(self, pairs: list[tuple[_Block, Rows]], temperature: Temperature) -> ChangeRows | None:
        if not isinstance(self.teacher, MixedPrediction) or isinstance(temperature, str):
            return None
        rows_N = torch.cat([rows.teacher_N for _, rows in pairs])
        return self.teacher.target(rows_N, temperature=temperature, num_common=self._num_common)

    @property
    def _num_common(self) -> int:
        return self.common.num_common or self.student.head_VD.shape[0]

    def _hidden(self, pairs: list[tuple[_Block, Rows]], temperature: Temperature) -> ChangeRows | None:
        """What the policy for private tokens changes."""
        if self.policy is None or self.teacher is None:
            return None
        return self.policy.target(temperature, *_of_responses(pairs), self._num_common)

    def _contrasted(self, pairs: list[tuple[_Block, Rows]], kind: Softening) -> ChangeRows | None:
        """What readings without the picture change."""
        if self.dependency is None:
            return None
        return self.dependency.target(kind, *_of_responses(pairs), self._num_common)

    def _counts(self, name: str | None) -> bool:
        return name is not None and self.terms[name].weight > 0

    def _active_rows(self, pairs: list[tuple[_Block, Rows]]) -> tuple[int, int] | None:
        """Rows with a KL weight, and those with cross-entropy alone; None where they must be looked for."""
        num_kl = num_ce_alone = 0
        for block, rows in pairs:
            shared = len(rows.student_N)
            if block.place == "response" and self.batch.teacher is not None:
                if self.batch.num_shared_targets is None:
                    return None
                shared = self.batch.num_shared_targets
            with_kl = shared if self._counts(block.kl) else 0
            num_kl += with_kl
            if self._counts(block.cross_entropy):
                num_ce_alone += len(rows.student_N) - with_kl
        return num_kl, num_ce_alone

    def _is_aligned(self, place: Place) -> bool:
        return place == "visual" and self.common.align is not None

    def _teacher_rows(self, chosen: Chosen, teacher: Prediction) -> Tensor:
        """[N, E] that the student's rows are compared with."""
        align = self.common.align
        if chosen.rows.place != "visual" or align is None:
            return teacher.hidden_BTD.flatten(0, 1)[chosen.rows.teacher_N]
        features_IME = align(visual_features(teacher, self.batch.teacher_inputs, "hidden"))
        features_NE = features_IME[self.batch.student.places.valid_images_N].flatten(0, 1)
        return features_NE if chosen.picked_N is None else features_NE[chosen.picked_N]


def _of_responses(pairs: list[tuple[_Block, Rows]]) -> tuple[tuple[int, ...], int]:
    """Where the response rows of a call begin, and how many rows it has."""
    ends = list(accumulate(len(rows.student_N) for _, rows in pairs))
    starts = zip([0, *ends[:-1]], pairs, strict=True)
    return tuple(start for start, (block, _) in starts if block.place == "response"), ends[-1]


def _times(values_N: Tensor, factor_N: Tensor | None) -> Tensor:
    return values_N if factor_N is None else values_N * factor_N
