"""The loss benchmarks run, and their ways to compute a loss agree; sizes are tiny, figures mean nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import loss_head
import make_docs
import relation as relation_benchmark
from _head_losses import Case, make_case, naive, ours, recompute
from loss_head import exact_gradients, near, step


def tiny_case(**options: object) -> Case:
    sizes = {"rows": 300, "widths": (8, 12), "vocabularies": (50, 60), "num_response": 70, "num_common": 45}
    return make_case(**(sizes | {"dtype": torch.float32, "device": "cpu"} | options))


@pytest.mark.parametrize("num_response", [0, 70])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_ways_to_compute_the_loss_agree(num_response: int, frozen_head: bool):
    case = tiny_case(num_response=num_response, frozen_head=frozen_head)
    expected, values = step(naive, case)(), naive(case)
    for way in (ours(), ours(chunk_rows=100), recompute):
        torch.testing.assert_close(way(case), values)
        for got, want in zip(step(way, case)(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distance", [None, 0.1])
def test_exact_gradient_is_that_of_the_naive_loss(distance: float | None):
    case = tiny_case(vocabularies=(50, 50), widths=(8, 8), num_common=50, num_response=0)
    case = case if distance is None else near(case, distance)
    kl, exact = exact_gradients(case)
    assert kl == pytest.approx(float(naive(case).detach()), rel=1e-4)
    for got, want in zip(torch.autograd.grad(naive(case), case.leaves), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


def run(module: object, name: str, path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--json", str(path), *flags])
    module.main()
    written = json.loads(path.read_text())
    assert {"date", "commit", "hardware", "versions"} <= written["meta"].keys()
    return written


def test_head_benchmark_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"rows": 20, "num_response": 5, "widths": (8, 12), "vocabularies": (50, 60), "num_common": 45}
    monkeypatch.setattr(loss_head, "SHAPES", {"cpu": (loss_head.Shape(name="tiny", **sizes),)})
    monkeypatch.setattr(loss_head, "plain_losses", lambda _: {"ours": ours(), "naive": naive})
    monkeypatch.setattr(loss_head, "error_rows", lambda *_, **__: [])
    rows = run(loss_head, "loss_head.py", tmp_path / "out.json", monkeypatch)["rows"]
    assert [row["impl"] for row in rows] == ["matrix products alone", "ours", "naive"]
    assert all(row["seconds"] > 0 and row["ratio_to_gemms"] > 0 for row in rows)


def test_relation_benchmark_writes_small_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = ("--images", "2", "--tokens", "20", "--vocabulary", "300")
    rows = run(relation_benchmark, "relation.py", tmp_path / "out.json", monkeypatch, *flags)["rows"]
    assert [row["impl"] for row in rows] == ["materialised", "Gram"] * 2
    assert all(row["dh_error"] < 1e-4 for row in rows)
    assert all(row["dw_error"] < 1e-4 for row in rows if "moving" in row["case"])


def test_performance_page_is_what_the_results_give():
    for path, text in make_docs.pages().items():
        assert path.read_text() == text, f"{path.name}: run python benchmarks/make_docs.py"
