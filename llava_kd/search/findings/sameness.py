"""Whether stages that name the same files have read the same: a file may change before an arm is added."""

from __future__ import annotations

import json

from llava_kd.search.findings.curves import run_record
from llava_kd.search.grids.sharing import Plan, flat

# Sections whose settings name what is read, by the name of its hash in run.json.
_READS = {"data or tokenizer": ("data.", "teacher."), "teacher": ("teacher.",)}


def mixtures(plan: Plan) -> list[str]:
    """A line for each setting under which finished stages of one seed have read different things."""
    found: dict[tuple[int, str, str], dict[str, list[str]]] = {}
    for key, stage in plan.stages.items():
        prints = (run_record(stage.directory) or {}).get("fingerprints", {})
        first = plan.stages[plan.root(key)]
        student = {k: v for k, v in flat(first.tree).items() if k.startswith("student.")}
        for what, sections in _READS.items():
            if what in prints:
                own = {k: v for k, v in flat(stage.tree).items() if k.startswith(sections)}
                same = json.dumps(
                    [own, student, stage.tree.get("global_batch_size")], sort_keys=True, default=str
                )
                users = sorted({run.arm for run in plan.users(key)})
                found.setdefault((stage.seed, what, same), {}).setdefault(prints[what], []).extend(users)
    lines = []
    for (seed, what, _), groups in found.items():
        if len(groups) > 1:
            told = " and ".join(", ".join(dict.fromkeys(arms)) for arms in groups.values())
            lines.append(
                f"the {what} changed during this ablation: with seed {seed} and the same settings, {told} "
                "read different ones and are not comparable"
            )
    return lines
