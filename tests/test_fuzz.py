"""Ten thousand damaged files through the doors that users' files come in by: none fatal, none silently wrong.

Each is read in a child process, so that one that ends its reader is found and named. A command may answer
with a status from 0 to 2 and must not raise; where a checksum covers the file, what is read is what was
written, an older checkpoint, or a refusal.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_samples import encoded_image, entry, write_dataset

from llava_kd.cli import main
from llava_kd.data.pixels.images import decode
from llava_kd.data.teacher_store.store import Contents, Manifest
from llava_kd.training.checkpoint import Checkpoints, Saved

MOST_BYTES = 4 << 30  # to map beside what is there: who asks for more for a few kilobytes is at fault
NUMBERS = (b"-1", b"0", b"1e309", b"NaN", b"99999999999999999999", b"4294967296", b"null", b"true", b'"x"')


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, a cut, a stretch lost, doubled, zeroed or of noise, or another number."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(max(1, len(data)))
        stop = min(len(data), start + rng.choice((1, 4, 64, 700)))
        match rng.randrange(7):
            case 0 | 1:
                for place in rng.choices(range(len(data)), k=rng.randint(1, 4)) if data else ():
                    data[place] ^= 1 << rng.randrange(8)
            case 2:
                del data[start:]
            case 3:
                del data[start:stop]
            case 4:
                data[start:start] = data[start:stop]
            case 5:
                data[start:stop] = rng.choice((bytes(stop - start), rng.randbytes(stop - start)))
            case _:
                digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()] or [start]
                place = rng.choice(digits)
                data[place : place + 1] = rng.choice(NUMBERS)
    return bytes(data)


@dataclass(frozen=True)
class Door:
    """`files` of a folder are damaged in turn; `read` of the folder raises for what must not be."""

    files: Sequence[str]
    read: Callable[[Path], object]


def pictures(folder: Path) -> Door:
    kinds = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
    for kind in kinds:
        (folder / kind).write_bytes(encoded_image(kind=kind))

    def read(folder: Path) -> None:
        for kind in kinds:
            with suppress(ValueError):
                decode((folder / kind).read_bytes(), upright=True)

    return Door(kinds, read)


def verified(name: str) -> Door:
    """By a command; its status says whether all is sound."""

    def read(folder: Path) -> None:
        images = [f"--images={folder}"] if "json" in name else []
        status = main(["data", "verify", f"--data={folder / name}", *images, "--threads=1"])
        assert status in (0, 1, 2), status

    return Door([name], read)


def records(folder: Path) -> Door:
    return verified(write_dataset(folder, [entry(k, images=k % 3) for k in range(6)]).name)


def lines(folder: Path) -> Door:
    path = write_dataset(folder, [entry(k, images=k % 3) for k in range(6)])
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, json.loads(path.read_text()))))
    return verified("a.jsonl")


def shards(folder: Path) -> Door:
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number in range(4):
            (folder / f"{number}.jpg").write_bytes(encoded_image(seed=number))
            record: dict[str, Any] = {**entry(number, images=0), "image": f"{number}.jpg"}
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
            (folder / f"{number}.json").write_text(json.dumps(record))
            for name in (f"{number}.jpg", f"{number}.json"):
                archive.add(folder / name, arcname=name)
    return verified("0.tar")


def table() -> Any:
    pa = pytest.importorskip("pyarrow", reason="tables need the optional package pyarrow")
    rows = [
        {**entry(k, images=0), "image": {"bytes": encoded_image(8, 8, seed=k), "path": "x.jpg"}}
        for k in range(6)
    ]
    return pa.Table.from_pylist(rows)


def parquet(folder: Path) -> Door:
    written = table()
    pq = pytest.importorskip("pyarrow.parquet", reason="tables need the optional package pyarrow")
    pq.write_table(written, folder / "t.parquet", row_group_size=3)
    return verified("t.parquet")


def arrow(folder: Path) -> Door:
    written = table()
    ipc = pytest.importorskip("pyarrow.ipc", reason="tables need the optional package pyarrow")
    with ipc.new_file(str(folder / "t.arrow"), written.schema) as writer:
        writer.write_table(written, max_chunksize=3)
    return verified("t.arrow")


def settings(folder: Path) -> Door:
    """A stage whose data are not there, so that even an unharmed one ends before any model."""
    tree = {
        "output_dir": str(folder / "run"),
        "student": {"checkpoint": str(folder / "none")},
        "data": {"path": str(folder / "none.json"), "images": str(folder), "max_length": 512},
        "objective": {"cross_entropy": {"weight": 1.0}, "response_kl": {"weight": 0.5, "temperature": 2.0}},
        "optim": {"lr": 1.0e-3, "lr_by_part": {"language_model": 2.0e-5}},
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "trainable": ["multi_modal_projector"],
        "evaluate": {"every": 10},
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(tree))

    def read(folder: Path) -> None:
        assert main(["train", str(folder / "stage.yaml")]) == 2

    return Door(["stage.yaml"], read)


def checkpoints(folder: Path) -> Door:
    def of(folder: Path) -> Checkpoints:
        return Checkpoints(folder, keep=2, identity={"data": "a"})

    def state(step: int) -> dict[str, torch.Tensor]:
        return {"parameter/w": torch.arange(12.0).view(3, 4) + step, "m/w": torch.full((7,), 0.5 * step)}

    for step in (2, 4):
        of(folder).save(Saved(step=step, state=state(step), figures={"loss/x": 0.1 * step}))

    def read(folder: Path) -> None:
        with suppress(ValueError):
            saved, problems = of(folder).load_newest()
            assert saved is not None
            assert saved.step == 4 or (saved.step == 2 and problems)
            expected = state(saved.step)
            assert saved.state.keys() == expected.keys()
            assert all(torch.equal(saved.state[name], tensor) for name, tensor in expected.items())
            assert saved.figures == {"loss/x": 0.1 * saved.step}

    return Door(["step-00000004/state.safetensors", "step-00000004/trainer.json"], read)


def manifests(folder: Path) -> Door:
    contents = Contents(mode="hidden", places=("response", "visual"), projected=True)
    written = Manifest(
        identity={"teacher": "abc", "data": "def"},
        contents=contents,
        num_records=24,
        is_complete=True,
        num_bad=1,
        shards={"00000.safetensors": 4096},
        checksums={"index.safetensors": 77},
    )
    written.write(folder)

    def read(folder: Path) -> None:
        with suppress(ValueError):
            assert Manifest.read(folder) == written

    return Door(["manifest.json"], read)


DOORS: dict[str, tuple[Callable[[Path], Door], int]] = {
    "pictures": (pictures, 2500),
    "records": (records, 1000),
    "lines": (lines, 500),
    "shards": (shards, 1000),
    "parquet": (parquet, 1000),
    "arrow": (arrow, 1000),
    "settings": (settings, 1000),
    "checkpoints": (checkpoints, 1500),
    "manifests": (manifests, 500),
}


def child(door: Door, seeds: Sequence[int], folder: Path, told: Path) -> None:
    """Damage, read, mend; a line for each that was begun, and one for each that went wrong.

    The folder has another name each time, and the file is a new one: a reader may keep what it opened.
    """
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, mapped + MOST_BYTES))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    whole = {name: (folder / name).read_bytes() for name in door.files}
    with told.open("a", buffering=1) as stream:
        for seed in seeds:
            rng = random.Random(seed)
            name = rng.choice(list(whole))
            stream.write(f"{seed}\n")
            folder = folder.rename(folder.with_name(f"{seed}"))
            replace(folder / name, damaged(whole[name], rng))
            try:
                door.read(folder)
            except BaseException as error:
                said = " ".join(str(error).split())[:200]
                stream.write(f"{seed} {name}: {type(error).__name__}: {said}\n")
            replace(folder / name, whole[name])


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def wrong(make: Callable[[Path], Door], count: int, folder: Path) -> list[str]:
    """What went wrong, in order; of a child that died the seed that it had begun, and the rest go on."""
    found: list[str] = []
    told, seeds = folder / "told.txt", list(range(count))
    while seeds:
        told.write_text("")
        files = folder / f"from{seeds[0]}" / "files"
        files.mkdir(parents=True)
        door = make(files)
        pid = os.fork()
        if pid == 0:
            try:
                child(door, seeds, files, told)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = told.read_text().splitlines()
        found += [line for line in said if " " in line]
        last = int(said[-1].split()[0])
        if status != 0:
            found.append(f"{last} ended its reader with {status}")
        seeds = seeds[seeds.index(last) + 1 :]
    return found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_KD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", DOORS)
def test_an_unharmed_file_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    DOORS[name][0](tmp_path / "files").read(tmp_path / "files")


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_no_damage_is_fatal_or_silent(name: str, tmp_path: Path) -> None:
    make, count = DOORS[name]
    assert wrong(make, count, tmp_path) == []


def test_what_goes_wrong_is_named(tmp_path: Path) -> None:
    """The instrument itself: a reader that raises, and one that ends its process."""
    whole = b"a file of some length, so that most damages change it"

    def make(folder: Path) -> Door:
        (folder / "file").write_bytes(whole)
        return Door(["file"], read)

    def read(folder: Path) -> None:
        data = (folder / "file").read_bytes()
        if len(data) < len(whole) - 30:
            os.kill(os.getpid(), signal.SIGKILL)
        assert data[:9] == whole[:9], "another beginning"

    found = wrong(make, 60, tmp_path)
    assert any("ended its reader with -9" in line for line in found)
    assert any("another beginning" in line for line in found)
