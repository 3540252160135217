"""What every client speaks: a file of jobs in, a file of answers out. Needs nothing but Python.

    python with_TOOL.py JOBS.json

JOBS is a list of {"directory", "questions", "batch", "out"}; a question is a list of messages {"role",
"content"}, whose parts are {"type": "image", "path"} and {"type": "text", "text"}. The file `out` holds the
versions of the packages, and either "answers", one text a question, or "error".
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

NEW_TOKENS = 32
Question = list[dict]
Answers = Callable[[Sequence[Question], int], list[str]]


def work(opened: Callable[[str], AbstractContextManager[Answers]], *packages: str) -> None:
    """Answer the file of jobs that the command names; `opened` gives what answers for a directory."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for directory, same in itertools.groupby(jobs, key=lambda job: job["directory"]):
        todo = list(same)
        try:
            with opened(directory) as answers:
                for job in todo:
                    _write(job, versions, _answered(answers, job))
        except Exception as error:  # a student that does not open does not stop the others
            for job in todo:
                if not Path(job["out"]).is_file():
                    _write(job, versions, {"error": _line(error)})


def _answered(answers: Answers, job: dict) -> dict:
    try:
        return {"answers": [text.strip() for text in answers(job["questions"], job["batch"])]}
    except Exception as error:
        return {"error": _line(error)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {last_error(str(error))}"


def last_error(log: str) -> str:
    """The last exception that a program's log names, or else its last line: 300 letters at most.

    Lines of a traceback, which begin with spaces and name folders of the machine, are none of both.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line[0].isspace()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _write(job: dict, versions: dict[str, str], found: dict) -> None:
    Path(job["out"]).write_text(json.dumps({"versions": versions, **found}))
