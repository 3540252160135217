"""A cache that two ranks write, and two ranks train from, says what the live teacher says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.distributed

ENGINES = {name: ranks.ENGINES[name] for name in ("ddp", "fsdp2", "zero2", "zero3")}
TERMS = ("loss", "cross_entropy", "response_kl", "visual_kl", "relation", "grad_norm")
TERMS += ("teacher_cross_entropy",)


def metrics(output: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line[term] for term in TERMS] for line in lines]


def write(config: Path, cache: Path, *words: str, count: int) -> str:
    """`cache-teacher` on `count` ranks, a file for each record; what rank 0 said."""
    command = ["cache-teacher", str(config), f"--out={cache}", "--shard_mb=0", *words]
    ended = ranks.Ranks(command, cache.with_name(f"{cache.name}-logs"), ranks=count).wait()
    assert set(ended.codes) == {0}, ended.log
    return ended.logs[0]


def needs(kind: str) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")


def same(output: Path, live: Path) -> None:
    for got, want in zip(metrics(output), metrics(live), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.fixture
def config(stage: Callable[..., Path]) -> Path:
    return stage("run", engine="auto", micro_batch_size=1)


@pytest.mark.parametrize("placement", ["replicated", "fsdp"])
def test_two_ranks_write_and_every_engine_trains_from_one_cache(
    config: Path, tmp_path: Path, placement: str
) -> None:
    cache = tmp_path / "cache"
    write(config, cache, f"--teacher.placement={placement}", count=2)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert len(manifest["shards"]) == manifest["num_records"]
    live = tmp_path / "live"
    ranks.train(config, live)
    for kind, words in ENGINES.items():
        if placement == "fsdp" and kind != "ddp":  # the same bytes, read once more
            continue
        needs(kind)
        ranks.train(config, tmp_path / kind, f"--teacher.cache={cache}", *words, ranks=2)
        same(tmp_path / kind, live)


def test_a_cache_begun_on_two_ranks_goes_on_with_one_and_back(config: Path, tmp_path: Path) -> None:
    """As if each time the writing had been broken off with the last third of the records to do."""
    cache = tmp_path / "cache"
    write(config, cache, count=2)
    shards = sorted((cache / "shards").iterdir())
    for count in (1, 2):
        for path in sorted((cache / "shards").iterdir())[-(len(shards) // 3) :]:
            path.unlink()
        assert f"{len(shards) - len(shards) // 3} of {len(shards)} records are stored" in write(
            config, cache, count=count
        )
    ranks.train(config, tmp_path / "live")
    ranks.train(config, tmp_path / "cached", f"--teacher.cache={cache}", "--engine.kind=ddp", ranks=2)
    same(tmp_path / "cached", tmp_path / "live")


def test_a_run_from_a_cache_goes_on_under_other_engines_on_other_numbers_of_ranks(
    config: Path, tmp_path: Path
) -> None:
    """One step on one rank, one under ZeRO-3 on two, one under FSDP2."""
    needs("zero3")
    cache, output = tmp_path / "cache", tmp_path / "moved"
    write(config, cache, count=1)
    ranks.train(config, tmp_path / "live")
    cached = f"--teacher.cache={cache}"
    ranks.train(config, output, cached, environment={"STOP_AFTER": "1"})
    ranks.train(config, output, cached, *ENGINES["zero3"], ranks=2, environment={"STOP_AFTER": "2"})
    ended = ranks.train(config, output, cached, *ENGINES["fsdp2"], ranks=2)
    assert "resuming from step 2" in ended.logs[0]
    same(output, tmp_path / "live")
