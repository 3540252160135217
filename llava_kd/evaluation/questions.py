"""Questions that a model is asked, whatever file they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llava_kd.data.conversation import IMAGE_PLACEHOLDER
from llava_kd.data.records import LlavaJson


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


def check_images(questions: Iterable[Question]) -> None:
    """Refuse, before any model is loaded, questions whose image files are not there."""
    paths = ((q.id, image) for q in questions for image in q.images if isinstance(image, Path))
    missing = [(name, path) for name, path in paths if not path.is_file()]
    if missing:
        shown = "\n  ".join(f"question {name!r}: no image file {path}" for name, path in missing[:5])
        raise ValueError(f"{len(missing)} images are missing; check the image root:\n  {shown}")


def image_path(root: Path, name: str, *, owner: str, follow_symlinks: bool = True) -> Path:
    """`root / name`; a name that leaves the root is refused, a link out of it unless `follow_symlinks`."""
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts
    if leaves or not (follow_symlinks or (root / name).resolve().is_relative_to(root.resolve())):
        raise ValueError(f"{owner}: the image path {name!r} leaves the image root {root}")
    return root / name


def read_llava_json(path: str | Path, *, image_root: str | Path | None = None) -> list[Question]:
    """Questions of a LLaVA file whose records hold one human and one gpt turn; "type" is the kind.

    Image paths start at `image_root`, which is the directory of the file when it is not given.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    if not path.is_file():
        raise ValueError(f"no test file {path}; give a LLaVA .json or .jsonl file")
    source = LlavaJson(path, root)
    questions = []
    for k in range(len(source)):
        record = source.record(k)
        if record.fault:
            raise ValueError(f"{path}: {record.fault}")
        if len(record.turns) != 2:
            raise ValueError(
                f"{path}: record {record.id!r} must hold one question and one answer to be scored, "
                f"got {len(record.turns)} turns"
            )
        owner = f"{path}: record {record.id!r}"
        images = (image_path(root, name, owner=owner, follow_symlinks=False) for name in record.images)
        questions.append(
            Question(
                id=record.id,
                text=record.turns[0].text,
                images=tuple(images),
                truth=record.turns[1].text,
                kind=record.extra.get("type", "all"),
            )
        )
    check_questions(questions, path)
    return questions
