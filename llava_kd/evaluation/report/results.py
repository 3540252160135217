"""What a comparison run holds on disk, gathered into one dictionary.

    RUN/teacher/eval/{summary.json, answers.jsonl}              optional
    RUN/seed0/ARM/eval/{summary.json, answers.jsonl}            one ARM directory per way of training,
    RUN/seed0/ARM/STAGE/metrics.jsonl                           its stages in the order of their names
    RUN/seed1/...                                               the same arms for every seed
    RUN/seconds.json     optional: {"install": .., "train": .., "eval": ..}
    RUN/settings.json    optional: {"what": "value", ...}, shown in the report as it is;
                                         "note" stands under the headline

The arm called `distilled` (by default "kd") is compared with the only other one, the baseline.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from llava_kd.evaluation.answers import read_lines
from llava_kd.evaluation.scorers.exact import is_correct

TEACHER = "teacher"
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; the normal one beyond.
T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


class Difference(TypedDict):
    """Distilled minus baseline accuracy, with a 95 % interval and how that was made."""

    mean: float
    low: float | None
    high: float | None
    interval: str
    every_seed_positive: bool


@dataclass(frozen=True)
class Evaluated:
    """One scored model."""

    accuracy: float
    by_type: dict[str, float]
    count: int
    seconds: float
    versions: dict[str, str]
    answers: dict[str, dict[str, str]]
    by_noise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A comparison: arms by seed, and the logs of their stages."""

    directory: Path
    baseline: str
    distilled: str
    teacher: Evaluated | None
    seeds: dict[int, dict[str, Evaluated]]
    logs: dict[int, dict[str, dict[str, list[dict[str, float]]]]]  # seed, arm, stage -> lines
    seconds: dict[str, float]
    settings: dict[str, str]


def is_comparison(directory: str | Path) -> bool:
    """Whether it has the layout above, and is no run of a stage."""
    return any(re.fullmatch(r"seed\d+", path.name) for path in Path(directory).glob("seed*"))


def read_run(directory: str | Path, *, distilled: str = "kd") -> Run:
    """Everything that a run directory of the layout above holds."""
    directory = Path(directory)
    seed_dirs = {int(m[1]): p for p in directory.glob("seed*") if (m := re.fullmatch(r"seed(\d+)", p.name))}
    if not seed_dirs:
        raise ValueError(
            f"{directory} must have directories seed0, seed1, ...; give the directory of a comparison"
        )
    arms = {
        seed: {p.parent.parent.name: p.parent.parent for p in sorted(path.glob("*/eval/summary.json"))}
        for seed, path in sorted(seed_dirs.items())
    }
    whole = [seed for seed, found in arms.items() if distilled in found and len(found) == 2]
    if not whole or any(len(found) > 2 for found in arms.values()):
        seed, found = next((seed, found) for seed, found in arms.items() if seed not in whole)
        raise ValueError(
            f"{directory}/seed{seed} must hold two scored arms, one of them {distilled!r}, found {[*found]}"
        )
    unfinished = ", ".join(f"seed {seed}" for seed in arms if seed not in whole)
    seeds = {seed: {name: read_evaluated(arm / "eval") for name, arm in arms[seed].items()} for seed in whole}
    logs = {seed: {name: _stage_logs(arm) for name, arm in arms[seed].items()} for seed in whole}
    baseline = next(name for name in next(iter(seeds.values())) if name != distilled)
    for seed, arms in seeds.items():
        if baseline not in arms:
            raise ValueError(
                f"{directory}/seed{seed} has no scored arm {baseline!r}, which the other seeds have"
            )
    teacher = directory / TEACHER / "eval"
    return Run(
        directory=directory,
        baseline=baseline,
        distilled=distilled,
        teacher=read_evaluated(teacher) if teacher.is_dir() else None,
        seeds=seeds,
        logs=logs,
        seconds={k: float(v) for k, v in _optional_json(directory / "seconds.json").items()},
        settings={
            **{k: str(v) for k, v in _optional_json(directory / "settings.json").items()},
            **({"left out, as not finished": unfinished} if unfinished else {}),
        },
    )


def read_evaluated(directory: Path) -> Evaluated:
    path = directory / "summary.json"
    if not path.is_file():
        raise ValueError(f"no {path}; score the model first")
    return _evaluated(path, read_object(path))


def read_scores(run: Path) -> dict[str, Evaluated]:
    """Of every folder below RUN/eval*, by its path in the run; those of benchmarks are left out."""
    summaries = {path: read_object(path) for path in sorted(run.glob("eval*/**/summary.json"))}
    return {
        str(path.parent.relative_to(run)): _evaluated(path, summary)
        for path, summary in summaries.items()
        if not {"benchmark", "values"} & set(summary)
    }


def _evaluated(path: Path, summary: Mapping[str, Any]) -> Evaluated:
    answers = path.with_name("answers.jsonl")
    lines = read_lines(answers) if answers.is_file() else []
    try:
        return Evaluated(
            accuracy=float(summary["accuracy"]),
            by_type={str(kind): float(value) for kind, value in summary["by_type"].items()},
            count=int(summary["count"]),
            seconds=float(summary.get("seconds", 0.0)),
            versions=summary.get("versions", {}),
            answers={line["id"]: line for line in lines},
            by_noise=summary.get("noise", {}).get("accuracy", {}),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold accuracy, by_type and count as `llava-kd eval` writes them ({error!r}); score "
            "the model again"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, for one that holds no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path} must be JSON, and is cut or damaged ({error}): write it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, got {json.dumps(tree)[:60]}: write it again")
    return tree


