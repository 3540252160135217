"""The arms of the proof: record lists of each, and the table of what came out.

python arms.py lists RUN --seeds 0 1 2     RUN/lists/ARMn.json from RUN/scores
python arms.py table RUN --seeds 0 1 2     RUN/table.md and RUN/results.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from llava_kd.data.record_lists import read_lists, write_lists
from llava_kd.search.findings.statistics import Estimate, estimate, paired

ARMS = {
    "random": "half of the records, drawn",
    "select": "the half of the highest scores",
    "inverted": "the half of the lowest scores",
    "oracle": "as many, drawn from those without noise",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["lists", "table"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    {"lists": write_arms, "table": write_table}[arguments.what](arguments.run, arguments.seeds)


def write_arms(run: Path, seeds: list[int]) -> None:
    (chosen,) = read_lists(run / "scores" / "chosen.json")
    kinds = [record["kind"] for record in json.loads((run / "data" / "train.json").read_text())]
    scores = [
        json.loads(line)["score"] for line in (run / "scores" / "scores.jsonl").read_text().splitlines()
    ]
    count = len(chosen.records)
    everything, clean = range(len(kinds)), [i for i, kind in enumerate(kinds) if kind != "noise"]
    (run / "lists").mkdir(exist_ok=True)
    told = {}
    for seed in seeds:
        rng = random.Random(seed)
        arms = {
            "random": rng.sample(everything, count),
            "select": list(chosen.records),
            "inverted": sorted(everything, key=lambda i: scores[i])[:count],
            "oracle": rng.sample(clean, count),
        }
        for arm, numbers in arms.items():
            listed = replace(chosen, records=tuple(sorted(numbers)))
            write_lists(run / "lists" / f"{arm}{seed}.json", [listed], arm=arm)
            told.setdefault(arm, dict(Counter(kinds[i] for i in numbers)))
    by_kind = {
        kind: sum(scores[i] for i in everything if kinds[i] == kind) / kinds.count(kind)
        for kind in set(kinds)
    }
    (run / "lists" / "kinds.json").write_text(json.dumps({"mean score": by_kind, "arms": told}, indent=1))


def write_table(run: Path, seeds: list[int]) -> None:
    losses = {
        (arm, kind): {seed: last(run / arm / f"seed{seed}", f"loss/{kind}") for seed in seeds}
        for arm in ARMS
        for kind in ("easy", "hard")
    }
    kinds = json.loads((run / "lists" / "kinds.json").read_text())
    lines = [
        "| arm | easy : hard : noise | easy loss | hard loss | hard, against random | answer tokens |",
        "|---|---|---:|---:|---:|---:|",
    ]
    results: dict[str, object] = {"seeds": seeds, **kinds}
    for arm, what in ARMS.items():
        easy, hard = (estimate(list(losses[arm, kind].values())) for kind in ("easy", "hard"))
        gain = paired(losses[arm, "hard"], losses["random", "hard"])
        tokens = sum(trained_tokens(run / arm / f"seed{seed}") for seed in seeds) / len(seeds)
        parts = " : ".join(str(kinds["arms"][arm].get(kind, 0)) for kind in ("easy", "hard", "noise"))
        against = "" if arm == "random" else shown(gain, sign=True)
        lines.append(
            f"| {arm}: {what} | {parts} | {shown(easy)} | {shown(hard)} | {against} | {tokens:.0f} |"
        )
        results[arm] = {
            "easy": losses[arm, "easy"],
            "hard": losses[arm, "hard"],
            "against random": gain,
            "answer tokens": tokens,
        }
    (run / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (run / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(
        "mean score by kind:", {kind: round(score, 3) for kind, score in sorted(kinds["mean score"].items())}
    )


def shown(found: Estimate | None, *, sign: bool = False) -> str:
    """Mean and 95 % t interval over seeds."""
    assert found is not None
    mark = "+" if sign else ""
    if found["low"] is None or found["high"] is None:
        return f"{found['mean']:{mark}.3f}"
    return f"{found['mean']:{mark}.3f} ({found['low']:{mark}.3f} to {found['high']:{mark}.3f})"


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def last(output: Path, name: str) -> float:
    return next(row[name] for row in reversed(rows(output)) if name in row)


def trained_tokens(output: Path) -> float:
    """Answer tokens that the run trained on, from its rates."""
    return sum(
        row["response_tokens_per_s"] * row["seconds_per_step"] * 10
        for row in rows(output)
        if "seconds_per_step" in row
    )


if __name__ == "__main__":
    main()
