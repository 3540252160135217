"""What the pages show works: code blocks run, YAML blocks fit the recipes, README's words are understood."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from extending_page import PLUGINS, write_plugins

from llava_kd.assembly.settings import load, stage
from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.config import TrainConfig
from llava_kd.config.describe.tree import walk
from llava_kd.models.mllm import Prediction

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CHANGELOG.md", "data/README.md", "eval/README.md"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
STAGES = ("stage1_dpt", "stage2_sft", "stage3_dft")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def yaml_blocks() -> list[str]:
    return [block for page in PAGES for block in blocks(page, "yaml")]


def settings(section: type) -> set[str]:
    """Dotted names of every setting."""
    return {re.sub(r"\[\]|\.NAME", "", setting.key) for setting in walk(section)}


def test_the_settings_that_the_pages_name_exist() -> None:
    known = settings(stage())
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = set(re.findall(rf"(?<![\w./-])(?:--)?((?:{sections})(?:\.[a-z_]+)+)(?=[`:= ,;)])", text))
        files = {name for name in named if name.rpartition(".")[2] in ("py", "json", "jsonl", "yaml")}
        assert named - files <= known, page
    assert {"objective.relation.tap", "data.packing.max_tokens", "checkpoint.best"} <= known


@pytest.fixture
def example() -> dict[str, object]:
    """What the snippets find already made: a prediction over one row with one image, its batch and counts."""
    ids_BT = torch.arange(8).view(1, 8)
    visual_BT = torch.tensor([[False, True, True, True, False, False, False, False]])
    labels_BT = torch.where(ids_BT > 4, ids_BT, IGNORE_INDEX)
    inputs = Inputs(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=ids_BT,
        segment_ids_BT=torch.ones_like(ids_BT),
        visual_BT=visual_BT,
        pixels_ICHW=torch.zeros(1, 3, 8, 8),
        image_is_valid_I=torch.tensor([True]),
    )
    batch = Batch(student=inputs, record_ids=("one",))
    prediction = Prediction(
        hidden_BTD=torch.randn(1, 8, 4),
        projected_IND=torch.randn(1, 3, 4),
        head_VD=torch.randn(9, 4),
        bias_V=None,
    )
    return {"prediction": prediction, "batch": batch, "counts": batch.counts()}


SNIPPETS = [code for code in blocks("docs/extending.md", "python") if code not in PLUGINS.values()]


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.split("\n")[-2])
def test_a_worked_change_runs(code: str, example: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/extending.md", "exec"), dict(example))


@pytest.mark.parametrize("text", yaml_blocks(), ids=lambda text: text.split(":")[0])
def test_a_worked_setting_fits_the_recipe(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugins(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree, shown = yaml.safe_load((ROOT / "scripts/stage1_dpt.yaml").read_text()), yaml.safe_load(text)
    if "data" in shown:  # shown in part
        kept = () if "sources" in shown["data"] else ("path", "images")
        shown["data"] |= {key: tree["data"][key] for key in kept}
    tree |= shown
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(tree))
    assert isinstance(load(tmp_path / "stage.yaml"), TrainConfig)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs write them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    words = [re.sub(r"[`*\[\]]|\(.*?\)", "", line).lower() for line in re.findall(r"^#+ (.*)", text, re.M)]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", word)).strip("-") for word in words}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not heading or heading in anchors(found), target
        if page.parent.name in ("docs", "methods"):
            assert ROOT / "docs" in found.resolve().parents, f"{target} is no page of the site"


def readme_commands() -> list[str]:
    text = "".join(blocks("README.md", "bash"))
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_names_what_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "bash":
        script = ROOT / words[1]
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        if script.stem in STAGES:
            assert isinstance(load(script.with_suffix(".yaml"), words[2:]), TrainConfig)
    else:
        assert words[:2] == ["pip", "install"]


def test_every_override_in_the_readme_is_a_setting() -> None:
    cells = re.findall(r"`(--[a-z_.]+=[^`]*)`", (ROOT / "README.md").read_text())
    assert len(cells) >= 6
    for cell in cells:
        overrides = [word for word in shlex.split(cell) if "=..." not in word and word != "--a.b=value"]
        assert isinstance(load(ROOT / "scripts/stage1_dpt.yaml", overrides), TrainConfig)