def _optional_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _stage_logs(arm: Path) -> dict[str, list[dict[str, float]]]:
    return {path.parent.name: read_metrics(path) for path in sorted(arm.glob("*/metrics.jsonl"))}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Numbers of a metrics.jsonl in the order of the steps; a resumed run's repeated step counts once."""
    steps: dict[float, dict[str, float]] = {}
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run may leave a last line without end
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # also bytes that are no text
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); fix or delete that line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds no figures; delete that line")
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        if "step" in numbers:
            steps[numbers["step"]] = numbers
    return [steps[step] for step in sorted(steps)]


def collect_results(run: Run) -> dict[str, object]:
    """The results.json of a run: means over seeds, each seed's accuracies, the difference, the seconds."""
    arms = {name: [seed[name] for seed in run.seeds.values()] for name in (run.baseline, run.distilled)}
    results: dict[str, object] = {}
    if run.teacher is not None:
        results[TEACHER] = _figures([run.teacher])
    for name, models in arms.items():
        results[name] = _figures(models)
    results["seeds"] = [
        {
            "seed": seed,
            run.baseline: models[run.baseline].accuracy,
            run.distilled: models[run.distilled].accuracy,
            "difference": models[run.distilled].accuracy - models[run.baseline].accuracy,
        }
        for seed, models in run.seeds.items()
    ]
    results["difference"] = difference(run)
    results["count"] = arms[run.distilled][0].count
    results["seconds"] = run.seconds
    return results


def table(run: Run) -> str:
    """The accuracies as lines for a terminal: a seed a line, their mean, the gain and its interval."""
    head = [f"{next(iter(run.seeds.values()))[run.distilled].count:,} questions", "teacher"]
    rows = [[*head, "undistilled", "distilled", "gain, points"]]
    teacher = "-" if run.teacher is None else f"{100 * run.teacher.accuracy:.1f} %"
    scores = {
        f"seed {seed}": (models[run.baseline].accuracy, models[run.distilled].accuracy)
        for seed, models in run.seeds.items()
    }
    if len(scores) > 1:
        scores["mean"] = (_mean([b for b, _ in scores.values()]), _mean([d for _, d in scores.values()]))
    for name, (baseline, distilled) in scores.items():
        gain = f"{100 * (distilled - baseline):+.1f}"
        rows.append([name, teacher, f"{100 * baseline:.1f} %", f"{100 * distilled:.1f} %", gain])
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    gap = difference(run)
    if gap["low"] is not None and gap["high"] is not None:
        lines.append(f"gain: {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f} points, {gap['interval']}")
    if run.seconds:
        lines.append("seconds: " + ", ".join(f"{name} {value:,.0f}" for name, value in run.seconds.items()))
    return "\n".join(lines)


def _figures(models: Sequence[Evaluated]) -> dict[str, object]:
    found: dict[str, object] = {
        "accuracy": _mean([m.accuracy for m in models]),
        "by_type": mean_by_type(models),
    }
    noise = mean_by_noise(models)
    return found | {"by_noise": noise} if noise else found


def mean_by_noise(models: Sequence[Evaluated]) -> dict[str, float]:
    """By the levels that all were asked at, the least first; empty where there is none."""
    shared = set.intersection(*(set(m.by_noise) for m in models))
    return {level: _mean([m.by_noise[level] for m in models]) for level in sorted(shared, key=float)}


def mean_by_type(models: Sequence[Evaluated]) -> dict[str, float]:
    return {kind: _mean([m.by_type[kind] for m in models]) for kind in models[0].by_type}


def difference(run: Run) -> Difference:
    """Mean over seeds with a t interval; with one seed, a paired bootstrap over the questions."""
    gaps = [m[run.distilled].accuracy - m[run.baseline].accuracy for m in run.seeds.values()]
    if len(gaps) > 1:
        low, high = t_interval(gaps)
        how = f"95 % t interval over {len(gaps)} seeds"
    else:
        models = next(iter(run.seeds.values()))
        low, high = paired_bootstrap(models[run.distilled].answers, models[run.baseline].answers)
        how = "95 % paired bootstrap over the questions, one seed"
    return {
        "mean": _mean(gaps),
        "low": low,
        "high": high,
        "interval": how,
        "every_seed_positive": min(gaps) > 0,
    }


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided 95 % interval of the mean by Student's t."""
    count = len(values)
    mean = _mean(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    reach = (T_95[count - 2] if count - 2 < len(T_95) else 1.96) * spread / math.sqrt(count)
    return mean - reach, mean + reach


def paired_bootstrap(
    better: Mapping[str, Mapping[str, str]], worse: Mapping[str, Mapping[str, str]], *, draws: int = 2000
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of the accuracy difference over resampled questions; None without answers."""
    gaps = [
        is_correct(better[name]["answer"], better[name]["truth"])
        - is_correct(worse[name]["answer"], worse[name]["truth"])
        for name in better
        if name in worse
    ]
    if not gaps:
        return None, None
    count = len(gaps)
    share = [gaps.count(sign) / count for sign in (1, -1, 0)]
    # A resample matters only through how many of its draws are +1 and -1.
    drawn_D3 = np.random.default_rng(0).multinomial(count, share, size=draws)
    low, high = np.quantile((drawn_D3[:, 0] - drawn_D3[:, 1]) / count, [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
