"""The loss on held-out talks while a stage trains: its value, on any ranks, and what it leaves alone.

Shape legend: T tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import ranks
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_kd.assembly.parts.data import side
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.training.checkpoint import Checkpoints, Saved

ENGINES = {
    "ddp": ["--engine.kind=ddp"],
    "fsdp2": ["--engine.kind=fsdp2"],
    "zero3": ["--engine.kind=deepspeed", "--engine.zero_stage=3"],
}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def talks(tmp_path: Path, shapes_dir: Path) -> Path:
    """Five talks: of one and of three turns, one without a picture; and two that cannot be read."""
    records = json.loads((shapes_dir / "instructions.json").read_text())[:5]
    for k, record in enumerate(records):
        more = [{"from": "human", "value": "And so?"}, {"from": "gpt", "value": f"It is {k}, I think."}]
        record["conversations"] += more * (k % 3)
    words = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "Gladly."}]
    records[2] = {"id": "words", "conversations": words}
    records.insert(1, {**records[0], "id": "no picture", "image": "none.png"})
    records.append({"id": "no answer", "conversations": words[:1]})
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(records))
    return path


def stock_loss(
    config: Path, model: Path, talks: Path, images: Path, *, pictures_of: dict[int, int] | None = None
) -> float:
    """By transformers' own loss, a record at a time, over the tokens of all answers.

    `pictures_of` gives, by number, the records that are read, and whose pictures each is shown.
    """
    parts = load_stock(str(model))
    settings = load(config, [])
    reader = side(parts, settings.data)
    encode, total, tokens = reader.encoder(), 0.0, 0
    source = LlavaJson(talks, images)
    for i in range(len(source)):
        record = source.record(i)
        if record.id in ("no picture", "no answer") or (pictures_of is not None and i not in pictures_of):
            continue
        encoded = encode(record)
        shown = record if pictures_of is None else source.record(pictures_of[i])
        pictures = [Image.open(images / name).convert("RGB") for name in shown.images]
        pixels = {}
        if pictures:
            pixels = dict(parts.processor.image_processor(pictures, return_tensors="pt"))
        count = int((encoded.labels[1:] != -100).sum())
        with torch.no_grad():
            out = parts.stock.eval()(input_ids=encoded.ids[None], labels=encoded.labels[None], **pixels)
        total, tokens = total + float(out.loss) * count, tokens + count
    return total / tokens


def asked(talks: Path, images: Path, every: int = 2) -> dict[str, object]:
    return {"every": every, "losses": {"talks": {"path": str(talks), "images": str(images)}}}


@pytest.mark.parametrize("distilled", [False, True])
def test_the_loss_is_that_of_transformers_and_training_is_not_touched(
    stage, shapes_dir: Path, talks: Path, distilled: bool
) -> None:
    plain = stage("plain", distilled=distilled, max_steps=3)
    config = stage("asked", distilled=distilled, max_steps=3, evaluate=asked(talks, shapes_dir))
    assert main(["train", str(plain)]) == main(["train", str(config)]) == 0
    output = config.with_suffix("")
    logged = [line for line in lines(output) if "loss/talks" in line]
    assert [line["step"] for line in logged] == [2, 3]
    assert [line["loss/talks/bad_records"] for line in logged] == [2, 2]
    expected = stock_loss(config, output / "model", talks, shapes_dir)
    assert math.isclose(logged[-1]["loss/talks"], expected, rel_tol=1e-5)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (plain.with_suffix(""), output))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [line["loss"] for line in lines(output)] == [line["loss"] for line in lines(plain.with_suffix(""))]


RESIZED = 3e-2  # of a gain: the stock processor resizes with other roundings than Pillow
BATCHES_OF_THREE = {0: 2, 2: 0, 4: 5, 5: 4}  # of `talks`: records 1 and 6 cannot be read, 3 has no picture


def stock_gain(config: Path, model: Path, talks: Path, images: Path) -> float:
    exchanged, own = (
        stock_loss(config, model, talks, images, pictures_of=shown)
        for shown in (BATCHES_OF_THREE, {i: i for i in BATCHES_OF_THREE})
    )
    return exchanged - own


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_picture_gain_is_what_other_pictures_cost(
    stage, shapes_dir: Path, talks: Path, size: int
) -> None:
    """Batches of two at least: those of two hold one picture each, but for the last, of records 4 and 5."""
    sizes = {"micro_batch_size": size, "global_batch_size": size}
    config = stage("run", distilled=False, max_steps=1, evaluate=asked(talks, shapes_dir, every=1), **sizes)
    assert main(["train", str(config)]) == 0
    model, (line,) = config.with_suffix("") / "model", lines(config.with_suffix(""))
    if size == 3:
        expected = stock_gain(config, model, talks, shapes_dir)
    else:
        of_two = {4: 5, 5: 4}
        own = stock_loss(config, model, talks, shapes_dir, pictures_of={i: i for i in of_two})
        expected = stock_loss(config, model, talks, shapes_dir, pictures_of=of_two) - own
    assert abs(expected) > 1e-5
    assert math.isclose(line["loss/talks/picture_gain"], expected, rel_tol=RESIZED)


@pytest.mark.parametrize("count", [0, 1])
def test_no_gain_is_said_where_no_picture_can_be_exchanged(
    stage, shapes_dir: Path, talks: Path, count: int
) -> None:
    settings = asked(talks, shapes_dir, every=1)
    settings["losses"]["talks"]["exchanged"] = count
    config = stage("run", distilled=False, max_steps=1, evaluate=settings)
    assert main(["train", str(config)]) == 0
    assert "loss/talks/picture_gain" not in lines(config.with_suffix(""))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_loss_of_the_model_that_it_writes(
    stage, shapes_dir: Path, tmp_path: Path, talks: Path, engine: str
) -> None:
    """Seven records are three batches, one too few for two ranks."""
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    sizes = {"micro_batch_size": 3, "global_batch_size": 6}
    plain = stage("plain", max_steps=3, engine="auto", **sizes)
    config = stage("asked", max_steps=3, engine="auto", evaluate=asked(talks, shapes_dir), **sizes)
    ended = ranks.train(config, tmp_path / "two", *ENGINES[engine], ranks=2)
    found = [line for line in lines(tmp_path / "two") if "loss/talks" in line]
    assert [line["step"] for line in found] == [2, 3], ended.log
    assert [line["loss/talks/bad_records"] for line in found] == [2, 2]
    expected = stock_loss(config, tmp_path / "two" / "model", talks, shapes_dir)
    assert math.isclose(found[-1]["loss/talks"], expected, rel_tol=1e-5)
    gain = stock_gain(config, tmp_path / "two" / "model", talks, shapes_dir)
    assert math.isclose(found[-1]["loss/talks/picture_gain"], gain, rel_tol=RESIZED)
    ranks.train(plain, tmp_path / "plain", *ENGINES[engine], ranks=2)
    one, other = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("plain", "two"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_best_checkpoint_by_a_loss_is_the_lowest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, best="loss/talks")
    for step, value in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 1.0)):
        figures = {"loss/talks": value}
        checkpoints.save(Saved(step=step, state={"w": torch.ones(3)}, figures=figures))
    assert checkpoints.steps() == [2, 4]
    best = checkpoints.best()
    assert best is not None
    assert (best.step, best.value) == (2, 1.0)


def test_training_that_lowers_the_loss_exports_the_lowest(
    stage, shapes_dir: Path, talks: Path, capsys
) -> None:
    config = stage(
        "run",
        distilled=False,
        max_steps=4,
        evaluate=asked(talks, shapes_dir, every=1),
        checkpoint={"every": 100, "keep": 1, "best": "loss/talks", "export": "best"},
    )
    assert main(["train", str(config)]) == 0
    output = config.with_suffix("")
    values = [line["loss/talks"] for line in lines(output)]
    exported = json.loads((output / "run.json").read_text())["exported"]
    assert exported["step"] == 1 + values.index(min(values))
    assert math.isclose(exported["value"], min(values))


@pytest.mark.parametrize("fault", ["no file", "nothing sound", "name", "nothing"])
def test_losses_that_cannot_be_taken_are_refused(
    stage, tmp_path: Path, shapes_dir: Path, talks: Path, capsys, fault: str
) -> None:
    evaluate = asked(talks, shapes_dir)
    if fault == "no file":
        evaluate = asked(tmp_path / "none.json", shapes_dir)
    elif fault == "nothing sound":
        evaluate["losses"]["talks"]["max_records"] = 1
        talks.write_text(json.dumps(json.loads(talks.read_text())[::-1]))
    elif fault == "name":
        evaluate["losses"] = {"a/b": {"path": str(talks)}}
    else:
        evaluate["losses"] = {}
    expected = {
        "no file": "no data file",
        "nothing sound": "none of the first 1 records",
        "name": "other than `seconds`; got ['a/b']",
        "nothing": "`evaluate.losses` are both empty; name at least one",
    }[fault]
    config = stage("run", distilled=False, evaluate=evaluate)
    for words in ([], ["--dry_run"]):
        assert main(["train", str(config), *words]) == 2
        assert expected in capsys.readouterr().err
