"""Answer and score benchmarks with a stock LLaVA directory, and check a data root beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from llava_kd.durable import write_text
from llava_kd.evaluation.answers import ERROR
from llava_kd.evaluation.benchmarks.base import Benchmark, Quirks, Score, read_jsonl
from llava_kd.evaluation.benchmarks.catalogue import BENCHMARKS, find
from llava_kd.evaluation.benchmarks.published import AVG7, AVG10, average
from llava_kd.evaluation.benchmarks.table import html_table, markdown_table
from llava_kd.evaluation.generation.generate import pictures
from llava_kd.evaluation.generation.model_directory import model_directory, run_name
from llava_kd.evaluation.generation.questions import Question, check_questions
from llava_kd.evaluation.generation.ranks import join_ranks
from llava_kd.evaluation.runner import Asking, Model, answer_questions, unreadable, versions

_ASKING = Asking()


class BenchmarkSummary(TypedDict):
    """OUT/NAME/summary.json; `value` is None where a server scores. Not whole: the first questions alone."""

    benchmark: str
    value: float | None
    parts: dict[str, float]
    count: int
    is_whole: bool
    seconds: float
    upload: str | None
    notes: list[str]
    quirks: dict[str, bool]
    versions: dict[str, str]


def evaluate_benchmarks(
    model_dir: str | Path,
    names: str | Sequence[str],
    data_root: str | Path,
    out_dir: str | Path,
    *,
    quirks: Quirks | None = None,
    server_figures: Mapping[str, float] | None = None,
    asking: Asking = _ASKING,
    table: Mapping[str, Benchmark] = BENCHMARKS,
) -> dict[str, BenchmarkSummary]:
    """Run benchmarks of `table` ("pope,gqa", a list, or "all"): OUT/NAME/ for each, and OUT/table.md and
    table.html.

    Every file is checked before the model is loaded. `server_figures` puts the figures of VQAv2 and VizWiz,
    once their servers have answered, into the table. What OUT holds of this model stays in the table.
    """
    if asking.noise:
        raise ValueError("noise needs a LLaVA JSON file; the pictures of a benchmark stay as they are")
    model_dir, root, out_dir = model_directory(model_dir), Path(data_root), Path(out_dir)
    quirks = quirks or Quirks()
    chosen = find(names, table)
    questions = {b.name: _questions(b, root, quirks, asking.limit) for b in chosen}
    for benchmark in chosen:  # nothing is asked where something is missing that its scorer will read
        if benchmark.score is not None:
            score_answers(benchmark, root, questions[benchmark.name], {}, quirks)
    ranks = join_ranks()
    model = Model(model_dir, ranks=ranks, device=asking.device, dtype=asking.dtype)
    summaries = {}
    for benchmark in chosen:
        asked, folder = questions[benchmark.name], out_dir / benchmark.name
        answers, seconds = answer_questions(
            model,
            asked,
            folder,
            batch_size=asking.batch_size,
            max_new_tokens=asking.max_new_tokens or benchmark.max_new_tokens,
            progress=asking.progress,
        )
        if ranks.rank == 0:
            summaries[benchmark.name] = _finish(
                benchmark, root, folder, asked, answers, quirks, seconds, is_whole=asking.limit is None
            )
    if ranks.rank == 0:
        found = _all_of(model, out_dir, table) | summaries
        write_tables(out_dir, run_name(model_dir), found, server_figures or {}, table)
    ranks.barrier()
    return summaries


def _all_of(model: Model, out_dir: Path, table: Mapping[str, Benchmark]) -> dict[str, BenchmarkSummary]:
    """What the directory holds of this model, of earlier calls too."""
    found = {}
    for name in table:
        summary, run = (out_dir / name / file for file in ("summary.json", "run.json"))
        if not (summary.is_file() and run.is_file()):
            continue
        if json.loads(run.read_text(encoding="utf-8")).get("model") == model.fingerprint:
            found[name] = {"is_whole": True} | json.loads(summary.read_text(encoding="utf-8"))
    return found


def _questions(benchmark: Benchmark, root: Path, quirks: Quirks, limit: int | None) -> list[Question]:
    questions = benchmark.read(root, quirks)
    check_questions(questions, f"{benchmark.name} in {root}")
    return questions[:limit]


def _finish(
    benchmark: Benchmark,
    root: Path,
    folder: Path,
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, str]],
    quirks: Quirks,
    seconds: float,
    *,
    is_whole: bool,
) -> BenchmarkSummary:
    """Upload file, score, scored.jsonl and summary.json of one benchmark."""
    upload, fault = None, unreadable(answers)
    given = {answer["id"]: answer["answer"] for answer in answers}
    # POPE's rule reads an empty answer as yes, so one about no picture must not be there at all.
    seen = {answer["id"]: answer["answer"] for answer in answers if ERROR not in answer}
    if benchmark.upload is not None:
        upload = str(benchmark.upload(root, questions, given, quirks, folder))
    score = score_answers(benchmark, root, questions, seen, quirks) if benchmark.score is not None else None
    notes = [] if benchmark.notes == "" else [benchmark.notes]
    if fault:
        notes.insert(0, fault)
    if not is_whole:
        notes.insert(0, f"only the first {len(questions)} questions were evaluated: not a result")
    summary: BenchmarkSummary = {
        "benchmark": benchmark.name,
        "value": score.value if score else None,
        "parts": score.parts if score else {},
        "count": len(questions),
        "is_whole": is_whole,
        "seconds": round(seconds, 3),
        "upload": upload,
        "notes": [*notes, *(score.notes if score else ())],
        "quirks": asdict(quirks),
        "versions": versions(),
    }
    if score is not None:
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in score.items)
        write_text(folder / "scored.jsonl", "".join(lines))
    write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def score_answers(
    benchmark: Benchmark,
    root: Path,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    quirks: Quirks,
) -> Score:
    if benchmark.score is None:
        raise ValueError(f"{benchmark.name} is {benchmark.notes}; it has an upload file and no score")
    return benchmark.score(root, questions, answers, quirks)


def score_file(
    name: str, data_root: str | Path, answers_jsonl: str | Path, *, quirks: Quirks | None = None
) -> Score:
    """Score an answers file, ours (id, answer) or one that LLaVA's scripts wrote (question_id, prompt, text).

    Answers are joined by id and prompt, never by their place; doubles and strangers are noted.
    """
    (benchmark,) = find(name)
    root, quirks = Path(data_root), quirks or Quirks()
    questions = _questions(benchmark, root, quirks, None)
    answers, notes = match_answers(questions, read_jsonl(Path(answers_jsonl)))
    score = score_answers(benchmark, root, questions, answers, quirks)
    return Score(value=score.value, parts=score.parts, items=score.items, notes=(*notes, *score.notes))


def match_answers(
    questions: Sequence[Question], rows: Iterable[Mapping[str, str]]
) -> tuple[dict[str, str], list[str]]:
    """Answers by our ids, and what to say of those that came twice or belong to nothing."""
    ids = {question.id for question in questions}
    # LLaVA's files give one id to several questions of an image: the prompt tells them apart.
    by_source: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        source = question.extra.get("source_id", question.id)
        by_source.setdefault((source, _words(question.text)), []).append(question.id)
    answers: dict[str, str] = {}
    doubles, strangers = [], []
    for number, row in enumerate(rows, start=1):
        given = str(row.get("id", row.get("question_id", "")))
        if "answer" not in row and "text" not in row:
            raise ValueError(
                f"answer {number}, of question {given!r}, must have `answer` or `text`; got {sorted(row)}"
            )
        said = row.get("answer", row.get("text"))
        if said is None:  # as other tools write one that could not be given
            continue
        told = by_source.get((given, _words(str(row.get("prompt", "")))), [given] if given in ids else [])
        free = [name for name in told if name not in answers]
        if free:
            answers[free[0]] = str(said)
        else:
            (doubles if told else strangers).append(given)
    notes = []
    if doubles:
        notes.append(
            f"{len(doubles)} questions are answered twice, the first is {doubles[0]}; the first answer counts"
        )
    if strangers:
        notes.append(f"{len(strangers)} answers belong to no question, the first is {strangers[0]}")
    return answers, notes


def _words(text: str) -> str:
    return " ".join(text.replace("<image>", "").split())


@dataclass(frozen=True)
class Verification:
    """What `verify` found: problems stop an evaluation, remarks do not."""

    questions: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def verify(
    names: str | Sequence[str],
    data_root: str | Path,
    *,
    num_threads: int = 4,
    table: Mapping[str, Benchmark] = BENCHMARKS,
) -> dict[str, Verification]:
    """Check files of benchmarks of `table` under a data root: presence, form, joins, releases, pictures."""
    root = Path(data_root)
    return {benchmark.name: _verify(benchmark, root, num_threads) for benchmark in find(names, table)}


def describe(found: Mapping[str, Verification]) -> str:
    """What `verify` found, a line per fact."""
    lines = []
    for name, verification in found.items():
        lines += [f"{name}: {problem}" for problem in verification.problems]
        lines += [f"{name}: note: {remark}" for remark in verification.remarks]
        if not verification.problems:
            lines.append(f"{name}: ready, {verification.questions:,} questions")
    return "\n".join(lines)


def _verify(benchmark: Benchmark, root: Path, num_threads: int) -> Verification:
    problems = [f"{root / name} is not there" for name in benchmark.files if not (root / name).exists()]
    if problems:
        return Verification(0, tuple(problems), ())
    quirks, remarks = Quirks(), []
    try:
        questions = _questions(benchmark, root, quirks, None)
        if benchmark.score is not None:  # joins every question to its annotation
            benchmark.score(root, questions, {}, quirks)
    except ValueError as error:
        return Verification(0, (str(error),), ())
    images = {image for question in questions for image in question.images if isinstance(image, Path)}
    if missing := sorted(image for image in images if not image.is_file()):
        problems.append(f"{len(missing)} of {len(images)} images are not there, the first is {missing[0]}")
    there = images.difference(missing)
    asked = {q.id: q for q in questions if not any(isinstance(i, Path) and i not in there for i in q.images)}
    shown = {image: question for question in asked.values() for image in question.images}
    readers = {question.id: question for question in shown.values()}  # of every picture, one
    with ThreadPoolExecutor(num_threads) as threads:
        faults = [fault for _, fault in threads.map(pictures, readers.values()) if fault]
    if faults:
        problems.append(f"{len(faults)} images cannot be read: {'; '.join(faults[:5])}")
    known = (benchmark.num_questions, *benchmark.other_counts)
    if benchmark.num_questions is not None and len(questions) not in known:
        remarks.append(f"{len(questions):,} questions; the published release has {benchmark.num_questions:,}")
    return Verification(len(questions), tuple(problems), tuple(remarks))


def write_tables(
    out_dir: Path,
    model: str,
    summaries: Mapping[str, BenchmarkSummary],
    server_figures: Mapping[str, float],
    table: Mapping[str, Benchmark] = BENCHMARKS,
) -> None:
    """OUT/summary.json, table.md and table.html from the summaries of one model."""
    values = {name: s["value"] for name, s in summaries.items() if s["value"] is not None and s["is_whole"]}
    values |= server_figures
    trials = {
        n: (s["value"], s["count"])
        for n, s in summaries.items()
        if s["value"] is not None and not s["is_whole"]
    }
    notes = {name: summary["notes"] for name, summary in summaries.items() if summary["notes"]}
    total = {
        "model": model,
        "values": values,
        "trials": {name: value for name, (value, _) in trials.items()},
        "avg7": average(values, AVG7),
        "avg10": average(values, AVG10),
        "seconds": sum(summary["seconds"] for summary in summaries.values()),
    }
    write_text(out_dir / "summary.json", json.dumps(total, indent=2) + "\n")
    columns = {name: benchmark.column for name, benchmark in table.items()}
    write_text(out_dir / "table.md", markdown_table(model, values, notes, trials, columns))
    write_text(out_dir / "table.html", html_table(model, values, notes, trials, columns))
