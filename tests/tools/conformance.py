"""Sixty questions of each kind, asked of small students in other people's tools, against `llava-kd eval`.

    python tests/tools/conformance.py vllm llama_cpp --students runs/students

writes `benchmarks/results/tools_<TOOL>.json` for each tool, and from all of these files the table of
docs/interoperability.md. STUDENTS is what tests/tools/students.py wrote, or where it is written now.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from clients.protocol import last_error
from environments import PINS, ROOT, NotRunError, python_of, run
from questions import BATCHED, KINDS, OBLONG, ONE, expected, messages, records
from students import make_all

from llava_kd.cli import main as llava_kd
from llava_kd.models.files.checkpoint import load_processor
from llava_kd.models.towers.vision_tower import input_size

CLIENTS = Path(__file__).parent / "clients"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "interoperability.md"
BEGIN, END = "<!-- table of tools -->", "<!-- end of table -->"
BATCH = 10
AS_IT_IS = "oblong as it is"
ENOUGH = 58
SECONDS = 5000


@dataclass(frozen=True, kw_only=True)
class Tool:
    """`weights`: types of export, of which those after the first are asked about one picture alone; `sizes`:
    the client makes pictures as large as the tower reads them; `without`: kinds that it has no way to ask."""

    name: str
    form: str = "hf"
    weights: tuple[str, ...] = ("float32",)
    sizes: bool = False
    without: Mapping[str, str] = field(default_factory=dict)


TOOLS = {
    "transformers": Tool(name="transformers, pinned"),
    "transformers_floor": Tool(name="transformers, oldest"),
    "transformers_4": Tool(name="transformers 4"),
    "transformers_serve": Tool(name="transformers serve"),
    "bitsandbytes": Tool(name="bitsandbytes, 8 bits"),
    "openvino": Tool(name="OpenVINO"),
    "lmms_eval": Tool(
        name="lmms-eval",
        without={BATCHED: "`llava_hf` takes a batch of one"},
    ),
    "vllm": Tool(name="vLLM"),
    "llama_cpp": Tool(
        name="llama.cpp",
        form="gguf",
        weights=("float32", "float16", "bfloat16", "q8_0", "q4_0"),
        sizes=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    student: str
    weights: str
    kind: str
    asked: str  # the kind whose records are asked
    sizes: bool = False


def cases(tool: Tool, students: Sequence[str]) -> list[Case]:
    found = []
    for student in students:
        for weights in tool.weights:
            kinds = KINDS if weights == tool.weights[0] else (ONE,)
            for kind in kinds:
                if kind not in tool.without:
                    sizes = tool.sizes and kind not in (ONE, BATCHED)
                    found.append(Case(student=student, weights=weights, kind=kind, asked=kind, sizes=sizes))
            if tool.sizes and weights == tool.weights[0]:
                found.append(Case(student=student, weights=weights, kind=AS_IT_IS, asked=OBLONG))
    return found


class Reference:
    """What `llava-kd eval` answers, asked once for each student and kind."""

    def __init__(self, students: Mapping[str, Path], data: Path, root: Path) -> None:
        self.students, self.data, self.root = students, data, root
        self.records = records(data, root / "square")
        self._found: dict[tuple[str, str], list[str]] = {}

    def exported(self, student: str, form: str, weights: str) -> Path:
        """An export of it, written once for all tools."""
        out = self.root / "exports" / f"{student}-{form}-{weights}"
        if not out.is_dir():
            source = str(self.students[student])
            words = ["export", source, "--out", str(out), "--format", form, "--dtype", weights]
            if llava_kd(words):
                raise RuntimeError(f"llava-kd {' '.join(words)} failed")
        return out

    def answers(self, student: str, kind: str) -> list[str]:
        kind = ONE if kind == BATCHED else kind
        if (student, kind) not in self._found:
            place = self.root / "eval" / student / kind.replace(" ", "_")
            self._found[student, kind] = expected(self.students[student], self.records[kind], place)
        return self._found[student, kind]

    def size(self, student: str) -> tuple[int, int]:
        return input_size(load_processor(str(self.students[student])).image_processor)


def rows(name: str, reference: Reference, root: Path) -> tuple[list[dict], dict[str, str]]:
    """One row a case; the versions that answered. NotRunError where the tool cannot be installed."""
    tool = TOOLS[name]
    todo = cases(tool, list(reference.students))
    jobs = []
    for k, case in enumerate(todo):
        directory = reference.exported(case.student, tool.form, case.weights)
        size = reference.size(case.student) if case.sizes else None
        asked = messages(reference.records[case.asked], size, root / "sized" / case.student)
        batch = BATCH if case.kind == BATCHED else 1
        out = root / f"answers{k}.json"
        jobs.append({"directory": str(directory), "questions": asked, "batch": batch, "out": str(out)})
    found, versions = [], {}
    for case, there in zip(todo, asked_of(name, jobs, root), strict=True):
        versions |= there["versions"]
        found.append(compared(case, there, reference.answers(case.student, case.asked)))
    return found, versions


ALIKE = ("transformers", "transformers_floor", "transformers_4")  # one client, several versions


def asked_of(name: str, jobs: Sequence[dict], root: Path, *, client: str | None = None) -> list[dict]:
    """What a tool's client wrote for each job; an error where it wrote nothing. NotRunError as above."""
    python = sys.executable if name == "transformers" else python_of(name)
    program = CLIENTS / f"with_{client or ('transformers' if name in ALIKE else name)}.py"
    (root / "jobs.json").write_text(json.dumps(jobs))
    broken = {"versions": {}, "error": "it wrote no answer"}
    try:
        run(python, program, str(root / "jobs.json"), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        broken["error"] = f"{program.name} did not end within {SECONDS} s"
    except RuntimeError as error:
        broken["error"] = f"{program.name}: {last_error(str(error))}"
    outs = [Path(job["out"]) for job in jobs]
    return [json.loads(out.read_text()) if out.is_file() else broken for out in outs]


def compared(case: Case, there: dict, expected: list[str]) -> dict:
    """A row: what a client wrote against the answers of `llava-kd eval`."""
    row = {"student": case.student, "weights": case.weights, "questions": case.kind, "of": len(expected)}
    if "error" in there:
        return {**row, "error": there["error"]}
    pairs = list(zip(there["answers"], expected, strict=True))
    different = [{"there": a, "here": b} for a, b in pairs if a != b]
    return {
        **row,
        "alike": len(pairs) - len(different),
        "different_answers_here": len(set(expected)),
        "differences": different[:5],
    }


def measured(name: str, reference: Reference, command: str) -> dict:
    """What the JSON of a tool holds."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    pins = PINS / f"{name}.txt"
    result = {
        "tool": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "command": command,
        "llava_kd": {p: importlib.metadata.version(p) for p in ("torch", "transformers")},
        "pins": pins.read_text().splitlines() if pins.is_file() else ["constraints.txt"],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            found, versions = rows(name, reference, Path(folder))
        except NotRunError as error:
            return {**result, "not_run": str(error), "rows": []}
    return {**result, "versions": versions, "rows": found}


def table(results: Mapping[str, dict]) -> str:
    """Markdown of what the files say: tools down, kinds of questions across."""
    lines = [
        f"| tool | student | weights | {' | '.join(KINDS)} |",
        "| --- | --- | --- |" + " --- |" * len(KINDS),
    ]
    for name, tool in TOOLS.items():
        result = results.get(name)
        if result is None or "not_run" in result:
            lines.append(f"| {tool.name} |  |  |{' not run |' * len(KINDS)}")
            continue
        asked = {(row["student"], row["weights"]): None for row in result["rows"]}
        for student, weights in asked:
            cells = [_cell(result["rows"], student, weights, kind) for kind in KINDS]
            lines.append(f"| {tool.name} | {student} | {weights} | {' | '.join(cells)} |")
    lines += ["", *(_told(tool, results.get(name)) for name, tool in TOOLS.items())]
    return "\n".join(lines)


def _cell(found: Sequence[dict], student: str, weights: str, kind: str) -> str:
    row = _of(found, student, weights, kind)
    if row is None:
        return "-"
    if "error" in row:
        return "error"
    other = _of(found, student, weights, AS_IT_IS) if kind == OBLONG else None
    return str(row["alike"]) + (f" ({other['alike']} as it is)" if other and "alike" in other else "")


def _of(found: Sequence[dict], student: str, weights: str, kind: str) -> dict | None:
    keys = {"student": student, "weights": weights, "questions": kind}
    return next((row for row in found if keys.items() <= row.items()), None)


def _told(tool: Tool, result: dict | None) -> str:
    if result is None:
        return f"- {tool.name}: not run."
    if "not_run" in result:
        return f"- {tool.name}: not run, {result['date']}: {' '.join(result['not_run'].split())}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"- {tool.name}: {versions}; {result['date']}, {result['commit']}, `{result['command']}`."


def write_result(folder: Path, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"tools_{result['tool']}.json").write_text(json.dumps(result, indent=1) + "\n")


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    return {
        name: json.loads(path.read_text())
        for name in TOOLS
        if (path := folder / f"tools_{name}.json").is_file()
    }


def filled(page: str, begin: str, text: str, end: str) -> str:
    """The page with `text` between two marks of it."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)}; none: the page alone")
    parser.add_argument("--students", type=Path, default=ROOT / ".tools" / "students")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - set(TOOLS):
        parser.error(f"there are {', '.join(TOOLS)}, and no {', '.join(sorted(unknown))}")
    if arguments.tools:
        students = make_all(arguments.students)
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(students, arguments.students / "data", Path(folder))
            for name in arguments.tools:
                result = measured(name, reference, f"python tests/tools/conformance.py {name}")
                write_result(arguments.out, result)
                shown = {(row["student"], row["weights"], row["questions"]): row for row in result["rows"]}
                for key, row in shown.items():
                    print(name, *key, row.get("alike", row.get("error")), "of", row["of"], flush=True)
                print(result.get("not_run", f"{name}: {result.get('versions')}"), flush=True)
    if arguments.out == RESULTS:
        PAGE.write_text(filled(PAGE.read_text(), BEGIN, table(read_results()), END))


if __name__ == "__main__":
    main()
