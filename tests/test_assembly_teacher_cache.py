"""Training from a cache of the teacher: the same losses as live, and no word of a cache that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from llava_kd.assembly import cache_teacher as writing
from llava_kd.checksums import sealed
from llava_kd.cli import main
from llava_kd.data.teacher_store.shards import StoredRecord, write_shard
from llava_kd.data.teacher_store.store import MANIFEST, SHARDS
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

TERMS = (
    "loss",
    "cross_entropy",
    "response_kl",
    "visual_kl",
    "relation",
    "grad_norm",
    "teacher_cross_entropy",
)
SMALL = "--shard_mb=0"  # a file for each record
KL_ALONE = "--objective.relation=null"


def cache(config: Path, out: Path, *words: str) -> int:
    return main(["cache-teacher", str(config), f"--out={out}", *words])


def losses(config: Path, name: str, *words: str) -> list[dict]:
    """Metrics of each step of a run of this stage."""
    output = config.parent / name
    assert main(["train", str(config), f"--output_dir={output}", *words]) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same(live: list[dict], cached: list[dict], terms: Sequence[str] = TERMS) -> None:
    assert len(live) == len(cached) > 0
    for a, b in zip(live, cached, strict=True):
        found = [term for term in terms if term in a]
        assert found == [term for term in terms if term in b]
        for term in found:
            assert b[term] == pytest.approx(a[term], rel=1e-5, abs=1e-7), (a["step"], term)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "hidden"


@pytest.fixture
def hidden(stage: Callable[..., Path], directory: Path) -> Path:
    """A cache made once, by the first test that needs it."""
    if not directory.exists():
        assert cache(stage("writer"), directory, "--shard_mb=0") == 0
    return directory


@pytest.fixture
def copied(hidden: Path, tmp_path: Path) -> Path:
    """A cache to be spoilt."""
    return Path(shutil.copytree(hidden, tmp_path / "copied"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--seed=7", "--micro_batch_size=4"],
        ["--data.packing={max_tokens: 600, packs_per_step: 2}", "--micro_batch_size=1"],
        ["--objective.visual_kl=null", KL_ALONE],
        ["--objective.losses=reference", "--objective.relation.tap=hidden"],
        [
            "--objective.exit_logits={gamma: 1.5, form: code}",
            "--objective.visual_exit_logits={layers: [0, 1]}",
        ],
    ],
    ids=[
        "padded, two epochs",
        "another order and split",
        "packed",
        "response alone",
        "plain formulas",
        "exits",
    ],
)
def test_losses_from_the_cache_are_those_of_the_live_teacher(stage, hidden: Path, words: list[str]) -> None:
    config = stage("run", max_steps=9 if not words else 2)  # 30 records in steps of 4
    live = losses(config, "live", *words)
    same(live, losses(config, "cached", f"--teacher.cache={hidden}", *words))


def test_the_teachers_decoder_is_neither_loaded_nor_run(stage, hidden: Path, monkeypatch) -> None:
    config = stage("run", max_steps=1)
    forward = MLLM.forward
    widths = []

    def recorded(self: MLLM, *arguments, **named):
        widths.append(self.lm_head.weight.shape[1])
        return forward(self, *arguments, **named)

    monkeypatch.setattr(MLLM, "forward", recorded)
    monkeypatch.setattr("llava_kd.assembly.parts.teacher.load_stock", None)
    losses(config, "cached", f"--teacher.cache={hidden}")
    assert set(widths) == {32}  # the student's; the teacher is 48 wide


def test_a_teacher_with_another_grid_is_read_on_its_own_side(stage, tmp_path: Path) -> None:
    teacher = make_tiny_llava(tmp_path / "fine", patch_size=4, hidden=48, vocab_size=280, seed=5)
    words = [f"--teacher.checkpoint={teacher}", "--data.visual_alignment=resample"]
    config = stage("run", max_steps=2)
    assert cache(config, tmp_path / "cache", *words) == 0
    live = losses(config, "live", *words)
    same(live, losses(config, "cached", *words, f"--teacher.cache={tmp_path / 'cache'}"))


def test_the_projectors_output_is_kept_where_the_relation_reads_it(
    stage, hidden: Path, tmp_path, capsys
) -> None:
    student = make_tiny_llava(tmp_path / "student", hidden=48, tied=True)
    words = ["--objective.relation.tap=projector", f"--student.checkpoint={student}"]
    config = stage("run", max_steps=2)
    assert cache(config, tmp_path / "cache", *words) == 0
    live = losses(config, "live", *words)
    same(live, losses(config, "cached", *words, f"--teacher.cache={tmp_path / 'cache'}"))
    assert main(["train", str(config), *words, f"--teacher.cache={hidden}"]) == 2
    assert "does not have the projector's output" in capsys.readouterr().err


def test_the_largest_logits_give_their_own_divergence(stage, tmp_path: Path, capsys) -> None:
    config = stage("run", max_steps=2)
    words = [KL_ALONE]
    out = tmp_path / "topk"
    assert cache(config, out, *words, "--mode=topk", "--topk=259") == 0  # all of the 260 columns but one
    live = losses(config, "live", *words)
    terms = TERMS[:-1]  # the teacher's own cross-entropy needs all columns
    same(live, losses(config, "cached", *words, f"--teacher.cache={out}"), terms)
    same(
        live, losses(config, "plain", *words, f"--teacher.cache={out}", "--objective.losses=reference"), terms
    )
    few = tmp_path / "few"
    assert cache(config, few, *words, "--mode=topk", "--topk=8") == 0
    first = losses(config, "first", *words, f"--teacher.cache={few}")[0]
    for term in ("response_kl", "visual_kl"):
        assert 0 < first[term] < live[0][term]
    capsys.readouterr()
    for more, said in (
        ([], "does not have what relation compares"),
        (
            [KL_ALONE, "--objective.visual_kl.temperature=2.0"],
            "probabilities at temperature 1, 2: it was written for 1",
        ),
    ):
        assert main(["train", str(config), f"--teacher.cache={few}", *more]) == 2
        assert said in capsys.readouterr().err


STD = ["--objective.response_kl.temperature=std", "--objective.visual_kl.temperature=std"]


def test_the_largest_logits_keep_the_deviation_of_all(stage, tmp_path: Path, capsys) -> None:
    config = stage("run", max_steps=2)
    words, out = [KL_ALONE, *STD], tmp_path / "topk"
    assert cache(config, out, *words, "--mode=topk", "--topk=259") == 0
    assert json.loads((out / MANIFEST).read_text())["contents"]["temperature"] == "std"
    live = losses(config, "live", *words)
    for name, more in (("cached", []), ("plain", ["--objective.losses=reference"])):
        same(live, losses(config, name, *words, *more, f"--teacher.cache={out}"), TERMS[:-1])
    capsys.readouterr()
    assert main(["train", str(config), KL_ALONE, f"--teacher.cache={out}"]) == 2
    assert "probabilities at temperature 1: it was written for std" in capsys.readouterr().err


def test_a_cache_from_before_std_is_read_and_not_taken_for_it(stage, tmp_path: Path, capsys) -> None:
    config, out = stage("run", max_steps=1), tmp_path / "old"
    assert cache(config, out, KL_ALONE, "--mode=topk", "--topk=8") == 0
    new = losses(config, "new", KL_ALONE, f"--teacher.cache={out}")
    tree = json.loads((out / MANIFEST).read_text())
    tree = {name: value for name, value in tree.items() if name != "checksum"} | {"format": 2}
    (out / MANIFEST).write_text(json.dumps(sealed(tree)))
    same(new, losses(config, "again", KL_ALONE, f"--teacher.cache={out}"), TERMS[:-1])
    capsys.readouterr()
    assert main(["train", str(config), KL_ALONE, *STD, f"--teacher.cache={out}"]) == 2
    assert "probabilities at temperature std: it was written for 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "relation needs more than"),
        (
            [KL_ALONE, "--topk=4", "--objective.visual_kl.temperature=std"],
            "needs the same temperature in all KL terms; got 1, std",
        ),
        (
            [KL_ALONE, "--topk=4", "--objective.visual_kl.divergence=adaptive"],
            "visual_kl needs more than the largest",
        ),
        ([KL_ALONE], "--topk must be from 1 to 259"),
        ([KL_ALONE, "--topk=260"], "--topk must be from 1 to 259"),
        ([KL_ALONE, "--topk=4", "--objective.visual_kl.temperature=2"], "needs the same temperature"),
    ],
)
def test_what_the_largest_logits_cannot_serve_is_refused(stage, tmp_path, capsys, words, said: str) -> None:
    assert cache(stage("run"), tmp_path / "topk", "--mode=topk", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "topk" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--data.max_length=511"], "data.max_length: 512 there, 511 here"),
        (["--data.template=chatml"], "data.template: vicuna"),
        (["--data.image_aspect=pad"], "image processor"),
        (["--teacher.dtype=bfloat16"], "teacher.dtype: float32 there, bfloat16 here"),
    ],
)
def test_a_setting_that_changes_what_the_teacher_says_is_named(stage, hidden, capsys, words, name) -> None:
    assert main(["train", str(stage("run")), f"--teacher.cache={hidden}", *words]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert said.count(" there, ") == 1


def test_another_teacher_tokenizer_or_data_is_named(stage, hidden, teacher_dir, shapes_dir, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["train", str(stage("run")), f"--teacher.cache={hidden}", *words]) == 2
        return capsys.readouterr().err

    other = make_tiny_llava(tmp_path / "other", hidden=48, vocab_size=280, seed=9)
    assert "weights of the teacher" in refused(f"--teacher.checkpoint={other}")
    retold = Path(shutil.copytree(teacher_dir, tmp_path / "retold"))
    path = retold / "tokenizer.json"
    path.write_text(
        path.read_text()
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    said = refused(f"--teacher.checkpoint={retold}")
    assert "tokenizer: " in said
    assert "weights of the teacher" not in said
    settings = json.loads((retold / "config.json").read_text())
    settings["text_config"]["rms_norm_eps"] = 1e-3
    (retold / "config.json").write_text(json.dumps(settings))
    assert "configuration of the teacher" in refused(f"--teacher.checkpoint={retold}")
    records = json.loads((shapes_dir / "instructions.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(records[:-1]))
    assert "; data: " in f"; {refused(f'--data.path={tmp_path}/fewer.json').split('(', 1)[1]}"


def test_a_term_that_reads_more_than_was_kept_is_refused(stage, tmp_path: Path, capsys) -> None:
    config = stage("run")
    out = tmp_path / "response"
    assert cache(config, out, "--objective.visual_kl=null", KL_ALONE) == 0
    assert main(["train", str(config), f"--teacher.cache={out}"]) == 2
    assert "does not have the teacher at visual places" in capsys.readouterr().err


class Died(BaseException):
    """The process ends here, by nothing that a command would turn into a line."""


def test_a_killed_run_goes_on_and_a_changed_one_is_refused(
    stage, hidden, tmp_path, monkeypatch, capsys
) -> None:
    config, out = stage("run"), tmp_path / "cache"
    written = 0

    def dies(directory: Path, records: Sequence[StoredRecord]) -> Path:
        nonlocal written
        if written == 7:
            (directory / ".000000099.safetensors.partial").write_bytes(b"half")
            raise Died
        written += 1
        return write_shard(directory, records)

    monkeypatch.setattr(writing, "write_shard", dies)
    with pytest.raises(Died):
        cache(config, out, SMALL)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in (out / SHARDS).glob("0*")}
    assert len(times) == 7
    assert main(["train", str(config), f"--teacher.cache={out}"]) == 2
    assert "is not complete" in capsys.readouterr().err
    assert cache(config, out, SMALL, "--data.max_length=300") == 2
    assert "data.max_length: 512 there, 300 here" in capsys.readouterr().err
    assert cache(config, out, SMALL, KL_ALONE, "--objective.visual_kl=null") == 2
    assert "a different cache" in capsys.readouterr().err
    assert cache(config, out, SMALL) == 0
    assert "7 of 30 records are stored" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {p.name for p in out.iterdir()} == {p.name for p in hidden.iterdir()}
    for path in (hidden / SHARDS).iterdir():
        again = load_file(out / SHARDS / path.name)
        for name, tensor in load_file(path).items():  # to the last bit: batches are as without the kill
            assert torch.equal(again[name], tensor), (path.name, name)
    assert cache(config, out, SMALL) == 0
    assert "30 of 30 records are stored" in capsys.readouterr().err


def spoil(path: Path) -> None:
    """Change one stored number; the file stays one that can be read."""
    tensors = load_file(path)
    tensors["hidden_ME"][0, 0] += 1
    save_file(tensors, path)


def test_damage_is_named_and_mended(stage, copied: Path, capsys) -> None:
    config = stage("run", max_steps=8)  # an epoch: every record is read
    shards = sorted((copied / SHARDS).iterdir())
    words = ["train", str(config), f"--teacher.cache={copied}"]
    spoil(shards[3])
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{shards[3].name} is damaged: record " in said
    assert "the same `llava-kd cache-teacher` command" in said
    shards[5].write_bytes(shards[5].read_bytes()[:-9])
    assert main(words) == 2
    assert f"{shards[5].name} has " in capsys.readouterr().err
    shards[7].unlink()
    assert cache(config, copied, SMALL) == 0
    said = capsys.readouterr().err
    assert "27 of 30 records are stored" in said
    assert said.count("rewriting it") == 2
    assert main(words) == 0


def test_a_record_that_was_bad_then_is_named_now_and_cached_later(
    stage, shapes_dir, tmp_path, capsys
) -> None:
    records = json.loads((shapes_dir / "instructions.json").read_text())[:8]
    images = Path(shutil.copytree(shapes_dir / "images", tmp_path / "data" / "images"))
    lost = images / Path(records[2]["image"]).name
    kept = lost.read_bytes()
    lost.unlink()
    (tmp_path / "data" / "records.json").write_text(json.dumps(records))
    words = [f"--data.path={tmp_path}/data/records.json", f"--data.images={tmp_path}/data"]
    config, out = stage("run", max_steps=2), tmp_path / "cache"
    assert cache(config, out, *words, "--data.max_bad_rate=1") == 0
    assert json.loads((out / MANIFEST).read_text())["num_bad"] == 1
    both = [*words, "--data.max_bad_rate=1"]
    live = losses(config, "live", *both)
    same(live, losses(config, "cached", *both, f"--teacher.cache={out}"))  # bad now too: masked on both sides
    lost.write_bytes(kept)
    capsys.readouterr()
    assert main(["train", str(config), *words, f"--teacher.cache={out}"]) == 2
    assert f"record {records[2]['id']!r} is not in the teacher cache" in capsys.readouterr().err
    assert cache(config, out, *words) == 0
    assert "7 of 8 records are stored" in capsys.readouterr().err
    same(losses(config, "mended", *words), losses(config, "whole", *words, f"--teacher.cache={out}"))


def test_a_student_that_reads_other_tokens_than_the_teacher_did_is_refused(
    stage, hidden, student_dir, tmp_path, capsys
) -> None:
    student = Path(shutil.copytree(student_dir, tmp_path / "student"))
    parts = load_stock(str(student))
    parts.processor.tokenizer.backend_tokenizer.normalizer = None
    path = student / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tree))
    config = stage("run", max_steps=6)
    assert main(["train", str(config), f"--student.checkpoint={student}", f"--teacher.cache={hidden}"]) == 2
    assert "now has other tokens than the teacher read" in capsys.readouterr().err


def test_a_run_goes_on_from_a_cache_that_moved_but_not_without_it(stage, hidden, copied, capsys) -> None:
    whole, half = stage("whole", max_steps=3), stage("half", max_steps=3)
    words = [f"--teacher.cache={hidden}", "--checkpoint.every=1"]
    assert main(["train", str(whole), *words]) == 0
    assert main(["train", str(half), *words]) == 0
    output = half.with_suffix("")
    (output / "run.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000003")
    assert main(["train", str(half), "--checkpoint.every=1"]) == 2
    assert "was trained with a cache of the teacher, and this run is without" in capsys.readouterr().err
    assert main(["train", str(half), "--checkpoint.every=1", f"--teacher.cache={copied}"]) == 0
    a, b = (load_file(run.with_suffix("") / "model" / "model.safetensors") for run in (whole, half))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_directory_that_is_no_cache_is_refused(stage, tmp_path: Path, capsys) -> None:
    config = stage("run")
    assert main(["train", str(config), f"--teacher.cache={tmp_path}"]) == 2
    assert "holds no teacher cache; write one with" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert cache(config, tmp_path / "other") == 2
    assert "is not empty and holds no teacher cache" in capsys.readouterr().err
    assert cache(stage("undistilled", distilled=False), tmp_path / "none") == 2
    assert "there is nothing to cache" in capsys.readouterr().err
