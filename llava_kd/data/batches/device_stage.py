"""The last stage of loading: from a worker's micro-batch to a `Batch` on the device, ahead of its use.

Shape legend: H height, W width, C channels, I images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from llava_kd.batch import Batch, Inputs, Stretches, StretchRows
from llava_kd.data.batches.collate import CollatedRows, RawImages
from llava_kd.data.batches.micro_batches import Micro
from llava_kd.data.batches.model_side import AnySide
from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.pixels.kept_pages import KeptPages

_DEPTH = 2
_Made = tuple[Micro, Batch, torch.cuda.Event | None]


def to_batch(
    micro: Micro, sides: tuple[AnySide, ...], device: torch.device, pages: KeptPages | None = None
) -> Batch:
    """Move a micro-batch, decode and resize its images if the worker left them raw, and normalise them.

    `pages` lend the memory of the pixels on a CPU. ValueError, naming the records, if an image that was left
    encoded cannot be decoded.
    """
    raw = None if micro.raw is None else _on_device(micro.raw, micro.record_ids, device)
    inputs = [
        _inputs(rows, _pixels(rows, side, raw, device, pages), device)
        for rows, side in zip(micro.rows, sides, strict=True)
    ]
    stored = micro.teacher_rows
    return Batch(
        student=inputs[0],
        teacher=inputs[1] if len(inputs) > 1 else None,
        record_ids=micro.record_ids,
        teacher_rows=None if stored is None else stored.map(lambda t: t.to(device, non_blocking=True)),
        num_shared_targets=_num_shared_targets(micro.rows),
        stretches=_stretches(micro, device),
        step=micro.step,
    )


def _on_device(raw: RawImages, record_ids: tuple[str, ...], device: torch.device) -> list[Tensor]:
    try:
        return raw.images(device)
    except ValueError as error:
        raise ValueError(
            f"an image of the records {', '.join(record_ids)} is damaged ({error}): find it with "
            "`llava-kd data verify`, or set data.decode to cpu, where a bad record is masked and counted"
        ) from error


def _num_shared_targets(sides: tuple[CollatedRows, ...]) -> int | None:
    """Counted on the host; None with one side, or with sides that do not line up."""
    targets = [rows.labels_BT.flatten()[rows.places.response_N + 1] for rows in sides]
    if len(targets) < 2 or len(targets[0]) != len(targets[1]):
        return None
    return int((targets[0] == targets[1]).sum())


def _stretches(micro: Micro, device: torch.device) -> Stretches | None:
    """Found on the host; None where the sides have none. ValueError where they do not have the same."""
    found = [_of_side(rows) for rows in micro.rows if rows.stretches_BT is not None]
    if len(found) < 2:
        return None
    student, teacher = found
    if len(student.first_S) != len(teacher.first_S):
        raise ValueError(
            f"both sides must have the same stretches of the records {', '.join(micro.record_ids)}; the "
            f"student has {len(student.first_S)}, the teacher {len(teacher.first_S)}"
        )
    return Stretches(student=student, teacher=teacher).map(lambda t: t.to(device, non_blocking=True))


def _of_side(rows: CollatedRows) -> StretchRows:
    assert rows.stretches_BT is not None
    places_N = rows.places.response_N
    number_N = rows.stretches_BT.flatten()[places_N + 1]
    places_N, number_N = places_N[number_N > 0], number_N[number_N > 0]
    is_first_N = torch.ones_like(number_N, dtype=torch.bool)
    is_first_N[1:] = number_N.diff() != 0
    stretch_N = is_first_N.cumsum(0) - 1
    return StretchRows(
        first_S=places_N[is_first_N], further_R=places_N[~is_first_N], stretch_R=stretch_N[~is_first_N]
    )


def _pixels(
    rows: CollatedRows,
    side: AnySide,
    raw: list[Tensor] | None,
    device: torch.device,
    pages: KeptPages | None,
) -> Tensor:
    """[I, C, H, W]; of no height where a processor of the model's own has made what it reads."""
    if isinstance(side, ForeignSide):
        return torch.zeros(len(rows.image_is_valid_I), 3, 0, 0, device=device)
    transform = side.transform
    if raw is None:
        return transform.normalise(rows.images_IHWC.to(device, non_blocking=True), pages)
    resized = [transform.resize(image_HWC) for image_HWC in raw]
    images_IHWC = torch.stack(resized) if resized else torch.zeros(0, *transform.size, 3, dtype=torch.uint8)
    return transform.normalise(images_IHWC.to(device), pages)


def _inputs(rows: CollatedRows, pixels_ICHW: Tensor, device: torch.device) -> Inputs:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Inputs(
        input_ids_BT=move(rows.input_ids_BT),
        labels_BT=move(rows.labels_BT),
        position_ids_BT=move(rows.position_ids_BT),
        segment_ids_BT=move(rows.segment_ids_BT),
        visual_BT=move(rows.visual_BT),
        pixels_ICHW=pixels_ICHW,
        image_is_valid_I=move(rows.image_is_valid_I),
        is_packed=rows.is_packed,
        known_places=rows.places.map(move),
        scores_BT=None if rows.scores_BT is None else move(rows.scores_BT),
        own=None if rows.own is None else {name: move(tensor) for name, tensor in rows.own.items()},
    )


class Ahead:
    """Makes batches on a thread, a few ahead of their use; on a CUDA device also on a stream of its own.

    Made once and kept: a stream per epoch would strand the memory that was allocated on it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages = KeptPages()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, micros: Iterator[Micro], sides: tuple[AnySide, ...]) -> Iterator[tuple[Micro, Batch]]:
        """The batches in order, each with its micro-batch; an error comes where its batch would have."""
        consumer = None if self._stream is None else torch.cuda.current_stream(self._device)
        pending: deque[Future[_Made | None]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="device-stage") as thread:
            try:
                for _ in range(_DEPTH):
                    pending.append(thread.submit(self._next, micros, sides, consumer))
                while (made := pending.popleft().result()) is not None:
                    micro, batch, event = made
                    pending.append(thread.submit(self._next, micros, sides, consumer))
                    if consumer is not None and event is not None:
                        consumer.wait_event(event)
                        for tensor in tensors_of(batch):
                            tensor.record_stream(consumer)  # its memory is the side stream's
                    yield micro, batch
            finally:
                for future in pending:
                    future.cancel()

    def _next(
        self, micros: Iterator[Micro], sides: tuple[AnySide, ...], consumer: torch.cuda.Stream | None
    ) -> _Made | None:
        micro = next(micros, None)
        if micro is None:
            return None
        if self._stream is None or consumer is None:
            return micro, to_batch(micro, sides, self._device, self._pages), None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(consumer)
            batch = to_batch(micro.pinned(), sides, self._device)
            event = torch.cuda.Event()
            event.record(self._stream)
        return micro, batch, event


def tensors_of(batch: Batch) -> list[Tensor]:
    sides = [side for side in (batch.student, batch.teacher) if side is not None]
    both = batch.stretches
    stretches = () if both is None else (both.student, both.teacher)
    holders = (*sides, *(side.known_places for side in sides), batch.teacher_rows, *stretches)
    values = [value for holder in holders if holder is not None for value in vars(holder).values()]
    values += [tensor for side in sides for tensor in (side.own or {}).values()]
    return [value for value in values if isinstance(value, Tensor)]
