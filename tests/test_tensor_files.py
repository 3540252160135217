"""Model files on full disks and under other umasks, in a process whose files may not grow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava

from llava_kd import tensor_files
from llava_kd.models.files.checkpoint import load_stock, save_stock
from llava_kd.models.files.export import export
from llava_kd.tensor_files import write_tensors
from llava_kd.training.checkpoint import Checkpoints, Saved

FULL = """
import json, resource, sys
from llava_kd.assembly.checkpoints import export_to
from llava_kd.models.files.checkpoint import load_stock, save_stock
source, out, what = sys.argv[1:4]
parts = load_stock(source)
said = []
for bound in map(int, sys.argv[4:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.RLIM_INFINITY))
    try:
        if what == "export":
            export_to(source, f"{out}{bound}", dtype=None, scores=())
        else:
            save_stock(parts, f"{out}{bound}")
        said.append([False, "written"])
    except BaseException as error:
        said.append([isinstance(error, (OSError, ValueError)), repr(error)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(said))
"""


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_the_umask_says_who_reads_what_is_written(tmp_path: Path, student_dir: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_stock(load_stock(str(student_dir)), tmp_path / "model")
        export(tmp_path / "model", tmp_path / "export")
        state = {"weight": torch.ones(2)}
        Checkpoints(tmp_path / "checkpoints", keep=1).save(Saved(step=1, state=state))
    finally:
        os.umask(before)
    assert modes(tmp_path) == {0o666 & ~umask}


@pytest.mark.parametrize("what", ["model", "export"])
def test_a_full_disk_is_an_error_that_every_rank_stops_for(tmp_path: Path, what: str) -> None:
    """At whichever file it fills: `World.together` knows ValueError and OSError alone."""
    source = make_tiny_llava(tmp_path / "source", layers=1)
    largest = max(path.stat().st_size for path in source.iterdir())
    tokenizer = (source / "tokenizer.json").stat().st_size
    bounds = [0, 300, tokenizer // 2, tokenizer - 10, largest // 2, largest - 100]
    words = [FULL, str(source), str(tmp_path / "out"), what, *map(str, bounds)]
    done = ranks.Ranks(words, tmp_path / ".logs", function=ranks.execute).wait()
    assert done.codes == (0,), done.log
    for bound, (is_known, said) in zip(bounds, json.loads(done.log.splitlines()[-1]), strict=True):
        assert is_known, (bound, said)
        assert "File too large" in said, (bound, said)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["source"]


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.nn.Parameter(torch.ones(2))}
    write_tensors(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    back = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_no_other_file_writes_tensors() -> None:
    package = Path(tensor_files.__file__).parent
    writers = [path.name for path in package.rglob("*.py") if "save_file" in path.read_text()]
    assert writers == ["tensor_files.py"]
