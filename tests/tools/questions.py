"""Sixty held-out questions of each kind: LLaVA records for `llava-kd eval`, messages for the other tools."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_kd.cli import main as llava_kd

COUNT = 60
SQUARE = (80, 80)  # no size of the tower's, so that every tool resizes
ONE, BATCHED, OBLONG, TWO = "one picture", "in batches", "oblong", "two pictures"
NONE, TURNS = "no picture", "three turns"
KINDS = (ONE, BATCHED, OBLONG, TWO, NONE, TURNS)


def records(data: Path, images: Path) -> dict[str, list[dict]]:
    """LLaVA records by kind, sixty questions each; `images` gets pictures made square."""
    asked = json.loads((data / "test.json").read_text())[:COUNT]
    plain = [{**record, "image": str((data / record["image"]).resolve())} for record in asked]
    images.mkdir(parents=True)
    square = []
    for record in plain:
        path = images / f"{record['id']}.png"
        Image.open(record["image"]).convert("RGB").resize(SQUARE, Image.Resampling.BICUBIC).save(path)
        square.append({**record, "image": str(path)})
    kinds = {ONE: square, BATCHED: square, OBLONG: plain}
    after = [*plain[1:], plain[0]]
    kinds[TWO] = [
        {
            "id": record["id"],
            "image": [record["image"], other["image"]],
            "conversations": _talk([_words(record)], ["<image>\n<image>\n"]),
        }
        for record, other in zip(plain, after, strict=True)
    ]
    kinds[NONE] = [{"id": record["id"], "conversations": _talk([_words(record)], [""])} for record in plain]
    kinds[TURNS] = [
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
    """Answers of `llava-kd eval` one by one, of every turn behind the true ones before it."""
    root.mkdir(parents=True)
    (root / "asked.json").write_text(json.dumps(asked))
    words = ["--model", str(model), "--data", str(root / "asked.json"), "--images", "/", "--batch_size", "1"]
    with contextlib.redirect_stdout(None):
        code = llava_kd(["eval", *words, "--out", str(root / "eval")])
    if code:
        raise RuntimeError(f"llava-kd eval ended with {code}")
    lines = (root / "eval" / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def messages(asked: list[dict], size: tuple[int, int] | None, images: Path) -> list[list[dict]]:
    """One list of messages a question; pictures are made `size` (height, width) first where it is given."""
    found = []
    for record in asked:
        paths = record.get("image", [])
        paths = paths if isinstance(paths, list) else [paths]
        paths = [path if size is None else _sized(Path(path), size, images) for path in paths]
        talk: list[dict] = []
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                found.append(talk)
                answer = [{"type": "text", "text": turn["value"]}]
                talk = [*talk, {"role": "assistant", "content": answer}]
                continue
            shown = paths[: turn["value"].count("<image>")]
            parts = [{"type": "image", "path": path} for path in shown]
            text = {"type": "text", "text": turn["value"].replace("<image>\n", "")}
            talk = [*talk, {"role": "user", "content": [*parts, text]}]
    return found


def _sized(path: Path, size: tuple[int, int], images: Path) -> str:
    """As the image processor would resize it."""
    images.mkdir(parents=True, exist_ok=True)
    out = images / f"{path.parent.name}-{path.stem}.png"
    if not out.is_file():
        height, width = size
        Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(out)
    return str(out)
