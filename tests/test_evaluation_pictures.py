"""Pictures in eval, chat and the report are those of training, and nothing there waits for a pipe."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_kd.data.images import decode
from llava_kd.evaluation import chat, generate, report
from llava_kd.evaluation.questions import Question

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
    found = re.search(r"base64,([^\"]+)", report._thumbnail(tmp_path, "deep.png"))
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
    assert report._thumbnail(tmp_path, "p.png") == ""
