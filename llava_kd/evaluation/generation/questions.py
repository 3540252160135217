"""Questions that a model is asked, whatever file they come from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.evaluation.generation.noise import Noise

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, behind what was said before it: roles and texts.

    The user's texts hold one "<image>" for each of `images` (a file, or the bytes of one); without any, it is
    a word. `noise` is put on each of them. `begun`: the answer so far, which a model goes on with; its answer
    is what comes after.
    """

    id: str
    text: str
    images: tuple[Path | bytes, ...] = ()
    truth: str = ""
    kind: str = "all"
    extra: dict[str, str] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()
    noise: Noise | None = None
    begun: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        said = [*self.history, ("user", self.text)]
        return [{"role": role, "content": text} for role, text in said]

    @property
    def num_places(self) -> int:
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        return sum(text.count(IMAGE_PLACEHOLDER) for text in asked) if self.images else 0

    def image_name(self) -> str:
        return " ".join(str(image) for image in self.images if isinstance(image, Path))


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash of the ids, texts, truths and noise: the same questions have the same one wherever they lie."""
    digest = hashlib.sha256()
    for question in questions:
        row = [question.id, question.text, question.truth, question.kind, *question.history]
        row += [] if question.noise is None else [str(question.noise)]
        row += [question.begun] if question.begun else []
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def pictures_fingerprint(questions: Iterable[Question]) -> str:
    """Hash of which picture belongs to which question, by the names of their files, wherever they lie."""
    digest = hashlib.sha256()
    for question in questions:
        names = [i.name if isinstance(i, Path) else hashlib.sha256(i).hexdigest() for i in question.images]
        digest.update(json.dumps([question.id, *names]).encode())
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
        placeholders = question.num_places
        if placeholders != len(question.images):
            raise ValueError(
                f"{source}: question {question.id!r} has {placeholders} {IMAGE_PLACEHOLDER} "
                f"and {len(question.images)} images; there must be one for each image"
            )


def check_images(questions: Iterable[Question]) -> None:
    """Refuse, before any model is loaded, questions of which no image is there; name some of the missing."""
    paths = [(q.id, image) for q in questions for image in q.images if isinstance(image, Path)]
    missing = [(name, path) for name, path in paths if not path.is_file()]
    if not missing:
        return
    shown = "\n  ".join(f"question {name!r}: no image file {path}" for name, path in missing[:5])
    if len(missing) == len(paths):
        raise ValueError(f"all {len(paths)} images are missing; check the image root:\n  {shown}")
    logger.warning(
        "%d of %d images are missing; their questions count as wrong:\n  %s", len(missing), len(paths), shown
    )


def image_path(root: Path, name: str, *, owner: str, follow_symlinks: bool = True) -> Path:
    """`root / name`; a name that leaves the root is refused, a link out of it unless `follow_symlinks`."""
    is_inside = (root / name).resolve().is_relative_to(root.resolve())
    is_named_inside = (root.absolute() / name).is_relative_to(root.absolute())
    if ".." in PurePosixPath(name).parts or not (is_inside or is_named_inside):
        raise ValueError(f"{owner}: the image path {name!r} leaves the image root {root}")
    if not (follow_symlinks or is_inside):
        raise ValueError(
            f"{owner}: the image {name!r} leaves the image root {root} through a symbolic link; point the "
            "image root at the real folder, or set data.follow_symlinks (--follow_symlinks)"
        )
    return root / name


def read_llava_json(
    path: str | Path, *, image_root: str | Path | None = None, follow_symlinks: bool = False
) -> list[Question]:
    """Questions of a LLaVA file; "type" is their kind.

    Of a talk every answer is asked for in turn, behind the true ones before it: as ID#1, ID#2, ... A record
    that cannot be asked is named and left out. Image paths start at `image_root`, by default the directory
    of the file.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    if not path.is_file():
        raise ValueError(f"no test file {path}; give a LLaVA .json or .jsonl file")
    source = LlavaJson(path, root)
    questions: list[Question] = []
    faults: list[str] = []
    for k in range(len(source)):
        record = source.record(k)
        try:
            owner = f"{path}: record {record.id!r}"
            if record.fault:
                raise ValueError(record.fault)
            images = [
                image_path(root, name, owner=owner, follow_symlinks=follow_symlinks) for name in record.images
            ]
            questions += questions_of(record, images, owner)
        except ValueError as error:
            faults.append(str(error))
    if faults and not questions:
        raise ValueError(f"{path} holds no usable question: {faults[0]}")
    if faults:
        shown = "\n  ".join(faults[:5])
        logger.warning(
            "%d of %d records hold no usable question and are left out:\n  %s",
            len(faults),
            len(source),
            shown,
        )
    questions = _told_apart(questions)
    check_questions(questions, path)
    return questions


def _told_apart(questions: Iterable[Question]) -> list[Question]:
    """The second answer of record A is A#2, and so is the second record of id A: the later one is A#2#2."""
    seen: set[str] = set()
    last: dict[str, int] = {}
    result = []
    for question in questions:
        name = question.id
        while name in seen:
            last[question.id] = last.get(question.id, 1) + 1
            name = f"{question.id}#{last[question.id]}"
        seen.add(name)
        result.append(question if name == question.id else replace(question, id=name))
    return result


def questions_of(record: Record, images: list[Path], owner: str) -> list[Question]:
    """One for each answer of the record, behind what was said before it. `owner` names it in a message."""
    answers = sum(turn.role == "assistant" for turn in record.turns)
    questions: list[Question] = []
    said: list[tuple[str, str]] = []
    for turn in record.turns:
        if turn.role == "assistant":
            places = sum(text.count(IMAGE_PLACEHOLDER) for role, text in said if images and role == "user")
            if places > len(images):
                raise ValueError(f"{owner} has {places} {IMAGE_PLACEHOLDER} and {len(images)} images")
            questions.append(
                Question(
                    id=record.id if answers == 1 else f"{record.id}#{len(questions) + 1}",
                    text=said[-1][1],
                    images=tuple(images[:places]),
                    truth=turn.text,
                    kind=record.extra.get("type", "all"),
                    history=tuple(said[:-1]),
                )
            )
        said.append((turn.role, turn.text))
    return questions
