"""`llava-kd push` against a hub on this machine: what arrives, and what is refused unsent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants

from llava_kd.cli import main
from llava_kd.models.files.export import export

REPO = "somebody/small-llava"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, student_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    scores = folder / "test" / "summary.json"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"accuracy": 0.72159, "count": 1200}))
    export(student_dir, folder / "out", scores=[scores])
    return folder / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One that a user with a token reaches; xet is off, for that protocol has servers of its own."""
    with serving() as one:
        monkeypatch.setattr(constants, "ENDPOINT", one.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield one


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    def run(*words: str | Path) -> str:
        assert main(["push", *map(str, words)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("llava-kd push: ")
        return said

    return run


def test_every_file_arrives_as_it_is_and_the_card_tells_the_scores(
    exported: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(exported), REPO, "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/{REPO}\n"
    assert hub.private == {REPO: True}
    assert hub.repos[REPO] == {path.name: path.read_bytes() for path in exported.iterdir()}
    card = ModelCard(hub.repos[REPO]["README.md"].decode())
    (result,) = card.data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("test", "accuracy", 0.7216)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert "| test | 0.7216 | 1200 |" in card.text


def test_an_export_that_is_not_whole_is_refused_unsent(
    exported: Path, hub: Hub, refused, tmp_path: Path
) -> None:
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "README.md").write_bytes(b"\xff")
    assert "has no scores" in refused(broken, REPO)
    (broken / "model.safetensors").unlink()
    assert "has no weights (.safetensors or .gguf)" in refused(broken, REPO)
    assert not hub.repos


def test_the_same_command_after_a_broken_one_sends_no_weights_again(
    exported: Path, hub: Hub, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuse = 403
    said = refused(exported, REPO)
    assert f"{REPO} was not pushed to {hub.address}: " in said
    assert said.endswith("Run the same command again to continue")
    assert hub.repos[REPO] == {}
    hub.refuse, hub.sent = 0, []
    assert main(["push", str(exported), REPO]) == 0
    assert "model.safetensors" in hub.repos[REPO]
    assert not [request for request in hub.sent if request.startswith("PUT")]


def test_nothing_is_sent_without_scores_an_export_or_a_token(
    exported: Path, student_dir: Path, hub: Hub, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(student_dir, tmp_path / "unscored")
    assert "has no scores, so its quality is unknown" in refused(tmp_path / "unscored", REPO)
    assert "is no export; write one first" in refused(student_dir, REPO)
    assert "is no export; write one first" in refused(tmp_path / "none", REPO)
    assert "Repo id must" in refused(exported, "a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing is sent" in refused(exported, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "needs a token with write permission" in refused(exported, REPO)
    assert hub.sent == []


def test_a_wrong_token_and_a_hub_that_is_not_there_are_one_line(
    exported: Path, hub: Hub, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "401" in refused(exported, REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "was not pushed to http://127.0.0.1:1: " in refused(exported, REPO)
