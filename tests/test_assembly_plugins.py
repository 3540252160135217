"""A plug-in is what a user names and nothing else; each that cannot serve is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from extending_page import write_plugins

from llava_kd.assembly.plugins import OURS, with_plugins
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.config import dump
from llava_kd.plugin_file import find

TEMPLATE = """
from llava_kd.data.text.template import Template
TEMPLATES = {"mine": Template(name="mine")}
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", "cannot be imported: ModuleNotFoundError: No module named"),
        ("x = (1,\ny = 2", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('a\\nb')", r"cannot be imported: RuntimeError: a b \(line 1 of odd.py\)"),
        ("import sys; sys.exit(3)", r"cannot be imported: SystemExit: 3 \(line 1"),
        ("x = 1", "must define a table, but has none; add one of TERMS, TOWERS, SOURCES, TEMPLATES"),
        ("TERMS = []", r"TERMS must be a dict of names and values; got \[\]"),
        ("TERMS = {}", "TERMS must be a dict of names and values"),
        ("TERMS = {'mine': 1}", r"TERMS\['mine'\] must be a class of .*Term; got 1"),
        ("TERMS = {'relation': 1}", "TERMS must not reuse the existing name 'relation'; choose another name"),
        ("TERMS = {'my term': 1}", r"TERMS\['my term'\] must have a name of letters"),
        ("TOWERS = {'mine': int}", r"TOWERS\['mine'\] must be a .*Family; got <class 'int'>"),
        ("SOURCES = {'.tar': 1}", "SOURCES must not reuse the existing name '.tar'"),
        ("SOURCES = {'.tar.gz': 1}", r"must have a suffix such as '\.csv' as its key"),
        (TEMPLATE.replace('"mine":', '"yours":'), r"\['yours'\] must have its own name as its key: 'mine'"),
        (TEMPLATE.replace("mine", "vicuna"), "TEMPLATES must not reuse the existing name 'vicuna'"),
        (TEMPLATE.replace("mine", "auto"), r"TEMPLATES\['auto'\] must not be named auto"),
        (TEMPLATE.replace("TEMPLATES", "TEMPLATE"), "defines TEMPLATE; rename it to TEMPLATES"),
        ("BENCHMARKS = {'pope': 1}", "BENCHMARKS must not reuse the existing name 'pope'"),
        ("BENCHMARKS = {'mine': 1}", r"BENCHMARKS\['mine'\] must be a .*Benchmark; got 1"),
    ],
)  # fmt: skip
def test_a_plug_in_that_cannot_serve_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    name = write(tmp_path / "odd.py", text)
    with pytest.raises(ValueError, match=message) as raised:
        with_plugins([name])
    assert str(raised.value).startswith(f"plug-in {name}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "none.py",
            "is not there: no file .*none.py; a path starts from the working directory",
        ),
        ("no_module_of_this", "is not there: no module of that name can be imported"),
        ("no_package.of_this", "cannot be imported: ModuleNotFoundError"),
        ("https://example.org/a", "is neither a path that ends in .py nor the name of a module"),
        ("my_terms", "no module of that name"),
        ("llava_kd.distill.terms", "is a module of this package"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name)


def test_two_plug_ins_may_not_hold_one_name(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{n}.py", TEMPLATE + f"N = {n!r}") for n in ("a", "b")]
    with pytest.raises(
        ValueError, match=r"plug-in .*b\.py: TEMPLATES must not reuse the existing name 'mine'"
    ):
        with_plugins(names)


def test_a_module_and_a_package_serve_as_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "a_module_of_mine.py", TEMPLATE)
    (tmp_path / "a_package_of_mine").mkdir()
    write(tmp_path / "a_package_of_mine" / "__init__.py", TEMPLATE.replace("mine", "other"))
    before = find("a_package_of_mine").sha256
    tables = with_plugins(["a_module_of_mine", "a_package_of_mine"])
    assert {"mine", "other"} <= tables.templates.keys()
    write(tmp_path / "a_package_of_mine" / "more.py", "")
    assert find("a_package_of_mine").sha256 != before  # all of a package counts


def test_the_content_is_the_module_and_a_change_meanwhile_is_named(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.py", TEMPLATE)
    plugin = find(name)
    assert plugin.module() is find(name).module()
    write(tmp_path / "mine.py", TEMPLATE + "# more")
    with pytest.raises(ValueError, match="changed while the run uses it"):
        plugin.module()
    assert find(name).module() is not None


def test_importing_the_file_alone_registers_nothing(tmp_path: Path) -> None:
    find(write(tmp_path / "mine.py", TEMPLATE)).module()
    assert "mine" not in OURS.templates
    assert "mine" not in with_plugins([]).templates


def test_nothing_is_run_that_the_settings_do_not_name(stage: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "mine.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n{TEMPLATE}")
    config = stage("run")
    load(config)
    assert not (tmp_path / "ran").exists()
    load(config, [f"--plugins=[{tmp_path / 'mine.py'}]"])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["mine.py", "[1]", "[[a]]", "{a: b}"])
def test_plugins_is_a_list_of_names(stage: Callable[..., Path], value: str) -> None:
    with pytest.raises(ValueError, match="plug"):
        load(stage("run"), [f"--plugins={value}"])


def test_settings_with_plug_ins_come_back_as_they_were(stage: Callable[..., Path], tmp_path: Path) -> None:
    pages = write_plugins(tmp_path)
    objective = {"cross_entropy": {}, "mapped_states": {"margin": 0.25}}
    config = load(stage("run", plugins=[pages["my_terms.py"]], objective=objective))
    (tmp_path / "again.yaml").write_text(dump(config))
    again = load(tmp_path / "again.yaml")
    assert again == config
    assert vars(again.objective.terms["mapped_states"])["margin"] == 0.25


def test_a_setting_of_a_term_out_of_its_range_is_named(stage: Callable[..., Path], tmp_path: Path) -> None:
    pages = write_plugins(tmp_path)
    config = stage("run", plugins=[pages["my_terms.py"]], objective={"mapped_states": {"margin": "much"}})
    with pytest.raises(ValueError, match=r"objective\.mapped_states\.margin` must be a number"):
        load(config)


def test_a_run_tells_its_plug_ins_and_check_does(
    stage: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(tmp_path / "mine.py", TEMPLATE)
    config = stage("run", plugins=[name], max_steps=1)
    assert main(["check", str(config)]) == 0
    sha = find(name).sha256
    assert f"plug-in          {name}, sha256 {sha[:16]}" in capsys.readouterr().out
    assert main(["train", str(config)]) == 0
    output = config.with_suffix("")
    assert json.loads((output / "plugins.json").read_text()) == {f"plug-in {name}": sha}
    assert json.loads((output / "run.json").read_text())["fingerprints"][f"plug-in {name}"] == sha
    write(tmp_path / "mine.py", TEMPLATE + "# more")
    assert main(["train", str(config)]) == 2
    assert f"plug-in {name} changed since the run in {output} started" in capsys.readouterr().err


def test_help_does_not_wait_for_the_tables() -> None:
    code = "import sys; from llava_kd.cli.main import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
