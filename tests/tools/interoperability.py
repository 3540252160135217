"""Sixty questions of each kind, asked of a student in llama.cpp's server, against `llava-kd eval`.

    python tests/tools/interoperability.py --model scripts/quickstart/backbones/teacher --data runs/shapes \
        --json benchmarks/results/interoperability_cpu.json --page docs/interoperability.md

DATA is what `llava-kd data shapes` wrote. The table of the page stands between two marks and is made anew.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from environments import PINS, python_of, run
from PIL import Image

from llava_kd.cli import main as llava_kd
from llava_kd.models.files.checkpoint import load_processor
from llava_kd.models.towers.vision_tower import input_size

HERE = Path(__file__).parent
COUNT = 60
SQUARE = (80, 80)  # no size of the tower's, so that llama.cpp resizes
DTYPES = ("float32", "float16", "bfloat16", "q8_0")
CLIENT = "sized by the client"
BEGIN, END = "<!-- table of llama.cpp -->", "<!-- end of table -->"


def records(data: Path, images: Path) -> dict[str, list[dict]]:
    """LLaVA records by kind of question, sixty questions each; `images` gets pictures made square."""
    asked = json.loads((data / "test.json").read_text())[:COUNT]
    plain = [{**record, "image": str((data / record["image"]).resolve())} for record in asked]
    square = []
    for record in plain:
        path = images / f"{record['id']}.png"
        Image.open(record["image"]).convert("RGB").resize(SQUARE, Image.Resampling.BICUBIC).save(path)
        square.append({**record, "image": str(path)})
    kinds = {"one picture, square": square, "one picture, oblong": plain}
    kinds["no picture"] = [
        {"id": record["id"], "conversations": _talk([_words(record)], [""])} for record in plain
    ]
    after = [*plain[1:], plain[0]]
    kinds["two pictures"] = [
        {
            "id": record["id"],
            "image": [record["image"], other["image"]],
            "conversations": _talk([_words(record)], ["<image>\n<image>\n"]),
        }
        for record, other in zip(plain, after, strict=True)
    ]
    kinds["three turns"] = [
        {
            "id": plain[k]["id"],
            "image": plain[k]["image"],
            "conversations": _talk([_words(plain[k + step]) for step in range(3)], ["<image>\n", "", ""]),
        }
        for k in range(0, COUNT, 3)
    ]
    return kinds


def _words(record: dict) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in record["conversations"])
    return question.removeprefix("<image>\n"), answer


def _talk(pairs: Sequence[tuple[str, str]], before: Sequence[str]) -> list[dict]:
    turns = []
    for (question, answer), pictures in zip(pairs, before, strict=True):
        turns += [{"from": "human", "value": pictures + question}, {"from": "gpt", "value": answer}]
    return turns


def expected(model: Path, asked: list[dict], root: Path) -> list[str]:
    """Answers of `llava-kd eval`, of every turn behind the true ones before it."""
    (root / "asked.json").write_text(json.dumps(asked))
    words = ["--model", str(model), "--data", str(root / "asked.json"), "--images", "/", "--batch_size", "1"]
    code = llava_kd(["eval", *words, "--out", str(root / "eval")])
    if code:
        raise RuntimeError(f"llava-kd eval ended with {code}")
    lines = (root / "eval" / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def requests(asked: list[dict], picture: Callable[[Path], bytes]) -> list[dict]:
    """OpenAI's form, one for each question: pictures in base64, as parts before the words."""
    found = []
    for record in asked:
        images = record.get("image", [])
        images = images if isinstance(images, list) else [images]
        messages: list[dict] = []
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                found.append({"path": "/v1/chat/completions", "body": _body(messages)})
                messages = [*messages, {"role": "assistant", "content": turn["value"]}]
                continue
            text = turn["value"].replace("<image>\n", "")
            count = turn["value"].count("<image>")
            parts = [_part(picture(Path(path))) for path in images[:count]]
            messages = [*messages, {"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return found


def _body(messages: list[dict]) -> dict:
    return {"messages": messages, "temperature": 0, "max_tokens": 32}


def _part(content: bytes) -> dict:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sized(size: tuple[int, int]) -> Callable[[Path], bytes]:
    """A client that makes pictures as large as the tower reads them, as the image processor would."""

    def picture(path: Path) -> bytes:
        stream = io.BytesIO()
        height, width = size
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        image.save(stream, "PNG")
        return stream.getvalue()

    return picture


def rows(model: Path, data: Path, root: Path, dtypes: Sequence[str] = DTYPES) -> tuple[list[dict], str]:
    """One row a kind of question and type of weights; the version of the tool."""
    (root / "images").mkdir(parents=True)
    kinds = records(data, root / "images")
    size = input_size(load_processor(str(model)).image_processor)
    cases = [("one picture, square", "as it is", Path.read_bytes, dtype) for dtype in dtypes]
    cases += [
        ("one picture, oblong", CLIENT, sized(size), dtypes[0]),
        ("one picture, oblong", "as it is", Path.read_bytes, dtypes[0]),
        ("no picture", "", Path.read_bytes, dtypes[0]),
        ("two pictures", CLIENT, sized(size), dtypes[0]),
        ("three turns", CLIENT, sized(size), dtypes[0]),
    ]
    answers = {}
    for k, (kind, asked) in enumerate(kinds.items()):
        (root / str(k)).mkdir()
        answers[kind] = expected(model, asked, root / str(k))
    for dtype in dtypes:
        words = ["--out", str(root / dtype), "--format", "gguf", "--dtype", dtype]
        if llava_kd(["export", str(model), *words]):
            raise RuntimeError(f"llava-kd export --dtype {dtype} failed")
    jobs = [
        {
            "directory": str(root / dtype),
            "requests": requests(kinds[kind], picture),
            "out": str(root / f"answers{k}.json"),
        }
        for k, (kind, _, picture, dtype) in enumerate(cases)
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    run(python_of("llama_cpp"), HERE / "llama_cpp_answers.py", str(root / "jobs.json"))
    found, version = [], ""
    for job, (kind, picture, _, dtype) in zip(jobs, cases, strict=True):
        there = json.loads(Path(job["out"]).read_text())
        version = there["xllamacpp"]
        texts = [one["choices"][0]["message"]["content"].strip() for one in there["answers"]]
        alike = sum(a == b for a, b in zip(texts, answers[kind], strict=True))
        found.append(
            {"questions": kind, "pictures": picture, "dtype": dtype, "alike": alike, "of": len(texts)}
        )
    return found, version


def table(result: dict) -> str:
    """Markdown of what the JSON says."""
    lines = [
        f"Model `{result['model']}`, {result['date']}, {result['versions']}. Made by",
        f"`{result['command']}`.",
        "",
        "| questions | pictures | weights | same answers |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['questions']} | {row['pictures']} | {row['dtype']} | {row['alike']} of {row['of']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def fill(page: str, result: dict) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, version = rows(arguments.model, arguments.data, Path(folder) / "work")
    words = [f"--{name} {getattr(arguments, name)}" for name in ("model", "data", "json")]
    versions = {"xllamacpp": version, "torch": torch.__version__, "transformers": transformers.__version__}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python tests/tools/interoperability.py", *words]),
        "model": str(arguments.model),
        "pins": list(PINS["llama_cpp"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "rows": found,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if arguments.page:
        arguments.page.write_text(fill(arguments.page.read_text(), result))


if __name__ == "__main__":
    main()
