"""What flows between the rooms.

Shape legend: B rows, T tokens, I images, C channels, H height, W width, M places with a stored prediction,
S stretches of answers, R their further tokens,
N tokens of an image, P response targets of a record (fewer are filled up), E teacher width, K stored columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are in the flattened rows, found on the host, so that no step waits for its device.

    `response_N`: positions whose next token is a target. `visual_N`: positions of image features, and
    `distilled_N` those of valid images; `valid_images_N` are the numbers of these images. `boundaries_N`:
    where each record, or the padding of a row, begins, and the end of the last; `lengths`: how long each is.
    """

    response_N: Tensor
    visual_N: Tensor
    distilled_N: Tensor
    valid_images_N: Tensor
    boundaries_N: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def find(
        cls, *, labels_BT: Tensor, visual_BT: Tensor, position_ids_BT: Tensor, image_is_valid_I: Tensor
    ) -> Places:
        """Waits for the device if the tensors are not on the host."""
        starts_N = _where(position_ids_BT == 0)
        end = starts_N.new_tensor([position_ids_BT.numel()])
        boundaries_N = torch.cat([starts_N, end]).int()
        return cls(
            response_N=_where(_next(labels_BT) != IGNORE_INDEX),
            visual_N=_where(visual_BT),
            distilled_N=_where(_of_valid_images(visual_BT, image_is_valid_I)),
            valid_images_N=_where(image_is_valid_I),
            boundaries_N=boundaries_N,
            lengths=tuple(boundaries_N.diff().tolist()),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Places:
        """The same with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lengths"}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def _where(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host goes on while a copy to a GPU runs; one to the host it would read before it is there."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _next(labels_BT: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def _of_valid_images(visual_BT: Tensor, image_is_valid_I: Tensor) -> Tensor:
    num_images = image_is_valid_I.shape[0]
    if num_images == 0:
        return visual_BT
    flat = visual_BT.flatten()
    per_image = flat.sum() // num_images
    image_of_token = ((flat.cumsum(0) - 1) // per_image.clamp_min(1)).clamp(0, num_images - 1)
    return (flat & image_is_valid_I[image_of_token]).view_as(visual_BT)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one model reads.

    A row is right-padded and holds one record or, packed, several: `segment_ids_BT` is 0 on padding and
    1, 2, ... on the records of a row, `position_ids_BT` restarts at each of them. The first token of a
    record is never a target. `visual_BT` marks the positions that receive projected image features, in
    the order of `pixels_ICHW`; every image fills the same number of positions. `image_is_valid_I` is False
    for the stand-in of an image that could not be read: it fills its place but is not distilled.
    `is_packed` is True where some row holds more than one record. `known_places`: as the loader found them.
    `scores_BT`: of each label, how likely it is private, 0..1; None where nobody asked. `own`: for a model of
    another kind than LLaVA, what its own processor made beside the tokens, by the names of its arguments;
    `pixels_ICHW` then has no pixel.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    visual_BT: Tensor
    pixels_ICHW: Tensor
    image_is_valid_I: Tensor
    is_packed: bool = False
    known_places: Places | None = None
    scores_BT: Tensor | None = None
    own: Mapping[str, Tensor] | None = None

    @property
    def places(self) -> Places:
        """The known ones; otherwise they are looked for, and the device is waited for."""
        if self.known_places is not None:
            return self.known_places
        return Places.find(
            labels_BT=self.labels_BT,
            visual_BT=self.visual_BT,
            position_ids_BT=self.position_ids_BT,
            image_is_valid_I=self.image_is_valid_I,
        )

    @property
    def targets_BT(self) -> Tensor:
        """Label of the next token at each position; IGNORE_INDEX where there is none."""
        return _next(self.labels_BT)

    @property
    def target_scores_N(self) -> Tensor:
        """Of the targets at `places.response_N`, how likely each is private, 0..1."""
        rows_N = self.places.response_N
        if self.scores_BT is None:
            return torch.zeros(len(rows_N), device=rows_N.device)
        return self.scores_BT.roll(-1, 1).flatten()[rows_N]  # no target is the first of its row

    @property
    def num_images(self) -> int:
        return self.pixels_ICHW.shape[0]

    @property
    def distilled_visual_BT(self) -> Tensor:
        """Visual positions whose image is valid."""
        return _of_valid_images(self.visual_BT, self.image_is_valid_I)

    def answers_of_images(self) -> tuple[Tensor, Tensor]:
        """Which of `places.response_N` are of the record of each image: their numbers, and which are there.

        Both [I, P]. P is known on the host: as many as the longest record may have beside an image.
        """
        places, num_images = self.places, self.num_images
        per_image = len(places.visual_N) // max(num_images, 1)
        num = min(len(places.response_N), max(0, max(places.lengths) - per_image)) if num_images else 0
        order_P = torch.arange(num, device=places.response_N.device)
        if num_images == 0 or num == 0:
            empty_IP = order_P.expand(num_images, num)
            return empty_IP, empty_IP.bool()
        boundaries_N = places.boundaries_N.long()
        before_N = torch.searchsorted(places.response_N, boundaries_N)  # targets before each record
        first_I = places.visual_N.view(num_images, -1)[:, 0].contiguous()
        record_I = torch.searchsorted(boundaries_N, first_I, right=True) - 1
        index_IP = before_N[record_I].unsqueeze(1) + order_P
        is_there_IP = index_IP < before_N[record_I + 1].unsqueeze(1)
        return torch.where(is_there_IP, index_IP, 0), is_there_IP

    def questions_of_images(self) -> tuple[Tensor, Tensor]:
        """Flat places of the record of each image, and which of them are its text that is no answer.

        Both [I, P]. P is known on the host: the length of the longest record.
        """
        places, num_images = self.places, self.num_images
        num = max(places.lengths, default=0) if num_images else 0
        order_P = torch.arange(num, device=places.visual_N.device)
        if num == 0:
            empty_IP = order_P.expand(num_images, num)
            return empty_IP, empty_IP.bool()
        boundaries_N = places.boundaries_N.long()
        first_I = places.visual_N.view(num_images, -1)[:, 0].contiguous()
        record_I = torch.searchsorted(boundaries_N, first_I, right=True) - 1
        place_IP = boundaries_N[record_I].unsqueeze(1) + order_P
        is_there_IP = place_IP < boundaries_N[record_I + 1].unsqueeze(1)
        place_IP = torch.where(is_there_IP, place_IP, 0)
        is_text_BT = (self.labels_BT == IGNORE_INDEX) & ~self.visual_BT & (self.segment_ids_BT > 0)
        return place_IP, is_there_IP & is_text_BT.flatten()[place_IP]

    def to(self, device: torch.device | str) -> Inputs:
        def move(tensor: Tensor) -> Tensor:
            return _moved(tensor, device)

        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: move(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        places = None if self.known_places is None else self.known_places.map(move)
        own = None if self.own is None else {name: move(tensor) for name, tensor in self.own.items()}
        return replace(self, known_places=places, own=own, **moved)


class Counts(dict[str, Tensor]):
    """Denominators of one optimiser step by name, as float64 scalars on the device."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"no denominator is named {name!r}; there are {sorted(self)}: a term with its own denominator "
            "must give its count of every batch"
        )

    def __add__(self, other: Counts) -> Counts:
        """Of two parts of a step. Raises ValueError where they do not count the same."""
        if different := self.keys() ^ other.keys():
            raise ValueError(f"every batch must have the same counts; only some have {sorted(different)}")
        return Counts({name: value + other[name] for name, value in self.items()})

    def positive(self, name: str) -> Tensor:
        """For a term that must not be trained on nothing. ValueError for zero, which waits for the device."""
        value = self[name]
        if not bool(value > 0):
            raise ValueError(
                f"a term is divided by {name}, and this step has none on any rank; give data that have some, "
                "a larger global_batch_size, or drop the term"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """Stored predictions of a teacher for one micro-batch, at flat places of the side that it reads.

    Either final hidden states, and the projector's output where it was kept; or, of each place, the largest
    logits, their columns, and the log of what exp(logit / temperature) sums to over the columns left out; at
    the temperature `std` also that temperature, the standard deviation of all the logits of the place.
    `dependency_M`: how much it needs the picture at each place, in nats; of response targets alone.
    """

    places_M: Tensor
    hidden_ME: Tensor | None = None
    projected_INE: Tensor | None = None
    top_logits_MK: Tensor | None = None
    top_columns_MK: Tensor | None = None
    rest_M: Tensor | None = None
    std_M: Tensor | None = None
    dependency_M: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        """The same with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(t) for name, t in tensors.items() if t is not None})


@dataclass(frozen=True, kw_only=True)
class StretchRows:
    """Where one side predicts the stretches of answers that both sides cut into other tokens.

    Flat positions, as `Places.response_N` has them: of the first token of each stretch, and of its further
    tokens, with the number of the stretch that they are of.
    """

    first_S: Tensor
    further_R: Tensor
    stretch_R: Tensor


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """The same stretches of answers on both sides, in one order."""

    student: StretchRows
    teacher: StretchRows

    def map(self, change: Callable[[Tensor], Tensor]) -> Stretches:
        """The same with every tensor changed."""

        def mapped(rows: StretchRows) -> StretchRows:
            return StretchRows(**{f.name: change(getattr(rows, f.name)) for f in fields(rows)})

        return Stretches(student=mapped(self.student), teacher=mapped(self.teacher))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. `teacher` is None where the teacher reads exactly what the student reads.

    `teacher_rows` is what a cache holds of the teacher, where one stands in for it. `num_shared_targets`: how
    many targets are the same tokens on both sides, where there are two and the loader counted. `stretches`:
    what is compared where their tokenizers differ. `step`: the optimiser step that it is of, for what is
    drawn anew at each; steps count from 0. `own_answers`: its labels are answers of the student's own, in
    place of the data's, and no truth.
    """

    student: Inputs
    teacher: Inputs | None = None
    record_ids: tuple[str, ...] = ()
    teacher_rows: TeacherRows | None = None
    num_shared_targets: int | None = None
    stretches: Stretches | None = None
    step: int = 0
    own_answers: bool = False

    @property
    def teacher_inputs(self) -> Inputs:
        return self.student if self.teacher is None else self.teacher

    def counts(self) -> Counts:
        """Rows that each kind of loss term will sum over; a property of the student's side."""
        inputs = self.student
        return Counts(
            response_tokens=(inputs.targets_BT != IGNORE_INDEX).sum().double(),
            visual_tokens=inputs.distilled_visual_BT.sum().double(),
            images=inputs.image_is_valid_I.sum().double(),
        )

    def to(self, device: torch.device | str) -> Batch:
        teacher = None if self.teacher is None else self.teacher.to(device)
        rows = self.teacher_rows
        if rows is not None:
            rows = rows.map(lambda tensor: _moved(tensor, device))
        stretches = self.stretches
        if stretches is not None:
            stretches = stretches.map(lambda tensor: _moved(tensor, device))
        student = self.student.to(device)
        return replace(self, student=student, teacher=teacher, teacher_rows=rows, stretches=stretches)
