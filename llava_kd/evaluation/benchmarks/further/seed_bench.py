"""SEED-Bench, its questions about single images: one of four letters, accuracy over all of them.

The rule is that of LLaVA's convert_seed_for_submission.py: the answer is the letter and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_kd.evaluation.benchmarks.base import (
    Answers,
    Benchmark,
    Item,
    JsonDict,
    Quirks,
    Score,
    field_of,
    mean,
    missing_note,
    need,
    read_json,
    read_jsonl,
    with_image,
)
from llava_kd.evaluation.generation.questions import Question, image_path

QUESTIONS = "seed_bench/llava-seed-bench.jsonl"
ANNOTATIONS = "seed_bench/SEED-Bench.json"
IMAGES = "seed_bench"


def read(root: Path, quirks: Quirks) -> list[Question]:
    """The questions about images, with their letters; those about videos are left out."""
    path = need(root, QUESTIONS, "seed_bench")
    annotated = annotated_questions(root)
    questions = []
    for number, row in enumerate(read_jsonl(path), start=1):
        name = str(field_of(row, "question_id", path, number))
        if name not in annotated:
            raise ValueError(f"{path}, line {number}: question {name} is not in {root / ANNOTATIONS}")
        answer, kind, is_image = annotated.pop(name)
        if not is_image:
            continue
        image, text = (str(field_of(row, key, path, number)) for key in ("image", "text"))
        files = (image_path(root / IMAGES, image, owner=f"seed_bench {name}"),)
        questions.append(Question(id=name, text=with_image(text), images=files, truth=answer, kind=kind))
    if left := [name for name, (_, _, is_image) in annotated.items() if is_image]:
        raise ValueError(
            f"{path} lacks {len(left)} questions of {root / ANNOTATIONS}, the first is {left[0]}"
        )
    return questions


def annotated_questions(root: Path) -> dict[str, tuple[str, str, bool]]:
    """Letter, kind, and whether it is about one image, by question id."""
    path = need(root, ANNOTATIONS, "seed_bench")
    tree: JsonDict = read_json(path, dict)
    kinds = field_of(tree, "question_type", path, "top", dict)
    names = {str(number): name for name, number in kinds.items()}
    found = {}
    for number, row in enumerate(field_of(tree, "questions", path, "top", list)):
        keys = ("question_id", "answer", "question_type_id", "data_type")
        name, answer, kind, data = (field_of(row, key, path, number) for key in keys)
        if answer not in ("A", "B", "C", "D"):
            raise ValueError(f"{path}: entry {number}: answer must be A, B, C or D, got {answer!r}")
        found[str(name)] = (answer, names.get(str(kind), str(kind)), data == "image")
    return found


def score(root: Path, questions: Sequence[Question], answers: Answers, quirks: Quirks) -> Score:
    items, by_kind, longer = [], defaultdict(list), 0
    for question in questions:
        answer = answers.get(question.id, "")
        right = float(answer == question.truth)
        longer += len(answer) > 1 and answer[0] == question.truth
        by_kind[question.kind].append(right)
        items.append(Item(id=question.id, answer=answer, reading=answer, truth=question.truth, score=right))
    notes = missing_note(questions, answers)
    if longer:
        notes += (f"{longer} answers begin with the right letter and say more: they count as wrong",)
    parts = {kind: 100 * mean(scores) for kind, scores in sorted(by_kind.items())}
    return Score(
        value=100 * mean([item.score for item in items]), parts=parts, items=tuple(items), notes=notes
    )


BENCHMARK = Benchmark(
    name="seed_bench",
    column="SEED-I",
    files=(QUESTIONS, ANNOTATIONS),
    images=IMAGES,
    num_questions=14_233,
    max_new_tokens=128,
    read=read,
    score=score,
)
