"""Answers on disk: appended as JSON lines, each written once, continued after a kill.

Rank 0 appends to answers.jsonl and rank R to answers.rankR.jsonl; `merge` makes one file of them, in the
order of the questions, when all are answered.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from llava_kd.durable import Lines, make_folder, write_text

logger = logging.getLogger(__name__)

MAIN = "answers.jsonl"
ERROR = "error"  # key of an answer that could not be given: why
CUT = "cut"  # key of an answer that did not end: after how many tokens it was cut off
RUN = "run.json"
PICTURES = "pictures"  # key of a run's identity that those of version 0.1 lack


def answers_file(directory: Path, rank: int = 0) -> Path:
    return directory / (MAIN if rank == 0 else f"answers.rank{rank}.jsonl")


def _all_files(directory: Path) -> list[Path]:
    return [
        path for path in [directory / MAIN, *sorted(directory.glob("answers.rank*.jsonl"))] if path.exists()
    ]


def mend(path: Path) -> None:
    """Cut off a last line that a kill left half-written, and say so."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if not tail:
        return
    logger.warning(
        "%s ends in the middle of a line (%d bytes): the line is dropped, its question is answered again",
        path,
        len(tail),
    )
    with path.open("r+b") as file:
        file.truncate(end)


def read_lines(path: Path) -> list[dict[str, str]]:
    """Answers of one file; a line that is not an answer is refused with its number."""
    answers = []
    # Not splitlines(): an answer may hold U+2028 and its like, which only that would take for line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        if not line and number == 1:
            break
        try:
            answer = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); fix or delete that line"
            ) from error
        if not isinstance(answer, dict) or "id" not in answer or "answer" not in answer:
            raise ValueError(f"{path}, line {number} has no id or no answer; fix or delete that line")
        answers.append(answer)
    return answers


def read_all(directory: Path) -> dict[str, dict[str, str]]:
    """Answers by id over the files of every rank; the first one counts that had its pictures."""
    answers: dict[str, dict[str, str]] = {}
    for path in _all_files(directory):
        for answer in read_lines(path):
            name = str(answer["id"])
            if name not in answers or ERROR in answers[name]:
                answers[name] = answer
    return answers


def merge(directory: Path, order: Iterable[str]) -> list[dict[str, str]]:
    """Answers in the order of the ids, in one answers.jsonl; the files of the other ranks go."""
    answers = read_all(directory)
    merged = [answers[name] for name in order if name in answers]
    write_text(directory / MAIN, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in merged))
    for path in _all_files(directory)[1:]:
        path.unlink()
    return merged


def claim(directory: Path, identity: dict[str, str | int]) -> None:
    """Mark a results directory as belonging to this model, data and setting, or refuse another's."""
    if (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds a model, which answers would change; give another --out")
    make_folder(directory)
    path = directory / RUN
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(PICTURES, identity.get(PICTURES))
        changed = [key for key in {**identity, **found} if found.get(key) != identity.get(key)]
        if changed:
            lines = ", ".join(f"{key} {found.get(key)!r} there, {identity.get(key)!r} now" for key in changed)
            raise ValueError(f"{directory} holds the answers of another run ({lines}); give another --out")
        return
    if _all_files(directory):
        raise ValueError(
            f"{directory} holds answers but no {RUN} that says which run wrote them; give another --out"
        )
    write_text(path, json.dumps(identity, indent=2) + "\n")


class AnswerWriter:
    """Appends answers to a rank's file, each batch flushed to the system at once."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._lines = Lines(answers_file(directory, rank))

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def write(self, answers: Iterable[dict[str, str]]) -> None:
        self._lines.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
