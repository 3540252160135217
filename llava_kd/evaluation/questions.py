"""Questions that a model is asked, whatever file they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question. `text` holds one "<image>" for each of `images` (a file, or the bytes of one)."""

    id: str
    text: str
    images: tuple[Path | bytes, ...] = ()
    truth: str = ""
    kind: str = "all"
    extra: dict[str, str] = field(default_factory=dict)

    def image_bytes(self, index: int) -> bytes:
        source = self.images[index]
        if isinstance(source, bytes):
            return source
        if not source.is_file():
            raise ValueError(f"question {self.id!r}: no image file {source}; check the image root")
        return source.read_bytes()

    def image_name(self) -> str:
        return " ".join(str(image) for image in self.images if isinstance(image, Path))


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash of the ids, texts and truths: the same questions have the same fingerprint wherever they lie."""
    digest = hashlib.sha256()
    for question in questions:
        row = [question.id, question.text, question.truth, question.kind]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def check_questions(questions: list[Question], source: str | Path) -> None:
    """Refuse an empty list, ids that occur twice, and texts whose placeholders do not match the images."""
    if not questions:
        raise ValueError(f"{source} holds no question")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{source}: id {question.id!r} occurs twice; every question needs its own id")
        seen.add(question.id)
        placeholders = question.text.count(IMAGE_PLACEHOLDER)
        if placeholders != len(question.images):
            raise ValueError(
                f"{source}: question {question.id!r} has {placeholders} {IMAGE_PLACEHOLDER} "
                f"and {len(question.images)} images; there must be one for each image"
            )


def image_path(root: Path, name: str, *, owner: str) -> Path:
    """`root / name`; a name that leaves the root is refused."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{owner}: image path {name!r} leaves the image root {root}")
    return root / name


def read_llava_json(path: str | Path, *, image_root: str | Path | None = None) -> list[Question]:
    """Questions of a LLaVA JSON file whose records hold one human and one gpt turn; "type" is the kind.

    Image paths start at `image_root`, which is the directory of the file when it is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no test file {path}; give a LLaVA JSON file")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of records, got {type(records).__name__}")
    root = Path(image_root) if image_root is not None else path.parent
    if image_root is not None and not root.is_dir():
        raise ValueError(f"image root {root} is not a directory")
    questions = [_question(record, index, path, root) for index, record in enumerate(records)]
    check_questions(questions, path)
    return questions


def _question(record: object, index: int, path: Path, root: Path) -> Question:
    if not isinstance(record, dict) or "id" not in record:
        raise ValueError(f"{path}: record {index} has no id")
    name = str(record["id"])
    turns = record.get("conversations")
    if not isinstance(turns, list) or [t.get("from") for t in turns if isinstance(t, dict)] != [
        "human",
        "gpt",
    ]:
        raise ValueError(f"{path}: record {name!r} must hold one human and one gpt turn to be scored")
    for turn in turns:
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise ValueError(f"{path}: record {name!r} has an empty {turn['from']} turn")
    images = record.get("image") or []
    images = images if isinstance(images, list) else [images]
    return Question(
        id=name,
        text=turns[0]["value"],
        images=tuple(image_path(root, str(image), owner=f"record {name!r}") for image in images),
        truth=turns[1]["value"],
        kind=str(record.get("type", "all")),
    )
