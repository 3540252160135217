"""Commands that write, cut down to their writing: what they promise, and how they go on after a fault.

`act` is the same command again and again: from whatever a fault left, it ends in what `done` asserts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llava_kd.assembly.cache_teacher import begin, finish
from llava_kd.assembly.cache_teacher import missing as missing_records
from llava_kd.assembly.runs.run_dir import _reopen, locked
from llava_kd.checksums import sealed
from llava_kd.curation.likelihoods import Likelihood, Likelihoods
from llava_kd.curation.score_files import missing
from llava_kd.data.record_lists import RecordList, read_lists, write_lists
from llava_kd.data.shapes.writing import write_shapes
from llava_kd.data.sources.cache import build_once
from llava_kd.data.teacher_store.shards import Shard, StoredRecord, write_shard
from llava_kd.data.teacher_store.store import MANIFEST, SHARDS, Contents, Manifest, TeacherCache
from llava_kd.durable import named, replacing_folder, write_text
from llava_kd.evaluation.answers import AnswerWriter, answers_file, claim, mend, merge, read_all
from llava_kd.training.checkpoint import Checkpoints, Saved, sweep
from llava_kd.training.metrics import Metrics
from llava_kd.training.trackers import _wandb_id

Mark = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`holds` asserts what the `marks` that were passed promise, before anything is run again.

    `refuses`: what a command may say, naming the file, instead of going on. `needs`: the syncs (`file`,
    `folder`) without which a power cut breaks it. Of so many (`every`)
    states one is gone on from.
    """

    act: Callable[[Path, Mark], None]
    holds: Callable[[Path, Collection[str]], None]
    done: Callable[[Path], None]
    begin: Callable[[Path], None] = lambda root: None
    refuses: str = "$never"
    every: int = 1
    needs: tuple[str, ...] = ("file", "folder")


def _weights(step: int) -> torch.Tensor:
    return torch.arange(40, dtype=torch.float32) * step


def _train(root: Path, mark: Mark, *, steps: int = 6) -> None:
    """Six updates, a checkpoint every two."""
    output = root / "out" / "run"
    with locked(output):
        sweep(output)
        sweep(output / "checkpoints")
        write_text(output / "config.yaml", "seed: 1\n")
        checkpoints = Checkpoints(output / "checkpoints", keep=1, extra_files={"config.yaml": "seed: 1\n"})
        saved, _ = checkpoints.load_newest()
        first = 0 if saved is None else saved.step
        metrics = Metrics(output, num_steps=steps, every=1)
        metrics.resume(first)
        try:
            for step in range(first + 1, steps + 1):
                metrics.add(step, {"loss": torch.tensor(float(step))}, {}, dict)
                if step % 2 == 0:
                    metrics.sync()
                    checkpoints.save(Saved(step=step, state={"parameter/w": _weights(step)}))
                    mark(f"saved {step}")
        finally:
            metrics.close()


def _trained(root: Path, marks: Collection[str]) -> None:
    """The newest checkpoint that was promised is there, whole, and every figure up to it."""
    output = root / "out" / "run"
    saved, _ = Checkpoints(output / "checkpoints", keep=1).load_newest()
    promised = max((int(mark.split()[1]) for mark in marks), default=0)
    step = 0 if saved is None else saved.step
    assert step >= promised
    if saved is not None:
        assert torch.equal(saved.state["parameter/w"], _weights(step))
        steps = []
        for line in (output / "metrics.jsonl").read_bytes().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except ValueError:
                break
        assert steps[:step] == list(range(1, step + 1))


