"""`llava-kd recipes`: what is listed is there, is one with scripts/, loads as copied, and is in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llava_kd.assembly.pipeline import read_pipeline
from llava_kd.assembly.projects.recipes import FOLDER, RECIPES, copy, files
from llava_kd.assembly.settings import load
from llava_kd.cli import main

ROOT = Path(__file__).parents[1]
IN_SCRIPTS = {file.resolve() for file in (ROOT / "scripts").rglob("*") if file.suffix in (".yaml", ".sh")}


def test_every_recipe_is_listed_and_every_file_stands_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(RECIPES)
    assert main(["recipes", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)
    shipped = [file for name in RECIPES for file in files(name)]
    for file in shipped:
        assert file.is_symlink() == (file.parent.name != "small"), f"{file} is a second copy"
        assert file.is_symlink() <= (file.resolve() in IN_SCRIPTS)
    assert len({file.resolve() for file in shipped}) == len(shipped)


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_loads_is_the_users_own_and_its_comments_name_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["recipes", "copy", name, str(out)]) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [path.name for path in files(name)]
    for source in files(name):
        made = out / source.name
        assert not made.is_symlink()
        assert f"scripts/{made.name}" not in made.read_text()
        if made.name == "pipeline.yaml":
            pipeline = read_pipeline(made)
            assert {stage.path.parent for stage in pipeline.stages} == {out}
            assert f"llava-kd run {made}" in said
            if name == "paper":
                assert pipeline.command == ("bash", str(out / "train.sh"))
                done = subprocess.run(["bash", "-n", str(out / "train.sh")], check=False)
                assert done.returncode == 0
        elif made.suffix == ".yaml":
            assert load(made) == load(source)


def test_a_wrong_name_or_a_taken_folder_is_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stage1_dpt.yaml").write_text("my own")
    assert main(["recipes", "copy", "paper", str(tmp_path / "mine")]) == 2
    assert "is not empty; name a new directory" in capsys.readouterr().err
    assert main(["recipes", "copy", "../paper", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava-kd recipes copy: no recipe '../paper'; choose one of paper, small"), said
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "stage1_dpt.yaml"]
    assert (tmp_path / "mine" / "stage1_dpt.yaml").read_text() == "my own"


@pytest.mark.slow
def test_a_wheel_holds_the_text_of_every_recipe_and_copies_it(tmp_path: Path) -> None:
    """Built from a tree with its links as they are, and read where there is no checkout."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "backbones")
    for name in ("llava_kd", "scripts"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    environment = {**os.environ, "CC": "false"}
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(source / done.stdout.splitlines()[-1]) as wheel:
        assert not [info for info in wheel.infolist() if info.external_attr >> 28 == 0xA], "links"
        wheel.extractall(installed)
    shutil.rmtree(source)
    for name in RECIPES:
        code = f"from llava_kd.assembly.projects.recipes import copy; copy({name!r}, {name!r})"
        start = f"import sys; sys.path.insert(0, {str(installed)!r}); import llava_kd; {code}"
        start += f"; assert llava_kd.__file__.startswith({str(installed)!r})"
        subprocess.run([sys.executable, "-P", "-c", start], cwd=tmp_path, check=True)
        copy(name, tmp_path / "expected" / name)
        for file in files(name):
            text = (tmp_path / name / file.name).read_text()
            assert text == (tmp_path / "expected" / name / file.name).read_text().replace(
                str(tmp_path / "expected") + "/", ""
            )
