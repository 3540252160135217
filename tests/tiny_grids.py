"""A small ablation file, and a stand-in for the processes that train and score its arms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from tiny_runs import write_stage

from llava_kd.assembly import ablate as ablate_module
from llava_kd.search.running.schedule import Job


def write_grid(folder: Path, arms: Mapping[str, object], **more: object) -> Path:
    """Recipes `plain` and `taught` beside `grid.yaml`; their models and data need not be there."""
    common = {"data": folder, "student": folder / "student", "teacher": folder / "teacher"}
    write_stage(folder / "plain", distilled=False, max_steps=10, **common)
    write_stage(folder / "taught", distilled=True, max_steps=10, **common)
    (folder / "test.json").write_text("[]")
    tree = {
        "name": "grid",
        "output": str(folder / "out"),
        "seeds": [0, 1],
        "baseline": next(iter(arms)),
        "stages": {"A": {"recipe": "plain.yaml"}, "B": {"recipe": "taught.yaml"}},
        "arms": dict(arms),
        "tests": {"test": str(folder / "test.json")},
        **more,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def edit(path: Path, change: Callable[[dict], object]) -> None:
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


class FakeRuns:
    """Writes at once what a stage, or an evaluation, leaves behind. A step takes 1 s, a taught one 2 s.

    `broken` says by its settings whether a stage fails. `accuracy` is of an arm and seed on every test;
    `curve` of a stage's settings and step, asked every 5 steps. `operations` of a student's step on each of
    two ranks; a teacher adds 1.
    """

    def __init__(self) -> None:
        self.trained: list[dict] = []
        self.scored: list[str] = []
        self.broken: Callable[[dict], bool] = lambda tree: False
        self.accuracy: Callable[[str, int], float] = lambda arm, seed: 0.5
        self.data = "what it read"
        self.curve: Callable[[dict, int], float] | None = None
        self.operations: float | None = None

    def install(self, monkeypatch) -> FakeRuns:
        monkeypatch.setattr(ablate_module._Slots, "start", lambda slots, job, slot: self.start(job))
        monkeypatch.setattr(ablate_module._Slots, "ended", lambda slots, status: status)
        return self

    def start(self, job: Job) -> int:
        words = list(job.command)
        return self._score(words) if job.key.startswith("eval ") else self._train(Path(words[-1]), job)

    def _train(self, recipe: Path, job: Job) -> int:
        tree = yaml.safe_load(recipe.read_text())
        self.trained.append(tree)
        parent = Path(tree["student"]["checkpoint"]).parent
        if parent.parent.name == "stages":
            assert (parent / "run.json").is_file(), "it started before its parent was complete"
        if self.broken(tree):
            job.log.parent.mkdir(exist_ok=True)
            job.log.write_text("Traceback\nthe last words\n")
            return 2
        output = Path(tree["output_dir"])
        output.mkdir(parents=True, exist_ok=True)
        rate = 1.0 if tree.get("teacher") is None else 2.0
        lines = []
        for step in range(1, tree["max_steps"] + 1):
            line: dict = {"step": step, "seconds_per_step": rate}
            if self.operations is not None:
                line |= {"ranks": 2, "student_tflop": self.operations, "teacher_tflop": rate - 1.0}
            if self.curve is not None and step % 5 == 0:
                line["slice/val"] = self.curve(tree, step)
            if step in (1, tree["max_steps"]):
                line["tokens/student_nll"] = tree["seed"] + rate / step
            lines.append(json.dumps(line) + "\n")
        (output / "metrics.jsonl").write_text("".join(lines))
        prints = {"data or tokenizer": self.data}
        record = {"steps": tree["max_steps"], "commit": "abc", "fingerprints": prints}
        (output / "run.json").write_text(json.dumps(record))
        return 0

    def _score(self, words: list[str]) -> int:
        out = Path(words[words.index("--out") + 1])
        arm, seed = out.parents[2].name, int(out.parents[1].name.removeprefix("seed"))
        self.scored.append(f"{arm} {seed}")
        out.mkdir(parents=True, exist_ok=True)
        value = self.accuracy(arm, seed)
        summary = {"accuracy": value, "by_type": {"colour": value, "count": value / 2}, "count": 8}
        (out / "run.json").write_text("{}")
        (out / "summary.json").write_text(json.dumps(summary))
        return 0

    def labels(self) -> list[str]:
        """Of what was trained: with or without a teacher, the seed, the steps."""
        return [f"{'B' if tree.get('teacher') else 'A'}{tree['seed']}" for tree in self.trained]
