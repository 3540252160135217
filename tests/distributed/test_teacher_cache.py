"""A cache that two ranks write, and two ranks train from, says what the live teacher says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed

TERMS = ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "teacher_cross_entropy")


def metrics(output: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line[term] for term in TERMS] for line in lines]


@pytest.mark.parametrize("placement", ["replicated", "fsdp"])
def test_two_ranks_write_and_train_from_one_cache(
    stage: Callable[..., Path], tmp_path: Path, placement: str
) -> None:
    config, cache = stage("run", engine="auto", micro_batch_size=1), tmp_path / "cache"
    words = [
        "cache-teacher",
        str(config),
        f"--out={cache}",
        f"--teacher.placement={placement}",
        "--shard_mb=0",
    ]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2).wait()
    assert set(ended.codes) == {0}, ended.log
    manifest = json.loads((cache / "manifest.json").read_text())
    assert len(manifest["shards"]) == manifest["num_records"]
    live = tmp_path / "live"
    ranks.train(config, live)
    for kind in ("ddp", "fsdp2"):
        output = tmp_path / kind
        ranks.train(config, output, f"--teacher.cache={cache}", f"--engine.kind={kind}", ranks=2)
        for got, want in zip(metrics(output), metrics(live), strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
