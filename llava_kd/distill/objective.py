"""Which rows of which prediction go to which loss, with which weight and which denominator.

Shape legend: B rows, T tokens, N selected rows, M visual tokens of an image, I images, D student width,
E teacher width, V and U rows of the student's and the teacher's head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llava_kd.batch import Batch, Counts
from llava_kd.distill.options import Attention, DBiLD, attention_term, dbild_term, touch
from llava_kd.distill.rows import Rows, Tap, fill, visual_features
from llava_kd.distill.taught import AnyPrediction, TopKPrediction
from llava_kd.losses.reference import Divergence, HeadLoss, RowsLoss, dbild_loss, head_loss, relation_rows
from llava_kd.losses.reference_top_k import top_k_head_loss
from llava_kd.models.mllm import Prediction


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Next-token cross-entropy over response targets."""

    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KL:
    """T^2 times a divergence between teacher and student over the common vocabulary."""

    weight: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = field(default_factory=lambda: Divergence("forward"))


@dataclass(frozen=True, kw_only=True)
class Relation:
    """1 - cosine between the visual tokens' similarity matrices, one value an image."""

    weight: float = 0.5
    tap: Tap = "logits"
    centre: bool = False
    normalise: bool = False


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
    """The weighted sum of the terms that are present.

    `num_common` is the number of vocabulary columns that both heads share; `align` carries the teacher's
    features of each image, [I, M, E], to the student's tokens, None where both have the same; `head_loss`,
    `top_k_head_loss`, `relation_rows` and `dbild_loss` are the formulas, fast or reference.
    """

    cross_entropy: CrossEntropy | None = None
    response_kl: KL | None = None
    visual_kl: KL | None = None
    relation: Relation | None = None
    response_dbild: DBiLD | None = None
    visual_switch: DBiLD | None = None
    attention: Attention | None = None
    num_common: int | None = None
    align: Callable[[Tensor], Tensor] | None = None
    head_loss: Callable[..., HeadLoss] = head_loss
    top_k_head_loss: Callable[..., HeadLoss] = top_k_head_loss
    relation_rows: Callable[..., Tensor] = relation_rows
    dbild_loss: Callable[..., RowsLoss] = dbild_loss

    @property
    def needs_teacher(self) -> bool:
        lent = (self.response_dbild, self.visual_switch, self.attention)
        return any(t is not None for t in (self.response_kl, self.visual_kl, self.relation, *lent))

    def __call__(
        self,
        student: Prediction,
        teacher: AnyPrediction | None,
        batch: Batch,
        counts: Counts,
        switched: Prediction | None = None,
    ) -> Losses:
        """`switched` is the teacher's prediction over the student's visual output.

        Raises ValueError if a term needs a prediction that is not there, or the sides do not line up.
        """
        if self.needs_teacher and teacher is None:
            raise ValueError("the objective has distillation terms but got no teacher prediction")
        if isinstance(teacher, TopKPrediction) and any((self.relation, self.response_dbild, self.attention)):
            raise ValueError("the largest logits serve response_kl and visual_kl alone; drop the other terms")
        loss = touch(student)
        means: dict[str, Tensor] = {}
        states = None if isinstance(teacher, TopKPrediction) else teacher
        for partial in (
            self._head_terms(student, teacher, batch, counts),
            self._relation_term(student, states, batch, counts),
        ):
            if partial is not None:
                loss = loss + partial.loss
                means |= partial.means
        for share, mean in self._lent_terms(student, states, batch, counts, switched):
            loss = loss + share
            means |= mean
        return Losses(loss=loss, means=means)

    def _lent_terms(
        self,
        student: Prediction,
        teacher: Prediction | None,
        batch: Batch,
        counts: Counts,
        switched: Prediction | None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Terms of other methods: each one's share of the loss, and its mean."""
        if teacher is None or (self.response_dbild, self.visual_switch, self.attention) == (None,) * 3:
            return
        common = {"num_common": self.num_common, "dbild_loss": self.dbild_loss}
        rows = Rows.select("response", batch, with_teacher=True)
        if (term := self.response_dbild) is not None:
            both = rows.student_N, rows.teacher_N
            if batch.teacher is not None:  # other tokens have no common place in the two vocabularies
                both = both[0][rows.is_shared_N > 0], both[1][rows.is_shared_N > 0]
            yield dbild_term("response_dbild", term, (student, teacher), both, counts, **common)
        if (term := self.visual_switch) is not None:
            if switched is None:
                raise ValueError("the visual switch got no prediction over the student's visual output")
            both = rows.teacher_N, rows.teacher_N
            yield dbild_term("visual_switch", term, (switched, teacher), both, counts, **common)
        if self.attention is not None:
            yield attention_term(self.attention, student, teacher, batch, counts, self.align)

    def _head_terms(
        self, student: Prediction, teacher: AnyPrediction | None, batch: Batch, counts: Counts
    ) -> Losses | None:
        """CE and both KLs; terms of equal temperature and divergence go through the head together."""
        share = 1.0 / counts["response_tokens"].clamp_min(1), 1.0 / counts["visual_tokens"].clamp_min(1)
        groups: dict[tuple[float, Divergence] | None, list[str]] = {}
        if self.response_kl is not None:
            groups.setdefault(_kind(self.response_kl), []).append("response")
        if self.visual_kl is not None:
            groups.setdefault(_kind(self.visual_kl), []).append("visual")
        if self.cross_entropy is not None and not any("response" in g for g in groups.values()):
            groups.setdefault(None, []).append("response")
        if not groups:
            return None
        loss = student.hidden_BTD.new_zeros((), dtype=torch.float32)
        means: dict[str, Tensor] = {}
        for kind, names in groups.items():
            rows = [
                Rows.select(name, batch, with_teacher=kind is not None and not self._is_aligned(name))
                for name in names
            ]
            result = self._one_head_call(student, teacher, batch, rows, kind, share)
            loss = loss + result.loss
            ends = list(accumulate(len(r.student_N) for r in rows))
            for begin, end, row in zip([0, *ends[:-1]], ends, rows, strict=True):
                scale = share[0] if row.name == "response" else share[1]
                if row.name == "response" and self.cross_entropy is not None:
                    means["cross_entropy"] = result.ce_N[begin:end].sum() * scale.float()
                if kind is not None:
                    means[f"{row.name}_kl"] = result.kl_N[begin:end].sum() * scale.float()
        return Losses(loss=loss, means=means)

    def _one_head_call(
        self,
        student: Prediction,
        teacher: AnyPrediction | None,
        batch: Batch,
        rows: list[Rows],
        kind: tuple[float, Divergence] | None,
        share: tuple[Tensor, Tensor],
    ) -> HeadLoss:
        flat_D = student.hidden_BTD.flatten(0, 1)
        student_ND = flat_D[torch.cat([r.student_N for r in rows])]
        targets_N = torch.cat([r.targets_N for r in rows])
        ce = 0.0 if self.cross_entropy is None else self.cross_entropy.weight
        ce_N = torch.cat([fill(r, ce * share[0] if r.name == "response" else 0.0 * share[0]) for r in rows])
        common = {"student_bias_V": student.bias_V, "ce_weight_N": ce_N}
        if kind is None or teacher is None:
            active = (0, len(targets_N) if ce > 0 else 0)
            return self.head_loss(student_ND, student.head_VD, targets_N, **common, active_rows=active)
        weights = {
            "response": 0.0 if self.response_kl is None else self.response_kl.weight * share[0],
            "visual": 0.0 if self.visual_kl is None else self.visual_kl.weight * share[1],
        }
        if isinstance(teacher, TopKPrediction):
            return self.top_k_head_loss(
                student_ND,
                student.head_VD,
                targets_N,
                **common,
                top=teacher.top_k(torch.cat([r.teacher_N for r in rows])),
                kl_weight_N=torch.cat([fill(r, weights[r.name]) for r in rows]),
                temperature=kind[0],
                divergence=kind[1],
                num_common=self.num_common,
            )
        return self.head_loss(
            student_ND,
            student.head_VD,
            targets_N,
            **common,
            teacher_NE=torch.cat([self._teacher_rows(r, teacher, batch) for r in rows]),
            teacher_head_UE=teacher.head_VD,
            teacher_bias_U=teacher.bias_V,
            kl_weight_N=torch.cat([fill(r, weights[r.name]) * r.is_shared_N for r in rows]),
            temperature=kind[0],
            divergence=kind[1],
            num_common=self.num_common,
            active_rows=self._active_rows(rows, batch),
        )

    def _active_rows(self, rows: list[Rows], batch: Batch) -> tuple[int, int] | None:
        """Rows with a KL weight, and those with cross-entropy alone; None where they must be looked for."""
        num_kl = num_ce_alone = 0
        for row in rows:
            term = self.response_kl if row.name == "response" else self.visual_kl
            shared = len(row.student_N)
            if row.name == "response" and batch.teacher is not None:
                if batch.num_shared_targets is None:
                    return None
                shared = batch.num_shared_targets
            with_kl = shared if term is not None and term.weight > 0 else 0
            num_kl += with_kl
            if row.name == "response" and self.cross_entropy is not None and self.cross_entropy.weight > 0:
                num_ce_alone += len(row.student_N) - with_kl
        return num_kl, num_ce_alone

    def _is_aligned(self, name: str) -> bool:
        return name == "visual" and self.align is not None

    def _teacher_rows(self, rows: Rows, teacher: Prediction, batch: Batch) -> Tensor:
        """[N, E] that the student's rows are compared with."""
        if not self._is_aligned(rows.name):
            return teacher.hidden_BTD.flatten(0, 1)[rows.teacher_N]
        features_IME = self._teacher_features(teacher, batch, "hidden")
        return features_IME[batch.student.places.valid_images_N].flatten(0, 1)

    def _teacher_features(self, teacher: Prediction, batch: Batch, tap: Tap) -> Tensor:
        features_IME = visual_features(teacher, batch.teacher_inputs, tap)
        return features_IME if self.align is None else self.align(features_IME)

    def _relation_term(
        self, student: Prediction, teacher: Prediction | None, batch: Batch, counts: Counts
    ) -> Losses | None:
        if self.relation is None or teacher is None:
            return None
        if batch.student.num_images == 0:  # the two sides' sizes of nothing need not agree
            zero = torch.zeros_like(counts["images"], dtype=torch.float32)
            return Losses(loss=zero, means={"relation": zero})
        valid_I = batch.student.image_is_valid_I
        heads = {}
        if self.relation.tap == "logits":
            heads = {"student_head_VD": student.head_VD, "teacher_head_UE": teacher.head_VD}
            if teacher.head_gram_DD is not None:
                heads["teacher_gram_EE"] = teacher.head_gram_DD
        rows_I = self.relation_rows(
            visual_features(student, batch.student, self.relation.tap),
            self._teacher_features(teacher, batch, self.relation.tap),
            centre=self.relation.centre,
            normalise=self.relation.normalise,
            **heads,
        )
        mean = (rows_I * valid_I).sum() / counts["images"].clamp_min(1).float()
        return Losses(loss=self.relation.weight * mean, means={"relation": mean.detach()})


def _kind(term: KL) -> tuple[float, Divergence]:
    return term.temperature, term.divergence
