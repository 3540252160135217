"""Scripts of proofs that no other test runs: their data are drawn, and are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_records_of_the_selection_proof_are_drawn(tmp_path: Path) -> None:
    script = ROOT / "scripts/methods/miniplm/make_data.py"
    words = [str(tmp_path), "--records", "4", "--test", "2"]
    subprocess.run([sys.executable, str(script), *words], check=True, timeout=120)
    records = json.loads((tmp_path / "train.json").read_text())
    assert sorted(r["kind"] for r in records) == ["easy"] * 4 + ["hard"] * 4 + ["noise"] * 4
    for record in records:
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 3
        with Image.open(tmp_path / record["image"]) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 2  # shapes, not one colour


def test_every_arm_of_the_peers_moves_both_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/methods/peer"))
    import proof  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(proof, "EPOCHS", 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(proof.FEW, 1, proof.SIDE, proof.SIDE, generator=generator)
    few = images, torch.randint(0, proof.CLASSES, (proof.FEW,), generator=generator)
    weights = {}
    for arm, terms in proof.ARMS.items():
        models = proof.one_arm(terms, few, 0)
        weights[arm] = [model.head.weight.detach() for model in models]
    for arm in proof.ARMS:
        for ours, alone in zip(weights[arm], weights["independent"], strict=True):
            assert torch.isfinite(ours).all()
            assert torch.equal(ours, alone) == (arm == "independent")
