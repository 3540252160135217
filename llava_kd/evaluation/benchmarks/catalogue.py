"""Every benchmark by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_kd.evaluation.benchmarks.base import Benchmark
from llava_kd.evaluation.benchmarks.further import seed_bench
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
from llava_kd.evaluation.benchmarks.published import AVG10

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
# Not of the paper: each a file in `further/`, asked for by name alone.
FURTHER = (seed_bench.BENCHMARK,)
BENCHMARKS: Mapping[str, Benchmark] = {b.name: b for b in (*PAPER, *OTHER_SPLITS, *FURTHER)}


def find(names: str | Sequence[str], table: Mapping[str, Benchmark] = BENCHMARKS) -> list[Benchmark]:
    """Those of `table` by "pope,gqa", or a list of names; or "all" (the ten)."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if wanted == ["all"]:
        return list(PAPER)
    if unknown := [name for name in wanted if name not in table]:
        raise ValueError(
            f"no benchmark {', '.join(map(repr, unknown))}; the ten are {', '.join(b.name for b in PAPER)}, "
            f"others {', '.join(name for name in table if name not in AVG10)}"
        )
    return [table[name] for name in dict.fromkeys(wanted)]
