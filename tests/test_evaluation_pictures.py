"""Pictures in eval, chat and the report are those of training, and nothing there waits for a pipe."""

from __future__ import annotations

import base64
import io
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import tiny_processor
from transformers import LlavaImageProcessor, LlavaProcessor

from llava_kd.data.pixels.images import decode
from llava_kd.evaluation.generation import chat, generate
from llava_kd.evaluation.generation.pictures import thin_pixels
from llava_kd.evaluation.generation.prompt import model_inputs
from llava_kd.evaluation.generation.questions import Question
from llava_kd.evaluation.report.pictures import thumbnails

RAMP = np.tile(np.linspace(1000, 60000, 64).astype(np.uint16), (48, 1))


def odd_pictures(folder: Path) -> list[Path]:
    """A phone photo stored sideways, deep grey, and a palette with transparency."""
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 48, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(RAMP).save(folder / "deep.png")
    base.convert("P").save(folder / "palette.png", transparency=3)
    return sorted(folder.iterdir())


def test_eval_and_chat_see_the_pixels_of_training(tmp_path: Path) -> None:
    for path in odd_pictures(tmp_path):
        trained = decode(path.read_bytes()).numpy()
        for source in (path, path.read_bytes()):
            asked = generate._open_image(Question(id="q", text="<image>", images=(source,)), 0)
            assert np.array_equal(np.asarray(asked), trained), path.name
        assert np.array_equal(np.asarray(chat._open(str(path))), trained), path.name


def test_the_report_shows_deep_grey_as_training_saw_it(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    found = re.search(r"base64,([^\"]+)", thumbnails(tmp_path, "deep.png"))
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as shown:
        assert np.array_equal(np.asarray(shown), decode((tmp_path / "deep.png").read_bytes()).numpy())


def test_a_pipe_in_the_place_of_a_picture_is_named_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"cannot read the image .*p\.png: it must be a regular file"):
        chat._open(str(path))
    grey, fault = generate.pictures(Question(id="q", text="<image>", images=(path,)))
    assert "p.png: it must be a regular file" in fault
    assert len(grey) == 1
    assert "<img" not in thumbnails(tmp_path, "p.png")


def processor_of(aspect: str) -> LlavaProcessor:
    processor = tiny_processor(tower="clip", image_size=336, patch_size=14, strategy="default")
    if aspect == "pad":
        size = {"shortest_edge": 336}
        crop = {"height": 336, "width": 336}
        processor.image_processor = LlavaImageProcessor(do_pad=True, size=size, crop_size=crop)
    return processor


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("is_upright", [True, False])
def test_thin_pictures_become_what_stock_code_makes_and_others_go_through_it(
    aspect: str, is_upright: bool
) -> None:
    processor, rng = processor_of(aspect), np.random.default_rng(0)
    thin, plain = ((2, 700), (40, 30)) if aspect == "crop" else ((30, 4200), (300, 40))
    sizes = [plain, thin, plain] if is_upright else [size[::-1] for size in (plain, thin, plain)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in sizes]
    assert list(thin_pixels(processor.image_processor, images)) == [1]
    text = "<image>\n<image>\n<image>\nWhat?"
    found = model_inputs(processor, [text], images)
    stock = processor(text=[text], images=images, images_kwargs={"return_tensors": "pt"})
    assert found["input_ids"].tolist() == stock["input_ids"]
    for k in range(3):
        ours, theirs = found["pixel_values"][k], stock["pixel_values"][k]
        assert torch.equal(ours, theirs) or k == 1
        assert (ours - theirs).abs().max() < 2.1 / 255 / 0.26  # torchvision and Pillow round differently


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_memory_of_a_thin_picture_is_bounded(aspect: str) -> None:
    processor = processor_of(aspect)
    picture = Image.new("RGB", (60_000, 1), (200, 30, 30))
    model_inputs(processor, ["<image>\nWhat?"], [Image.new("RGB", (90, 80))])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), before[1]))
    try:
        found = model_inputs(processor, ["<image>\nWhat?"], [picture])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert found["pixel_values"].shape == (1, 3, 336, 336)
    assert len(found["pixel_values"].unique()) > 2
