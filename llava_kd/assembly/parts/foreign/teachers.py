"""A teacher of another kind than LLaVA: how it reads records, where it is placed, what is said of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_kd.assembly.parts.models import DTYPES
from llava_kd.batch import Batch, Inputs
from llava_kd.config import DataConfig, TeacherConfig
from llava_kd.data.batches.collate import Item, collate_foreign
from llava_kd.data.foreign.reader import Read
from llava_kd.data.foreign.side import ForeignSide
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record, Turn
from llava_kd.distill.teaching.foreign import ForeignTeacher
from llava_kd.models.foreign.grids import visual_token
from llava_kd.models.foreign.loading import ForeignParts
from llava_kd.models.foreign.reading import ForeignModel, refuse_other_logits
from llava_kd.models.quantize import quantize_linears
from llava_kd.parallel.teacher_placement import offload_layers, shard_layers
from llava_kd.parallel.world import World

_SHOWN = 200
_SIZES = ((336, 336), (480, 640))  # height and width of pictures whose tokens are told
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest state


def foreign_side(teacher: ForeignParts, config: DataConfig, *, keeps_pictures: bool = True) -> ForeignSide:
    """How it reads records. ValueError for a processor that takes no conversation."""
    made = ForeignSide(
        processor=teacher.processor,
        max_tokens=_most_tokens(teacher),
        upright=config.exif == "apply",
        keeps_pictures=keeps_pictures,
        visual_token=visual_token(teacher.stock.config) if teacher.grid else None,
        tokens_per_image=teacher.grid.num_tokens if teacher.grid else 0,
    )
    made.reader()(_talk("Yes."), [_picture(*_SIZES[0])])
    return made


def _most_tokens(teacher: ForeignParts) -> int | None:
    most = teacher.stock.config.get_text_config().to_dict().get("max_position_embeddings")
    return most if isinstance(most, int) else None


def placed_foreign(
    settings: TeacherConfig,
    world: World,
    teacher: ForeignParts,
    side: ForeignSide,
    *,
    keeps_head_gram: bool = False,
) -> ForeignTeacher:
    """It where its settings want it, frozen. ValueError where its answers do not stand alone."""
    dtype = DTYPES[settings.dtype]
    model = ForeignModel(teacher.stock)
    if settings.quantize is not None:
        quantize_linears(model.layers, settings.quantize, compute_dtype=dtype)
    if settings.placement == "fsdp":
        shard_layers(model.decoder, [*model.layers], world, dtype)
    if settings.placement == "cpu_offload":
        decoder, layers = model.decoder, model.layers
        decoder.layers = nn.ModuleList()  # they stay behind while the others move
        _ = nn.Module.to(teacher.stock, world.device)
        decoder.layers = layers
        offload_layers([*layers], world.device, dtype)
    else:
        _ = nn.Module.to(teacher.stock, world.device)
    refuse_other_logits(model)
    placed = ForeignTeacher(model, keeps_head_gram=keeps_head_gram)
    refuse_ahead(placed, side, world.device)
    return placed


def refuse_ahead(teacher: ForeignTeacher, side: ForeignSide, device: torch.device) -> None:
    """ValueError where what it says of an answer depends on what follows, or on the batch around it.

    Two talks that part in their last answer are read in one batch and each alone.
    """
    reader = side.reader()
    reads = [reader(_talk(answer), [_picture(*_SIZES[0])]) for answer in ("Yes.", "No, it is not here.")]
    alone = [_hidden(teacher, side, [read], device)[0] for read in reads]
    together = _hidden(teacher, side, reads, device)
    ids = [read.encoded.ids for read in reads]
    shared = next(i for i, (a, b) in enumerate(zip(*map(Tensor.tolist, ids), strict=False)) if a != b)
    largest = float(alone[0].abs().max())
    bound = _TOLERANCE[teacher.model.stock.dtype] * max(largest, 1e-6)
    kind = type(teacher.model.stock).__name__
    if float((alone[0][:shared] - alone[1][:shared]).abs().max()) > bound:
        raise ValueError(
            f"a {kind} attends to later tokens (states before a word change with that word), so a "
            "conversation cannot be read in one pass; use another teacher"
        )
    for one, beside, own in zip(alone, together, ids, strict=True):
        if float((one - beside[: len(own)]).abs().max()) > bound:
            raise ValueError(
                f"a {kind} predicts differently when a record is padded in a batch: it does not mask the "
                "padding; use another teacher"
            )


def _hidden(teacher: ForeignTeacher, side: ForeignSide, reads: list[Read], device: torch.device) -> Tensor:
    items = [
        Item(encoded=read.encoded, images=(), num_images=1, is_valid=True, own=read.own) for read in reads
    ]
    rows = collate_foreign(items, pad_id=side.pad_id)
    inputs = Inputs(
        input_ids_BT=rows.input_ids_BT,
        labels_BT=rows.labels_BT,
        position_ids_BT=rows.position_ids_BT,
        segment_ids_BT=rows.segment_ids_BT,
        visual_BT=rows.visual_BT,
        pixels_ICHW=torch.zeros(len(reads), 3, 0, 0),
        image_is_valid_I=rows.image_is_valid_I,
        own=rows.own,
    )
    return teacher(Batch(student=inputs.to(device))).hidden_BTD.float().cpu()


def describe(teacher: ForeignParts, side: ForeignSide) -> tuple[str, str]:
    """Its template, by what it asks, and the tokens of a picture of some sizes."""
    reader = replace(side, max_tokens=None).reader()
    text = reader.question(_talk("Yes."))
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    bare = len(reader(_talk("Yes.", with_picture=False), []).encoded.ids)
    counts = {
        (height, width): len(reader(_talk("Yes."), [_picture(height, width)]).encoded.ids) - bare
        for height, width in _SIZES
    }
    tokens = ", ".join(f"{count} for {width} x {height}" for (height, width), count in counts.items())
    return f"its own, of its {type(teacher.processor).__name__}: its prompt is {shown!r}", tokens


def _talk(answer: str, *, with_picture: bool = True) -> Record:
    question = f"{IMAGE_PLACEHOLDER}\nIs it here?" if with_picture else "Is it here?"
    turns = (Turn("user", question), Turn("assistant", "It may be."), Turn("user", "Sure?"))
    images = ("picture",) if with_picture else ()
    return Record(id="a try", images=images, turns=(*turns, Turn("assistant", answer)))


def _picture(height: int, width: int) -> Tensor:
    """Of changing colours, for some models leave out a picture of one colour."""
    ramp = torch.arange(height * width * 3, dtype=torch.int64).view(height, width, 3)
    return ((ramp * 7919) % 251).to(torch.uint8)
