"""What a term can access of one micro-batch: what it declares in `reads`, and nothing else.

Shape legend: N selected rows, V vocabulary rows, I images, N and M visual tokens of an image, P response
tokens of its record (fewer are filled up), S stretches, L layers, D and E width of student and teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs, StretchRows
from llava_kd.distill.formulas import Align, Common, Formulas
from llava_kd.distill.rows import Place, Rows, VisualTap, of_images, targets_of_rows, visual_features
from llava_kd.distill.terms.term import Need, Reads
from llava_kd.losses.cross.projection import Projection
from llava_kd.losses.cross.stretches import Stretched, Words
from llava_kd.losses.tuning.information import Centroids
from llava_kd.models.mllm import Prediction
from llava_kd.models.taps import Tap

NEEDS: tuple[Need, ...] = ("nothing", "logits", "states", "model")  # each serves those before it
PROJECTOR = "multi_modal_projector"  # where taps show images, not the places of rows


class Head(NamedTuple):
    """Logits are z = `hidden @ head_VD.T (+ bias_V)`, with a cap `cap tanh(z / cap)`.

    The Gram matrix is that of a frozen head, if declared.
    """

    head_VD: Tensor
    bias_V: Tensor | None
    cap: float | None
    gram_DD: Tensor | None


class Seen:
    """One micro-batch as one term reads it. Access to anything that it did not declare raises ValueError."""

    def __init__(
        self,
        name: str,
        reads: Reads,
        batch: Batch,
        common: Common,
        *,
        student: Prediction,
        teacher: Prediction | None,
        switched: Prediction | None = None,
        module: nn.Module | None = None,
    ) -> None:
        """`name` is the term's name in the table, `module` what its own `module` returned.

        `figures`: sums that the term adds to the log; they are divided by its denominator.
        """
        self.batch = batch
        self._name = name
        self._reads = reads
        self._common = common
        self._student = student
        self._teacher = teacher
        self._switched = switched
        self._module = module
        self.figures: dict[str, Tensor] = {}

    @property
    def formulas(self) -> Formulas:
        return self._common.formulas

    @property
    def num_common(self) -> int | None:
        """The number of vocabulary columns that both heads share."""
        self._declared(self._reads.vocabulary, "vocabulary=True")
        return self._common.num_common

    @property
    def words(self) -> Words | None:
        """The tokens that both tokenizers have, if the tokenizers differ."""
        self._declared(self._reads.stretches, "stretches=True")
        return self._common.words

    @property
    def projection(self) -> Projection:
        """From the tokens of one side onto the other's. ValueError if none was given."""
        self._declared(self._reads.stretches, "stretches=True")
        if self._common.projection is None:
            raise ValueError(f"the term {self._name} got no projection of one vocabulary onto the other")
        return self._common.projection

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise ValueError(f"the term {self._name} has no module of its own; its `module` must make one")
        return self._module

    @property
    def has_module(self) -> bool:
        return self._module is not None

    @property
    def is_valid_I(self) -> Tensor:
        """False for the stand-in of an unreadable image, which adds to no sum."""
        return self.batch.student.image_is_valid_I

    def rows(self, place: Place) -> Rows:
        self._declared(place in self._reads.places, f"places=({place!r}, ...)")
        return Rows.select(place, self.batch, with_teacher=self._reads.teacher != "nothing")

    def states(self, place: Place) -> tuple[Tensor, Tensor]:
        """Final hidden states of student [N, D] and teacher [N, E] at rows whose token both sides share."""
        rows = self._answered_alike(place)
        return _at(self._student, rows.student_N), _at(self._of_teacher("states"), rows.teacher_N)

    def labelled_states(self) -> tuple[Tensor, Tensor]:
        """The student's final hidden states [N, D] at response rows, and their labels [N]."""
        self._declared(self._reads.labels, "labels=True")
        rows = self.rows("response")
        return _at(self._student, rows.student_N), rows.targets_N

    @property
    def student_head(self) -> Head:
        return _head(self._student, None)

    @property
    def centroids(self) -> Centroids:
        """Centroids of the student before this stage. ValueError if none were given."""
        self._declared(self._reads.centroids, "centroids=True")
        if self._common.centroids is None:
            raise ValueError(f"the term {self._name} got no centroids of the model before this stage")
        return self._common.centroids

    def stretches(self) -> tuple[Stretched, Stretched]:
        """The same stretches of the answers, read by student and teacher."""
        self._declared(self._reads.stretches, "stretches=True")
        both, batch = self.batch.stretches, self.batch
        sides = [
            (self._student, batch.student, None if both is None else both.student),
            (self._of_teacher("states"), batch.teacher_inputs, None if both is None else both.teacher),
        ]
        student, teacher = (_stretched(*side) for side in sides)
        return student, teacher

    def switched_states(self, place: Place) -> tuple[Tensor, Tensor]:
        """[N, E] of the teacher from the student's visual output, and from its own."""
        self._declared(self._reads.switched is not None, "switched")
        rows_N = self.rows(place).teacher_N
        if self._switched is None:
            raise ValueError("the visual switch got no prediction over the student's visual output")
        return _at(self._switched, rows_N), _at(self._of_teacher("model"), rows_N)

    def student_features(self, tap: VisualTap) -> Tensor:
        """[I, N, D] of the visual tokens; at the logits, the states that the head reads."""
        self._declare_tap(tap)
        return visual_features(self._student, self.batch.student, tap)

    def features(self, tap: VisualTap) -> tuple[Tensor, Tensor]:
        """`student_features`, and [I, N, E] of the teacher, resampled to the student's tokens."""
        student_IND = self.student_features(tap)
        self._declared(self._reads.grids, "grids=True")
        features_IME = visual_features(self._of_teacher("states"), self.batch.teacher_inputs, tap)
        align = self._common.align
        return student_IND, features_IME if align is None else align(features_IME)

    def answers_of_images(self) -> tuple[Tensor, Tensor, Tensor]:
        """[I, P, D] and [I, P, E]: final states of the response tokens of each image's record.

        [I, P]: which of them exist and have a token that both sides share; ignore the others.
        """
        rows = self.rows("response")
        index_IP, is_there_IP = self.batch.student.answers_of_images()
        return (
            _at(self._student, rows.student_N[index_IP]),
            _at(self._of_teacher("states"), rows.teacher_N[index_IP]),
            is_there_IP & (rows.is_shared_N[index_IP] > 0),
        )

    def tapped(self, tap: str) -> Tensor:
        """Of the student's module: [B, T, D] in the language model, in batch layout; [I, N, D] before it."""
        self._declared(tap in self._reads.student_taps, f"student_taps=({tap!r}, ...)")
        return self._student.tapped[str(Tap.parse(tap))]

    def teacher_tapped(self, tap: str) -> Tensor:
        """The same of the teacher's module, without gradient, in the layout of the teacher's inputs."""
        self._declared(tap in self._reads.teacher_taps, f"teacher_taps=({tap!r}, ...)")
        return self._of_teacher("model").tapped[str(Tap.parse(tap))]

    def tapped_rows(self, place: Place, tap: str) -> Tensor:
        """[N, D] of the student's module at rows whose token both sides share, or of valid visual tokens."""
        states = self.tapped(tap)
        if place == "response":
            return states.flatten(0, 1)[self._answered_alike(place).student_N]
        return self._valid(_of_images(states, self.batch.student, tap))

    def stage_images(self, tap: str) -> Tensor:
        """[I, N, D] of a stage of the student's tower, resampled to the visual tokens of each image."""
        states_IMD = self.tapped(tap)[: self.batch.student.num_images]
        align = self._common.stage_align
        if align is None:
            raise ValueError(f"the term {self._name} got no grid to resample the stage {tap} to")
        return align(states_IMD)

    def stage_rows(self, tap: str) -> Tensor:
        """[N, D] of the same at the rows of `tapped_rows` of visual tokens."""
        return self._valid(self.stage_images(tap))

    def stages_of_answers(self, tap: str) -> tuple[Tensor, Tensor]:
        """[N, D] of the same at the rows of `tapped_rows` of response tokens: a mean over the tokens of all
        images of their record; and [N] whether the record has an image.
        """
        rows, side = self.rows("response"), self.batch.student
        index_IP, is_there_IP = side.answers_of_images()
        pictures_ID = self.stage_images(tap).mean(1)
        shown_IPD = pictures_ID.unsqueeze(1) * is_there_IP.unsqueeze(2)
        sum_ND = pictures_ID.new_zeros(len(rows.student_N), pictures_ID.shape[1])
        sum_ND = sum_ND.index_add(0, index_IP.flatten(), shown_IPD.flatten(0, 1))
        number_N = pictures_ID.new_zeros(len(rows.student_N))
        number_N = number_N.index_add(0, index_IP.flatten(), is_there_IP.flatten().to(number_N.dtype))
        mean_ND = sum_ND / number_N.clamp_min(1).unsqueeze(1)
        alike_N = self._alike(rows)
        return mean_ND[alike_N], number_N[alike_N] > 0

    def text_before(self, tap: str) -> Tensor:
        """[N, 2 D] at the rows of `tapped_rows` of response tokens, without gradient: a module's output at
        the row's own token, and its mean over the text tokens of the record up to that token.
        """
        side, states_BTD = self.batch.student, self.tapped(tap).detach().float()
        rows_N = self._answered_alike("response").student_N
        row_N, place_N = rows_N // states_BTD.shape[1], rows_N % states_BTD.shape[1]
        begins_N = place_N - side.position_ids_BT.flatten()[rows_N]
        is_text_BT1 = (~side.visual_BT).unsqueeze(2)
        total_ND, number_N1 = (
            before_BTD[row_N, place_N + 1] - before_BTD[row_N, begins_N]
            for before_BTD in (_summed(states_BTD * is_text_BT1), _summed(is_text_BT1.float()))
        )
        return torch.cat([states_BTD.flatten(0, 1)[rows_N], total_ND / number_N1.clamp_min(1)], dim=1)

    def teacher_rows(self, place: Place, tap: str | None = None) -> Tensor:
        """[N, E] of the teacher at the rows of `tapped_rows`: of its module, or its final states.

        Visual ones are resampled to the student's tokens.
        """
        if tap is None:
            states = self._of_teacher("states").hidden_BTD
        else:
            states = self.teacher_tapped(tap)
        if place == "response":
            return states.flatten(0, 1)[self._answered_alike(place).teacher_N]
        self._declared(self._reads.grids, "grids=True")
        features_IME = _of_images(states, self.batch.teacher_inputs, tap)
        align = self._common.align
        return self._valid(features_IME if align is None else align(features_IME))

    def targets(self, place: Place) -> Tensor:
        """[N] next tokens at the rows of `tapped_rows`; IGNORE_INDEX at visual ones."""
        if place == "response":
            self._declared(self._reads.labels, "labels=True")
            return self._answered_alike(place).targets_N
        self._declared(place in self._reads.places, f"places=({place!r}, ...)")
        return torch.full_like(self.batch.student.places.distilled_N, IGNORE_INDEX)

    def attention_maps(self) -> tuple[Tensor, Tensor]:
        """[L, I, N, N] of both sides. ValueError if the attention of one was not recorded."""
        self._declared(self._reads.attention is not None, "attention")
        student_LINN = self._student.attention_LINN
        teacher_LIMM = self._of_teacher("model").attention_LINN
        if student_LINN is None or teacher_LIMM is None:
            raise ValueError("the attention term needs predictions of models whose attention is recorded")
        align = self._common.align
        return student_LINN, teacher_LIMM if align is None else _aligned(teacher_LIMM, align)

    def heads(self) -> tuple[Head, Head]:
        """The heads of the student and of the teacher."""
        teacher = self._of_teacher("states")
        gram_DD = teacher.head_gram_DD if self._reads.head_gram else None
        return self.student_head, _head(teacher, gram_DD)

    def _answered_alike(self, place: Place) -> Rows:
        """Rows but those of response tokens that differ: they have no common place in two vocabularies."""
        rows = self.rows(place)
        if place == "response" and self.batch.teacher is not None:
            return rows.take(self._alike(rows))
        return rows

    def _alike(self, rows: Rows) -> Tensor:
        if self.batch.teacher is None:
            return torch.arange(len(rows.student_N), device=rows.student_N.device)
        return (rows.is_shared_N > 0).nonzero().squeeze(1)

    def _valid(self, features_IND: Tensor) -> Tensor:
        """[N, D] of the images that could be read."""
        return features_IND[self.batch.student.places.valid_images_N].flatten(0, 1)

    def _declare_tap(self, tap: VisualTap) -> None:
        if tap == "projector":
            self._declared(self._reads.projector, "projector=True")
        else:
            self._declared("visual" in self._reads.places, "places=('visual', ...)")

    def _of_teacher(self, need: Need) -> Prediction:
        self._declared(NEEDS.index(need) <= NEEDS.index(self._reads.teacher), f"teacher={need!r}")
        if self._teacher is None:
            raise ValueError(f"the term {self._name} got no teacher prediction")
        return self._teacher

    def _declared(self, is_declared: bool, what: str) -> None:
        if not is_declared:
            raise ValueError(
                f"the term {self._name} reads what it does not declare: add {what} to its `reads`"
            )


