"""What fewer bits cost a student: right answers of the whole shapes test set, by the clients of the suite.

    python tests/tools/quantised.py --students runs/students

writes `benchmarks/results/quantised_student.json`, and from it the table of docs/serving.md. The student is
the quickstart's teacher, which the project ships; the data are in the folder of STUDENTS, or made there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from conformance import BATCH, RESULTS, Reference, asked_of, filled
from environments import ROOT, NotRunError
from questions import messages
from students import TEACHER, make_data

from llava_kd.evaluation.scorers.exact import is_correct

RESULT = RESULTS / "quantised_student.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- table of bits -->", "<!-- end of bits -->"
COMMAND = "python tests/tools/quantised.py"
STUDENT = {"siglip-qwen2": TEACHER}


@dataclass(frozen=True, kw_only=True)
class Bits:
    """`tool` and `client` as `asked_of` takes them; rows of one `of` are compared with the first of them."""

    name: str
    of: str
    tool: str
    client: str | None = None
    form: str = "hf"
    weights: str = "float32"


BITS = (
    Bits(name="float32", of="transformers", tool="transformers"),
    Bits(name="8 bits (`load_in_8bit`)", of="transformers", tool="bitsandbytes"),
    Bits(name="4 bits (`nf4`)", of="transformers", tool="bitsandbytes", client="bitsandbytes_4"),
    Bits(name="float32", of="llama.cpp", tool="llama_cpp", form="gguf"),
    Bits(name="8 bits (`q8_0`)", of="llama.cpp", tool="llama_cpp", form="gguf", weights="q8_0"),
    Bits(name="4 bits (`q4_0`)", of="llama.cpp", tool="llama_cpp", form="gguf", weights="q4_0"),
)


def test_set(data: Path) -> list[dict]:
    """Its records, whose pictures are whole paths."""
    records = json.loads((data / "test.json").read_text())
    return [{**record, "image": str((data / record["image"]).resolve())} for record in records]


def answered(bits: Bits, reference: Reference, records: Sequence[dict], root: Path) -> dict:
    """What the tool wrote; its pictures are as large as the tower reads them, where it would pad them."""
    (name,) = reference.students
    size = reference.size(name) if bits.form == "gguf" else None
    job = {
        "directory": str(reference.exported(name, bits.form, bits.weights)),
        "questions": messages(list(records), size, root / "sized"),
        "batch": BATCH,
        "out": str(root / "answers.json"),
    }
    (found,) = asked_of(bits.tool, [job], root, client=bits.client)
    return found


def compared(there: dict, records: Sequence[dict], before: Sequence[bool] | None) -> dict:
    """How many are right; and of those that `before` had right how many are lost, and of the others won."""
    if "error" in there:
        return {"error": there["error"]}
    right = marks(there, records)
    if before is None:
        return {"right": sum(right)}
    pairs = list(zip(right, before, strict=True))
    lost, won = (sum(now is not then and now is gain for now, then in pairs) for gain in (False, True))
    return {"right": sum(right), "lost": lost, "won": won}


def marks(there: dict, records: Sequence[dict]) -> list[bool]:
    truths = [record["conversations"][1]["value"] for record in records]
    return [is_correct(answer, truth) for answer, truth in zip(there["answers"], truths, strict=True)]


def measured(reference: Reference, records: Sequence[dict]) -> dict:
    """What the JSON holds."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows, versions, before = [], {}, {}
    for bits in BITS:
        row = {"of": bits.of, "bits": bits.name, "questions": len(records)}
        with tempfile.TemporaryDirectory() as folder:
            try:
                there = answered(bits, reference, records, Path(folder))
            except NotRunError as error:
                rows.append({**row, "not_run": str(error)})
                continue
        versions |= there["versions"]
        rows.append({**row, **compared(there, records, before.get(bits.of))})
        if "answers" in there:
            before.setdefault(bits.of, marks(there, records))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "command": COMMAND,
        "versions": versions,
        "rows": rows,
    }


def table(result: Mapping) -> str:
    """Markdown, a row for each kind of bits: right answers in per cent, and those lost and won."""
    lines = ["| tool | weights | right | lost | won |", "| --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        told = "error" if "error" in row else "not run"
        right = f"{100 * row['right'] / row['questions']:.1f} %" if "right" in row else told
        lines.append(
            f"| {row['of']} | {row['bits']} | {right} | {row.get('lost', '-')} | {row.get('won', '-')} |"
        )
    count = max(row["questions"] for row in result["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    made = f"{result['date']}, {result['commit']}, `{result['command']}`"
    return "\n".join([*lines, "", f"{count} questions; {versions}; {made}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--students", type=Path, default=ROOT / ".tools" / "students")
    arguments = parser.parse_args()
    data = make_data(arguments.students)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Reference(STUDENT, data, Path(folder)), test_set(data))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), BEGIN, table(result), END))
    print(table(result))


if __name__ == "__main__":
    main()
