"""MME: pairs of yes-or-no questions in fourteen tasks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    Answers,
    Benchmark,
    Item,
    Quirks,
    Score,
    field_of,
    missing_note,
    need,
    read_jsonl,
    with_image,
    without_suffix,
)
from llava_kd.evaluation.generation.questions import Question, image_path
from llava_kd.evaluation.scorers.yes_no import COGNITION, PERCEPTION, mme_reading, mme_task_score

QUESTIONS = "MME/llava_mme.jsonl"
RELEASE = "MME/MME_Benchmark_release_version"
TASKS = (*PERCEPTION, *COGNITION)
_YES_NO = re.compile(r"\s*Please answer yes or no\.\s*$")


def _bare(question: str) -> str:
    """A question for comparison: without its instruction, spaces single (some files have two)."""
    return " ".join(_YES_NO.sub("", without_suffix(question)).split())


def truths(root: Path, task: str, file: str) -> dict[str, str]:
    """Truth by question of one image; a task keeps its texts beside the images or in their own folder."""
    folder = need(root, RELEASE, "mme") / task
    stem = Path(file).stem
    paths = (folder / "questions_answers_YN" / f"{stem}.txt", folder / f"{stem}.txt")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"mme: no questions of {task}/{file}: neither {paths[0]} nor {paths[1]} is there")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
        question, tab, truth = line.rpartition("\t")
        if not tab or truth.strip() not in ("Yes", "No"):
            raise ValueError(f"{path}, line {number} must be a question, a tab and Yes or No")
        found[_bare(question)] = truth.strip().lower()
    return found


def read(root: Path, quirks: Quirks) -> list[Question]:
    """Questions named "<task>/<file>#1" and "#2": LLaVA's file gives both the same id."""
    path = need(root, QUESTIONS, "mme")
    questions: list[Question] = []
    known: dict[str, dict[str, str]] = {}
    count: dict[str, int] = defaultdict(int)
    for number, row in enumerate(read_jsonl(path), start=1):
        pair, image, text = (
            str(field_of(row, key, path, number)) for key in ("question_id", "image", "text")
        )
        task, _, file = pair.partition("/")
        if pair not in known:
            known[pair] = truths(root, task, file)
        truth = known[pair].get(_bare(text))
        if truth is None:
            raise ValueError(f"{path}, line {number}: the texts of {pair} do not hold {_bare(text)!r}")
        count[pair] += 1
        image_file = _image(root / RELEASE, image)
        questions.append(
            Question(
                id=f"{pair}#{count[pair]}",
                text=with_image(text),
                images=(image_file,),
                truth=truth,
                kind=task,
                extra={"source_id": pair},
            )
        )
    if odd := [pair for pair, times in count.items() if times != 2]:
        raise ValueError(f"{path}: every image has two questions; {len(odd)} have not, the first is {odd[0]}")
    return questions


def _image(release: Path, name: str) -> Path:
    """`task/file.jpg`, or `task/images/file.jpg` where the task keeps its images in a folder."""
    path = image_path(release, name, owner="mme")
    nested = path.parent / "images" / path.name
    return nested if nested.is_file() and not path.is_file() else path


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    """Perception sum over its tasks (2000 at most) divided by 20, as the tables print it."""
    items = []
    pairs: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    unreadable = 0
    for question in questions:
        answer = answers.get(question.id, "")
        reading = mme_reading(answer)
        unreadable += reading == "other"
        right = reading == question.truth
        pairs[question.kind][question.extra["source_id"]].append(right)
        items.append(
            Item(id=question.id, answer=answer, reading=reading, truth=question.truth, score=float(right))
        )
    tasks = {task: mme_task_score(list(images.values())) for task, images in pairs.items()}
    perception = sum(tasks.get(task, 0.0) for task in PERCEPTION)
    cognition = sum(tasks.get(task, 0.0) for task in COGNITION)
    notes = [*missing_note(questions, answers)]
    if lacking := [task for task in TASKS if task not in tasks]:
        notes.append(f"no questions of {', '.join(lacking)}: the sums lack them")
    if unreadable:
        notes.append(f"{unreadable} answers begin with neither yes nor no; they count as wrong")
    return Score(
        value=perception / 20,
        parts={"perception": perception, "cognition": cognition, **tasks},
        items=tuple(items),
        notes=tuple(notes),
    )


BENCHMARK = Benchmark(
    name="mme",
    column="MME",
    files=(QUESTIONS, RELEASE),
    images=RELEASE,
    num_questions=2_374,
    max_new_tokens=128,
    read=read,
    score=score,
    notes="the table shows the perception sum divided by 20; runs differ by some 20 points of the sum",
)