def _head(said: Prediction, gram_DD: Tensor | None) -> Head:
    return Head(said.head_VD, said.bias_V, said.cap, gram_DD)


def _of_images(states: Tensor, inputs: Inputs, tap: str | None) -> Tensor:
    """[I, N, D]: what a projector gives, but for its stand-in without images, and rows of visual tokens."""
    if tap is not None and tap.startswith(PROJECTOR):
        return states[: inputs.num_images]
    return of_images(states, inputs)


def _summed(states_BTD: Tensor) -> Tensor:
    """[B, T + 1, D]: of all places before each."""
    return torch.nn.functional.pad(states_BTD.cumsum(1), (0, 0, 1, 0))


def _stretched(prediction: Prediction, inputs: Inputs, rows: StretchRows | None) -> Stretched:
    if rows is None:  # no record of the batch can be read
        none = inputs.places.response_N[:0]
        rows = StretchRows(first_S=none, further_R=none, stretch_R=none)
    return Stretched(
        first_SD=_at(prediction, rows.first_S),
        first_tokens_S=targets_of_rows(inputs, rows.first_S),
        further_RD=_at(prediction, rows.further_R),
        tokens_R=targets_of_rows(inputs, rows.further_R),
        stretch_R=rows.stretch_R,
        head_VD=prediction.head_VD,
        bias_V=prediction.bias_V,
        cap=prediction.cap,
    )


def _at(prediction: Prediction, rows_N: Tensor) -> Tensor:
    return prediction.hidden_BTD.flatten(0, 1)[rows_N]


def _aligned(maps_LIMM: Tensor, align: Align) -> Tensor:
    """Maps on the other grid: queries are carried over, then keys; no token sees a later one."""
    layers = []
    for maps_IMM in maps_LIMM:
        queries_INM = align(maps_IMM)
        layers.append(align(queries_INM.mT).mT.tril())
    return torch.stack(layers)
