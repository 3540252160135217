"""Every suffix of a data file is decided in one table, which the docs name whole."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from data_samples import entry, write_dataset

from llava_kd.data.sources.kinds import SOURCES, Place, kind_of, open_source
from llava_kd.data.sources.llava_json import LlavaJson

ROOT = Path(__file__).parents[1]


def test_no_other_file_of_the_package_decides_by_the_suffix_of_data() -> None:
    """A suffix of tables or shards stands as a word of code in the table alone."""
    decided = {suffix for suffix, kind in SOURCES.items() if kind.holds_images}
    for path in (ROOT / "llava_kd" / "assembly").rglob("*.py"):
        compared = {
            leaf.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Compare)
            for leaf in ast.walk(node)
            if isinstance(leaf, ast.Constant) and leaf.value in decided
        }
        assert not compared, f"{path} decides by {compared}; data/sources/kinds.py is the place"


def test_the_page_of_data_names_every_suffix() -> None:
    said = (ROOT / "data" / "README.md").read_text().split("is read by its suffix:")[1].split("and any")[0]
    assert re.findall(r"`(\.[a-z]+)`", said) == list(SOURCES)


@pytest.mark.parametrize("suffix", SOURCES)
def test_a_pattern_that_matches_nothing_is_refused_by_every_kind(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches no file|no data file"):
        open_source(Place(path=str(tmp_path / f"none{suffix}")))


@pytest.mark.parametrize("suffix", [s for s, kind in SOURCES.items() if kind.holds_images])
def test_images_beside_a_file_that_holds_them_are_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds its images; remove `images`"):
        open_source(Place(path=str(tmp_path / f"a{suffix}"), images=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.json", "a", "a.data"])
def test_any_other_suffix_is_llava_json(name: str, tmp_path: Path) -> None:
    made = write_dataset(tmp_path, [entry(0)]).rename(tmp_path / name)
    assert kind_of(str(made)).is_llava
    assert isinstance(open_source(Place(path=str(made))), LlavaJson)


def test_a_table_handed_down_is_asked_before_the_fallback(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([entry(0, images=0)]))
    other = dict(SOURCES) | {".talk": SOURCES[".json"]}
    made = path.rename(tmp_path / "a.talk")
    assert len(open_source(Place(path=str(made)), other)) == 1
    assert ".talk" not in SOURCES
