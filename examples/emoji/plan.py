"""Size the example to the minutes that there are, and write its pipelines for `llava-kd run`.

python examples/emoji/plan.py --run DIR --minutes 30 [--seed 0] [--equal]

    RUN/recipes/teacher.yaml                       the teacher's two stages
    RUN/recipes/start0.yaml                        what both arms of a seed begin with
    RUN/recipes/seed0/{undistilled,distilled}.yaml the three stages of an arm, at equal steps
    RUN/recipes/seed0/equal.yaml                   with --equal, once both arms are trained: the undistilled
                                                   arm, each stage with the operations of the distilled one

The steps of the stage files are those of 30 minutes on two free CPU cores; others are in proportion.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from llava_kd.search.findings.curves import stage_log

HERE = Path(__file__).resolve().parent
BASE_MINUTES = 30
THINGS, MOST_THINGS = 60, 180
STAGES = ("stage1", "stage2", "stage3")
NO_TEACHER = {
    "teacher": None,
    "objective.response_kl": None,
    "objective.visual_kl": None,
    "objective.relation": None,
}


def num_things(minutes: float) -> int:
    """More time learns more of them; a multiple of the four groups."""
    return max(16, min(MOST_THINGS, round(THINGS * minutes / BASE_MINUTES) // 4 * 4))


def steps(stage: str, minutes: float) -> int:
    base = yaml.safe_load((HERE / f"{stage}.yaml").read_text(encoding="utf-8"))["max_steps"]
    return max(1, round(base * minutes / BASE_MINUTES))


def _stage(name: str, minutes: float, data: Path, output: Path, more: dict[str, Any]) -> dict[str, Any]:
    tree = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    own: dict[str, Any] = {"output_dir": str(output), "max_steps": steps(name, minutes), **more}
    if "sources" in tree["data"]:
        own["data.sources"] = [
            {**source, "path": str(data / Path(source["path"]).name), "images": str(data)}
            for source in tree["data"]["sources"]
        ]
    else:
        own |= {
            "data.path": str(data / Path(tree["data"]["path"]).name),
            "data.images": str(data),
        }
    return {"config": str(HERE / f"{name}.yaml"), "overrides": own}


def pipelines(run: Path, minutes: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    """By name, the stages of each pipeline."""
    parts, data = run / "parts", run / "data"
    heal = run / f"start{seed}" / "heal"
    teacher = run / "teacher"
    tower = {"student.vision_tower": str(parts / "tower")}
    found = {
        "teacher": [
            _stage(
                *("teacher_stage1", minutes, data, teacher / "stage1"),
                {**tower, "student.language_model": str(parts / "smollm2")},
            ),
            _stage(
                *("teacher_stage2", minutes, data, teacher / "stage2"),
                {"student.checkpoint": str(teacher / "stage1/model")},
            ),
        ],
        f"start{seed}": [
            _stage(
                *("heal", minutes, data, heal),
                {**tower, "student.language_model": str(parts / "student_llm"), "seed": seed},
            )
        ],
    }
    for name, arm in (("undistilled", "sft"), ("distilled", "kd")):
        before = heal
        found[f"seed{seed}/{name}"] = []
        for stage in STAGES:
            more: dict[str, Any] = {"student.checkpoint": str(before / "model"), "seed": seed}
            if stage != "stage2":
                more |= NO_TEACHER if arm == "sft" else {"teacher.checkpoint": str(teacher / "stage2/model")}
            before = run / f"seed{seed}" / arm / stage
            found[f"seed{seed}/{name}"].append(_stage(stage, minutes, data, before, more))
    return found


def equal(run: Path, minutes: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The undistilled arm, each stage with as many operations as the distilled one's, by their logs.

    Raises ValueError where a stage of either arm has not been trained.
    """
    stages = pipelines(run, minutes, seed)[f"seed{seed}/undistilled"]
    before = run / f"start{seed}" / "heal"
    for stage, entry in zip(STAGES, stages, strict=True):
        spent = {arm: operations(run / f"seed{seed}" / arm / stage) for arm in ("sft", "kd")}
        entry["overrides"] |= {
            "student.checkpoint": str(before / "model"),
            "output_dir": str(run / "equal" / f"seed{seed}" / stage),
            "max_steps": round(steps(stage, minutes) * spent["kd"] / spent["sft"]),
        }
        before = run / "equal" / f"seed{seed}" / stage
    return {f"seed{seed}/equal": stages}


def operations(stage: Path) -> float:
    """TFLOP of a stage, the teacher's among them."""
    lines = stage_log(stage)
    if not lines or not lines[-1].tflop:
        raise ValueError(f"{stage} has no log of operations: train both arms first")
    return lines[-1].tflop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=BASE_MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--things", action="store_true", help="say how many things to draw, and stop")
    parser.add_argument("--equal", action="store_true", help="write the arm of equal operations")
    a = parser.parse_args()
    if a.things:
        print(num_things(a.minutes))
        return
    for name, stages in (equal if a.equal else pipelines)(a.run, a.minutes, a.seed).items():
        path = a.run / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False, width=120), encoding="utf-8")


if __name__ == "__main__":
    main()
