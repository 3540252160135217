"""The data settings through `llava-kd train`: mixtures, the resize, and links."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from llava_kd.assembly.parts.data import make_loader, make_source
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.config import DataConfig, SourceConfig, dump
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.parallel.world import World

Stage = Callable[..., Path]


@pytest.fixture
def sources(tmp_path: Path, shapes_dir: Path) -> list[dict[str, object]]:
    """Two files of the same name with 6 and 4 records, each beside images of its own."""
    records = json.loads((shapes_dir / "instructions.json").read_text())[:10]
    found = []
    for folder, chosen, weight in (("one", records[:6], 1.5), ("two", records[6:], 2)):
        shutil.copytree(shapes_dir / "images", tmp_path / folder / "images")
        path = tmp_path / folder / "train.json"
        path.write_text(json.dumps([{**raw, "id": f"{folder}{i}"} for i, raw in enumerate(chosen)]))
        found.append({"path": str(path), "images": str(tmp_path / folder), "weight": weight})
    return found


def mixed(stage: Stage, sources: list[dict[str, object]], name: str = "run", **changes: object) -> Path:
    """The YAML of a stage over the mixture."""
    path = stage(name, distilled=False, **changes)
    tree = yaml.safe_load(path.read_text())
    tree["data"] = {"sources": sources, "template": "vicuna", "max_length": 512, "num_workers": 0}
    path.write_text(yaml.safe_dump(tree))
    return path


def lines(config: Path) -> list[dict]:
    return [json.loads(line) for line in (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_of_a_mixture_reads_each_source_by_its_weight(
    sources: list[dict[str, object]], stage: Stage
) -> None:
    config = load(mixed(stage, sources))
    source = make_source(config.data, seed=config.seed)
    counts = Counter(source.name_of(i) for i in range(len(source)))
    assert counts == {sources[0]["path"]: 9, sources[1]["path"]: 8}
    assert load(mixed(stage, sources, "again")).data == config.data
    again = make_source(config.data, seed=config.seed)
    assert [again.record(i).id for i in range(17)] == [source.record(i).id for i in range(17)]
    other = make_source(config.data, seed=1)
    assert sorted(other.record(i).id for i in range(9)) != sorted(source.record(i).id for i in range(9))


def test_a_run_over_a_mixture_reports_each_source_apart(
    sources: list[dict[str, object]], stage: Stage
) -> None:
    first, second = (str(raw["path"]) for raw in sources)
    raw = json.loads(Path(second).read_text())[0]
    (Path(second).parent / raw["image"]).write_bytes(b"no image")
    config = mixed(stage, sources, max_steps=5)  # 20 records: an epoch of 17 and three more
    assert main(["train", str(config)]) == 0
    found = lines(config)
    total = {name: sum(line[name] for line in found) for name in found[0] if name.startswith(("rec", "bad"))}
    assert total["records"] == 20
    assert total[f"records/{first}"] >= 9
    assert total[f"records/{second}"] >= 8
    assert total[f"records/{first}"] + total[f"records/{second}"] == 20
    assert total[f"bad_records/{first}"] == 0
    assert total[f"bad_records/{second}"] == total["bad_records"] >= 2
    noted = (config.with_suffix("") / "bad_records.jsonl").read_text().splitlines()
    assert {(json.loads(line)["source"], json.loads(line)["id"]) for line in noted} == {(second, raw["id"])}
    card = (config.with_suffix("") / "model" / "README.md").read_text()
    assert " x 1.5, " in card


def test_a_run_that_stops_for_bad_records_counts_them_by_source(
    sources: list[dict[str, object]], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Path(str(sources[1]["path"]))
    shutil.rmtree(second.parent / "images")
    config = mixed(stage, sources, max_steps=4)
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert f"max_bad_rate 0.001 allows ({second}: 4)" in said
    assert f"{second}: two" in said


def test_sources_of_different_names_are_reported_by_their_files(tmp_path: Path, shapes_dir: Path) -> None:
    names = ("captions.json", "instructions.json")
    parts = [SourceConfig(path=str(shapes_dir / name)) for name in names]
    source = make_source(DataConfig(sources=parts))
    assert {source.name_of(i) for i in range(len(source))} == set(names)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sources": []}, "`data` needs either `path`, or `sources`"),
        ({"path": "a.json", "sources": [{"path": "b.json"}]}, "`data` needs either `path`, or `sources`"),
        ({"images": "x", "sources": [{"path": "b.json"}]}, "`data.images` (x) is only for `data.path`"),
        (
            {"sources": [{"path": "b.json", "weight": 0}]},
            "`data.sources[0].weight` must be more than 0; got 0",
        ),
        (
            {"sources": [{"path": "b.json", "weight": -1}]},
            "`data.sources[0].weight` must be more than 0; got -1",
        ),
        (
            {"sources": [{"path": "b.json", "weight": float("inf")}]},
            "`data.sources[0].weight` must be finite",
        ),
        ({"sources": [{"path": "b.json", "weight": "much"}]}, "`data.sources[0].weight` must be a number"),
        ({"sources": [{"weight": 1}]}, "`data.sources[0].path` is missing"),
        ({"sources": [{"path": "b.json", "share": 1}]}, "no setting `share` in `data.sources[0]`"),
        ({"sources": [{"path": "b.json"}, {"path": "b.json"}]}, "['b.json'] is there twice"),
        ({"sources": "b.json"}, "`data.sources` must be a list; got 'b.json'"),
        ({"path": "a.json", "resize": "fast"}, "`data.resize` must be one of exact, quick; got 'fast'"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(stage: Stage, data: dict[str, object], words: str) -> None:
    path = stage("run", distilled=False)
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"data": data}))
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the words are compared below
        load(path)
    assert words in str(error.value)


def test_a_mixture_survives_a_round_trip_and_comes_by_override(stage: Stage, tmp_path: Path) -> None:
    path = stage("run", distilled=False)
    config = load(path, ["--data={sources: [{path: a.json, weight: 2}, {path: 'b/*.tar'}]}"])
    assert config.data.sources == [SourceConfig(path="a.json", weight=2), SourceConfig(path="b/*.tar")]
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config


def test_images_beside_shards_that_hold_them_are_refused(stage: Stage) -> None:
    config = DataConfig(path="shards/*.tar", images="images")
    with pytest.raises(ValueError, match="holds its images; remove `images`"):
        make_source(config)


# Resize ----


def pixels(config: Path, *overrides: str, device: str = "cpu") -> torch.Tensor:
    settings = load(config, overrides)
    parts = load_stock(str(settings.student.checkpoint))
    world = World(rank=0, size=1, device=torch.device(device))
    loader, _ = make_loader(settings, world, parts, None)
    (batch, *_) = next(loader.batches(0, 1))
    return batch.student.pixels_ICHW


def test_quick_resize_is_close_and_another_run(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    config = stage("run", distilled=False, max_steps=1)
    exact, quick = pixels(config), pixels(config, "--data.resize=quick")
    assert torch.equal(exact, pixels(config, "--data.resize=exact"))
    difference = (exact - quick).abs() * 127.5  # in the 256 values of a byte: mean and deviation are 0.5
    assert 0 < difference.max() < 2.5
    assert main(["train", str(config), "--data.resize=quick"]) == 0
    assert main(["train", str(config)]) == 2
    assert "data.resize: quick -> exact" in capsys.readouterr().err


def test_quick_resize_is_refused_where_the_device_resizes(stage: Stage) -> None:
    config = stage("run", distilled=False)
    with pytest.raises(ValueError, match=r"`data.resize` quick runs only on the CPU, but .* on cuda"):
        pixels(config, "--data.resize=quick", device="cuda")


# Links ----


def test_links_out_of_the_image_root_are_a_setting(
    sources: list[dict[str, object]], stage: Stage, tmp_path: Path
) -> None:
    root = Path(str(sources[0]["images"]))
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    data = {"path": sources[0]["path"], "images": str(root)}
    record_images = make_source(DataConfig(**data)).image_bytes
    with pytest.raises(ValueError, match=r"set data\.follow_symlinks to true"):
        record_images(0, 0)
    assert make_source(DataConfig(**data, follow_symlinks=True)).image_bytes(0, 0)
