"""Teachers of other kinds than LLaVA: what they say is what their own code says of their own inputs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import TEACHERS, scale_and_cap, write_teacher
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_kd.assembly.parts.foreign.teachers import foreign_side, placed_foreign
from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.config import DataConfig, TeacherConfig
from llava_kd.data.batches.collate import Item, collate_foreign
from llava_kd.data.sources.conversation import Record, Turn
from llava_kd.losses.reference import capped
from llava_kd.models.foreign.grids import foreign_grid, is_visual
from llava_kd.models.foreign.loading import ForeignParts, load_foreign
from llava_kd.models.foreign.reading import ForeignModel
from llava_kd.parallel.world import World

FAMILIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "smolvlm" and importlib.util.find_spec("num2words") is None,
            reason="the processor of SmolVLM needs the package num2words",
        ),
    )
    for name in TEACHERS
]
CPU = World(rank=0, size=1, device=torch.device("cpu"))
TALKS = {
    "one": ("<image>\nWhat is it?", "It is a cat.", "Sure?", "Yes, I am sure."),
    "two": ("First <image> then <image> compare.", "The 2nd is red.\nThe first\tis not.", "So?", "No."),
    "text": ("What is two and two?", "Four"),
    "wide": ("<image>\nDescribe.", "A wide picture of nothing at all, which is long."),
}
SIZES = {"one": [(40, 60)], "two": [(80, 30), (33, 47)], "text": [], "wide": [(20, 120)]}


def record(name: str) -> Record:
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(TALKS[name]))
    return Record(id=name, images=tuple(f"{name}{k}" for k in range(len(SIZES[name]))), turns=turns)


def pictures(name: str) -> list[Tensor]:
    drawn = np.random.default_rng(len(name))
    return [torch.from_numpy(drawn.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES[name]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def teacher(request: pytest.FixtureRequest, directory: Path) -> ForeignParts:
    path = directory / request.param
    if not path.exists():
        write_teacher(path, TEACHERS[request.param])
    return load_foreign(str(path))


def messages(name: str) -> list[dict]:
    images = iter(pictures(name))
    talk = []
    for n, text in enumerate(TALKS[name]):
        content = []
        for k, piece in enumerate(text.split("<image>")):
            if k:
                content.append({"type": "image", "image": Image.fromarray(next(images).numpy())})
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
        talk.append({"role": "assistant" if n % 2 else "user", "content": content})
    return talk


def own_words(parts: ForeignParts, name: str) -> tuple[Tensor, Tensor]:
    """Ids and logits of the model's own code on its own processor's output, one record alone."""
    model = AutoModelForImageTextToText.from_pretrained(parts.name).eval()
    processor = AutoProcessor.from_pretrained(parts.name)
    given = processor.apply_chat_template(
        messages(name), tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return given["input_ids"][0], model(**given).logits[0]


def inputs_of(parts: ForeignParts, names: list[str]) -> Inputs:
    side = foreign_side(parts, DataConfig(path="x"))
    reader = side.reader()
    items = []
    for name in names:
        read = reader(record(name), pictures(name))
        items.append(
            Item(encoded=read.encoded, images=(), num_images=len(SIZES[name]), is_valid=True, own=read.own)
        )
    rows = collate_foreign(items, pad_id=side.pad_id)
    return Inputs(
        input_ids_BT=rows.input_ids_BT,
        labels_BT=rows.labels_BT,
        position_ids_BT=rows.position_ids_BT,
        segment_ids_BT=rows.segment_ids_BT,
        visual_BT=rows.visual_BT,
        pixels_ICHW=torch.zeros(len(rows.image_is_valid_I), 3, 0, 0),
        image_is_valid_I=rows.image_is_valid_I,
        own=rows.own,
    )


@pytest.mark.parametrize("placement", ["replicated", "cpu_offload"])
@pytest.mark.parametrize("teacher", FAMILIES, indirect=True)
def test_logits_at_answers_are_those_of_the_models_own_code(teacher: ForeignParts, placement: str) -> None:
    """One batch of records with one picture, two, none and a wide one, beside each record alone."""
    names = list(TALKS)
    settings = TeacherConfig(checkpoint=teacher.name, dtype="float32", placement=placement)
    predict = placed_foreign(settings, CPU, teacher, foreign_side(teacher, DataConfig(path="x")))
    inputs = inputs_of(teacher, names)
    said = predict(Batch(student=inputs))
    logits_BTV = capped(said.hidden_BTD @ said.head_VD.T, said.cap)
    for b, name in enumerate(names):
        ids, theirs_TV = own_words(teacher, name)
        length = len(ids)
        assert inputs.input_ids_BT[b, :length].equal(ids), name
        rows = (inputs.targets_BT[b] != IGNORE_INDEX).nonzero().squeeze(1)
        assert len(rows) > len(TALKS[name][1])
        torch.testing.assert_close(logits_BTV[b, rows], theirs_TV[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("teacher", ["gemma3", "internvl"], indirect=True)
def test_so_they_are_where_it_scales_and_caps_them(teacher: ForeignParts, monkeypatch) -> None:
    scale_and_cap(monkeypatch, type(teacher.stock), cap=1.0)
    model = ForeignModel(teacher.stock)
    assert model.scaling.factor == pytest.approx(0.4)
    assert model.cap == pytest.approx(1.0)
    test_logits_at_answers_are_those_of_the_models_own_code(teacher, "replicated")


@pytest.mark.parametrize("teacher", FAMILIES, indirect=True)
def test_what_is_in_a_picture_changes_what_is_said(teacher: ForeignParts) -> None:
    model = ForeignModel(teacher.stock)
    inputs = inputs_of(teacher, ["one", "text"])
    own = inputs.own or {}
    other = replace(inputs, own={**own, "pixel_values": own["pixel_values"].flip(-1)})
    with torch.no_grad():
        said, said_of_other = model(inputs).hidden_BTD, model(other).hidden_BTD
    rows = inputs.targets_BT != IGNORE_INDEX
    assert not torch.allclose(said[0][rows[0]], said_of_other[0][rows[0]], atol=1e-3)
    torch.testing.assert_close(said[1][rows[1]], said_of_other[1][rows[1]])


@pytest.mark.parametrize("teacher", FAMILIES, indirect=True)
def test_labels_are_the_answers_and_their_ends_word_by_word(teacher: ForeignParts) -> None:
    inputs = inputs_of(teacher, list(TALKS))
    tokenizer = teacher.tokenizer
    for b, (name, talk) in enumerate(TALKS.items()):
        labels = inputs.labels_BT[b]
        text = tokenizer.decode(labels[labels != IGNORE_INDEX])
        end = "<end_of_utterance>" if "idefics" in teacher.name or "smolvlm" in teacher.name else "<|im_end|>"
        assert text == "".join(f"{answer}{end}" for answer in talk[1::2]), name


def one_tile(name: str, teacher: ForeignParts) -> None:
    """Let its processor make one tile of every picture."""
    images = teacher.processor.image_processor
    if name == "internvl":
        images.max_patches = 1
    elif name != "gemma3":
        images.do_image_splitting = False


@pytest.mark.parametrize("teacher", ["gemma3", "idefics3", "internvl"], indirect=True)
def test_visual_tokens_lie_row_by_row_in_the_grid_that_is_told(teacher: ForeignParts) -> None:
    """What changes in the upper right of a picture changes most in the token of that place."""
    one_tile(Path(teacher.name).name, teacher)
    assert (grid := foreign_grid(teacher.stock.config, teacher.processor)) is not None
    assert (grid.rows, grid.columns) == (2, 2)
    pixels = torch.full((64, 64, 3), 120, dtype=torch.uint8)
    pixels[::2, 1::3] = 30
    changed = pixels.clone()
    changed[:32, 32:, :2] = 250
    states = []
    for picture in (pixels, changed):
        given = teacher.processor(
            text=[teacher.processor.image_token],
            images=[[Image.fromarray(picture.numpy())]],
            return_tensors="pt",
        )
        own = {k: v for k, v in given.items() if k in ("pixel_values", "pixel_attention_mask")}
        assert int(is_visual(teacher.stock.config, given["input_ids"]).sum()) == 4
        with torch.no_grad():
            features = teacher.stock.model.get_image_features(**own).pooler_output
            states.append(torch.cat([*features]).view(4, -1))
    assert int((states[0] - states[1]).norm(dim=1).argmax()) == 1


@pytest.mark.parametrize("teacher", ["qwen2_vl", "idefics3", "llava_next", "mistral3"], indirect=True)
def test_pictures_of_several_sizes_or_tiles_have_no_grid(teacher: ForeignParts) -> None:
    assert teacher.grid is None
    with pytest.raises(ValueError, match="in no grid that is known"):
        _ = teacher.visual_grid