def _trained_to_the_end(root: Path) -> None:
    output = root / "out" / "run"
    _trained(root, ["saved 6"])
    assert [json.loads(x)["step"] for x in (output / "metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]
    steps = Checkpoints(
        output / "checkpoints", keep=1
    ).steps()  # one that was to go may have come back, whole
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        f"step-{step:08d}" for step in steps
    }
    assert (output / "config.yaml").read_text() == "seed: 1\n"


def _finished(root: Path) -> None:
    """A run that was finished at step 2."""
    output = root / "run"
    Checkpoints(output / "checkpoints", keep=1).save(Saved(step=2, state={"w": _weights(2)}))
    write_text(output / "run.json", json.dumps(sealed({"steps": 2})))


def _longer(root: Path, mark: Mark) -> None:
    """Make it longer: what it said of itself is put aside, and later checkpoints push out that of its end."""
    output = root / "run"
    sweep(output)
    _reopen(output)
    checkpoints = Checkpoints(output / "checkpoints", keep=1)
    for step in (4, 6):
        checkpoints.save(Saved(step=step, state={"w": _weights(step)}))
        mark(f"saved {step}")


def _lengthened(root: Path, marks: Collection[str]) -> None:
    saved, _ = Checkpoints(root / "run" / "checkpoints", keep=1).load_newest()
    assert saved is not None
    assert saved.step >= max([2, *(int(mark.split()[1]) for mark in marks)])


def _is_longer(root: Path) -> None:
    _lengthened(root, ["saved 6"])
    assert not (root / "run" / "run.json").exists()
    assert (root / "run" / "run-step-00000002.json").is_file()


_IDS = [f"q{i}" for i in range(6)]


def _answer(root: Path, mark: Mark) -> None:
    """Two ranks' answers in batches, then one file in order, then the scores."""
    out = root / "out" / "eval"
    claim(out, {"model": "m", "data": "d"})
    for rank in range(2):
        mend(answers_file(out, rank))
    found = read_all(out)
    for rank in range(2):
        with AnswerWriter(out, rank) as writer:
            mine = [name for name in _IDS[rank::2] if name not in found]
            for batch in (mine[:2], mine[2:]):
                writer.write({"id": name, "answer": f"to {name}\u2028{name}"} for name in batch)
    merged = merge(out, _IDS)
    mark("merged")
    write_text(out / "summary.json", json.dumps({"count": len(merged)}))
    mark("scored")


def _answered(root: Path, marks: Collection[str]) -> None:
    """No answer but the right ones; where the scores are, every answer is."""
    out = root / "out" / "eval"
    if "merged" in marks or (out / "summary.json").exists():
        assert list(read_all(out)) == _IDS
    if "scored" in marks:
        assert json.loads((out / "summary.json").read_bytes()) == {"count": 6}


def _all_answered(root: Path) -> None:
    _answered(root, ["merged", "scored"])
    out = root / "out" / "eval"
    assert [a["answer"] for a in read_all(out).values()] == [f"to {name}\u2028{name}" for name in _IDS]
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "run.json", "summary.json"}


def _score(root: Path, mark: Mark) -> None:
    """Likelihoods of a teacher, then the list of the records that stay."""
    kept = Likelihoods(root / "scores", "teacher")
    kept.begin()
    for number in missing(kept.read(), 4):
        kept.append(number % 2, [Likelihood(number=number, id=f"r{number}", nll=1.5, tokens=3, characters=9)])
    write_lists(
        root / "records.json", [RecordList(name="data", fingerprint="f", num_records=4, records=(0, 2))]
    )
    mark("listed")


def _scored(root: Path, marks: Collection[str]) -> None:
    if "listed" in marks or (root / "records.json").exists():
        (one,) = read_lists(root / "records.json")
        assert one.records == (0, 2)


def _all_scored(root: Path) -> None:
    _scored(root, ["listed"])
    found = Likelihoods(root / "scores", "teacher").read()
    assert {number: one.id for number, one in found.items()} == {n: f"r{n}" for n in range(4)}


_MANIFEST = Manifest(
    identity={"teacher": "t"}, contents=Contents(mode="hidden", places=("response",)), num_records=4
)


def _record(number: int) -> StoredRecord:
    rows = torch.arange(12, dtype=torch.float32).view(3, 4) + number
    return StoredRecord(
        number=number, text_crc=number, positions_M=torch.arange(3).int(), tensors={"hidden_ME": rows}
    )


def _cache(root: Path, mark: Mark) -> None:
    """A teacher's cache in two shards, its index and its head."""
    directory = root / "out" / "cache"
    head: Any = SimpleNamespace(weight=torch.ones(5, 4), bias=None)
    with locked(directory, "--out"):
        begin(directory, _MANIFEST, head, lambda line: None)
        todo = missing_records(directory, _MANIFEST, lambda line: None)
        for numbers in (todo[:2], todo[2:]):
            if numbers:
                write_shard(directory / SHARDS, [_record(number) for number in numbers])
                mark(f"shard {numbers[0]}")
        finish(directory, _MANIFEST, lambda line: None)
        mark("complete")


