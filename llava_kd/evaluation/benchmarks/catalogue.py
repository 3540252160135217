"""Every benchmark by name."""

from __future__ import annotations

from collections.abc import Sequence

from llava_kd.evaluation.benchmarks.base import Benchmark
from llava_kd.evaluation.benchmarks.paper import (
    gqa,
    mmbench,
    mme,
    mmmu,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)

# The ten of the paper, in the order of its table.
PAPER = (
    vqav2.TEST,
    gqa.BENCHMARK,
    vizwiz.TEST,
    scienceqa.BENCHMARK,
    textvqa.BENCHMARK,
    mme.BENCHMARK,
    mmbench.DEV,
    mmbench.DEV_CN,
    pope.BENCHMARK,
    mmmu.BENCHMARK,
)
OTHER_SPLITS = (vqav2.VAL, vizwiz.VAL, mmbench.TEST, mmbench.TEST_CN)
BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (*PAPER, *OTHER_SPLITS)}


def find(names: str | Sequence[str]) -> list[Benchmark]:
    """Benchmarks of "pope,gqa", of a list of names, or of "all" (the ten)."""
    wanted = names.split(",") if isinstance(names, str) else list(names)
    if wanted == ["all"]:
        return list(PAPER)
    if unknown := [name for name in wanted if name not in BENCHMARKS]:
        raise ValueError(
            f"no benchmark {', '.join(map(repr, unknown))}; the ten are {', '.join(b.name for b in PAPER)}, "
            f"other splits {', '.join(b.name for b in OTHER_SPLITS)}"
        )
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]