def _cached(root: Path, marks: Collection[str]) -> None:
    directory = root / "out" / "cache"
    if "complete" in marks or _is_complete(directory):
        cache = TeacherCache(directory, ["response"])
        cache.manifest.check(directory, "head.safetensors")
    for mark in marks:
        if mark.startswith("shard"):
            Shard(directory / SHARDS / f"{int(mark.split()[1]):09d}.safetensors").check()


def _is_complete(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() and Manifest.read(directory).is_complete


def _all_cached(root: Path) -> None:
    directory = root / "out" / "cache"
    _cached(root, ["complete"])
    stored = [Shard(path) for path in sorted((directory / SHARDS).iterdir())]
    records = [shard.record(r) for shard in stored for r in range(len(shard))]
    assert sorted(record.number for record in records) == [0, 1, 2, 3]
    assert all(record.crc() == _record(record.number).crc() for record in records)


def _index(root: Path, mark: Mark) -> None:
    """What is built once from the data and read by every rank: made anew where it is damaged."""

    def build(folder: Path) -> None:
        np.save(folder / "places.npy", np.arange(50))
        np.save(folder / "lengths.npy", np.arange(70))

    build_once(root / "cache" / "key", build)
    mark("built")


def _indexed(root: Path) -> None:
    _index(root, lambda promise: None)
    assert np.load(root / "cache" / "key" / "places.npy").tolist() == list(range(50))
    assert np.load(root / "cache" / "key" / "lengths.npy").tolist() == list(range(70))


def _export(root: Path, mark: Mark) -> None:
    """A model directory made beside its place, and one that replaces it."""
    for version in ("old", "new"):
        sweep(root / "out")
        with replacing_folder(root / "out" / "model") as scratch, named(scratch):
            for name in ("config.json", "model.safetensors"):
                (scratch / name).write_text(f"{version} {name}" * 9)
        mark(version)


def _exported(root: Path, marks: Collection[str]) -> None:
    """Never a mixture or a part; while the second takes the place of the first there may be none."""
    files = root / "out" / "model"
    if files.exists() or "new" in marks:
        found = {path.read_text() for path in files.iterdir()}
        versions = ["new"] if "new" in marks else ["new", "old"]
        names = ("config.json", "model.safetensors")
        assert found in [{f"{version} {name}" * 9 for name in names} for version in versions]


def _draw(root: Path, mark: Mark) -> None:
    write_shapes(root / "shapes", num_train=2, num_validation=1, num_test=1, seed=3, progress=False)
    mark("drawn")


def _drawn(root: Path, marks: Collection[str]) -> None:
    """Where the folder is, the same command takes it for whole: it must be."""
    folder = root / "shapes"
    if (folder / "manifest.json").exists() or "drawn" in marks:
        assert len(list((folder / "images").iterdir())) == 4
        assert all(
            path.stat().st_size > 100 and b"\0" * 90 not in path.read_bytes() for path in _files(folder)
        )
        json.loads((folder / "instructions.json").read_text())


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _track(root: Path, mark: Mark) -> None:
    mark(f"id {_wandb_id(root / 'run', 'project')}")


def _tracked(root: Path, marks: Collection[str]) -> None:
    for promise in marks:
        assert _wandb_id(root / "run", "project") == promise.split()[1]


SCENARIOS = {
    "checkpoints and figures": Scenario(act=_train, holds=_trained, done=_trained_to_the_end),
    "a run made longer": Scenario(begin=_finished, act=_longer, holds=_lengthened, done=_is_longer),
    "answers and scores": Scenario(
        act=_answer,
        holds=_answered,
        done=_all_answered,
        refuses=r"answers(\.rank1)?\.jsonl, line \d+ is not JSON",
    ),
    "scores of records": Scenario(
        act=_score,
        holds=_scored,
        done=_all_scored,
        refuses=r"teacher\.rank\d\.jsonl, line \d+ is no score",
    ),
    "a teacher's cache": Scenario(act=_cache, holds=_cached, done=_all_cached),
    "an index of the data": Scenario(act=_index, holds=lambda root, marks: None, done=_indexed, needs=()),
    "a model directory": Scenario(
        act=_export, holds=_exported, done=lambda root: _exported(root, ["old", "new"])
    ),
    "drawn data": Scenario(act=_draw, holds=_drawn, done=lambda root: _drawn(root, ["drawn"]), every=40),
    "the id of a tracker": Scenario(act=_track, holds=_tracked, done=lambda root: None),
}
