"""Models that write data: answers to questions, questions about images, and agreement between two models.

Elicitation as the survey of Xu et al. (arXiv 2402.13116) names it: D = {parse(o, s) : o ~ p_T(o | prompt, s)}
over seeds s. Here a seed is an image with a question (label), or with a prompt of the user's (expand).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kd.curation.elicit.entries import Asked, Dropped, entry_of, read_records
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, Record, Turn
from llava_kd.durable import write_whole
from llava_kd.evaluation.answers import CUT, ERROR
from llava_kd.evaluation.generation.questions import Question, image_path
from llava_kd.evaluation.generation.writing import Writing
from llava_kd.evaluation.runner import Model, answer_questions
from llava_kd.evaluation.scorers.exact import is_correct, normalise

RECORDS, DROPPED, SUMMARY = "records.json", "dropped.jsonl", "elicited.json"
_BULLET = re.compile(r"^\s*(?:[-*\u2022]\s+|\(?\d+[.):]\s*|Q(?:uestion)?\s*\d*\s*[:.]\s*)+", re.IGNORECASE)
_MAX_PROMPTS_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked: `model` answers `batch_size` questions at once, as `writing` says."""

    model: Model
    writing: Writing
    batch_size: int = 32
    max_new_tokens: int = 256
    progress: bool = True

    def answers(self, questions: Sequence[Question], out: Path) -> dict[str, dict[str, str]]:
        """By question id; kept in `out`, where the same call goes on. Every rank gets all of them."""
        given, _ = answer_questions(
            self.model,
            questions,
            out,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            progress=self.progress,
            writing=self.writing,
        )
        return {answer["id"]: answer for answer in given}

    def provenance(self, how: str, prompt: str) -> dict[str, object]:
        """What a record says of where it comes from."""
        return {
            "how": how,
            "model": str(self.model.directory),
            "model_hash": self.model.fingerprint,
            "prompt": prompt,
            "settings": {
                "temperature": self.writing.temperature,
                "top_p": self.writing.top_p,
                "max_new_tokens": self.max_new_tokens,
                "dtype": self.model.dtype,
            },
            "seed": self.writing.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Made:
    """Records that were written, and what was dropped on the way."""

    entries: Sequence[Mapping[str, object]]
    dropped: Sequence[Dropped]

    def write(self, out: Path, provenance: Mapping[str, object]) -> str:
        """Write the records, those dropped with their reasons, and a summary; what to say of them.

        Raises ValueError where no record is left.
        """
        rows = (json.dumps(vars(one)).encode() + b"\n" for one in self.dropped)
        write_whole(out / DROPPED, rows)
        if not self.entries:
            reason = self.dropped[0].reason if self.dropped else "nothing was asked"
            raise ValueError(
                f"no record is left of {len(self.dropped)}: {out / DROPPED} says why; the first: {reason}"
            )
        write_whole(out / RECORDS, _as_list(self.entries))
        summary = {"records": len(self.entries), "dropped": len(self.dropped), **provenance}
        write_whole(out / SUMMARY, [json.dumps(summary, indent=1).encode() + b"\n"])
        left = f"; {len(self.dropped)} are dropped, {out / DROPPED} says why" if self.dropped else ""
        return f"{len(self.entries)} records in {out / RECORDS}{left}"


def _as_list(entries: Iterable[Mapping[str, object]]) -> Iterable[bytes]:
    before = b"[\n"
    for entry in entries:
        yield before + json.dumps(entry).encode()
        before = b",\n"
    yield b"\n]\n"


def refused(answer: Mapping[str, str]) -> str:
    """Why an answer is no data; nothing where it is."""
    if ERROR in answer:
        return answer[ERROR]
    if not answer["answer"].strip():
        return "the answer is empty"
    if CUT in answer:
        return f"the answer was cut off after {answer[CUT]} tokens; raise --max_new_tokens"
    return ""


def label(asking: Asking, asked: Sequence[Asked], out: Path) -> Made:
    """Each record with the model's answers. One with an answer that is empty or cut off is dropped whole."""
    questions = [question for one in asked for question in one.questions]
    answers = asking.answers(questions, out / "answers")
    entries, dropped = [], []
    for one in asked:
        given = [answers[question.id] for question in one.questions]
        if reason := next(filter(None, map(refused, given)), ""):
            dropped.append(Dropped(id=one.record.id, reason=reason))
            continue
        texts = [answer["answer"] for answer in given]
        entries.append(one.entry(texts, asking.provenance("label", one.questions[-1].text)))
    return Made(entries=entries, dropped=dropped)


def read_prompts(path: str | Path) -> list[str]:
    """One a line. Raises ValueError for a file without any, and for an image placeholder, which is put."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no prompt file {path}; give a text file with one prompt a line")
    if path.stat().st_size > _MAX_PROMPTS_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; prompts have at most {_MAX_PROMPTS_BYTES}")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, but byte {error.start} is not; save it as UTF-8"
        ) from error
    if not prompts or any(IMAGE_PLACEHOLDER in prompt for prompt in prompts):
        raise ValueError(
            f"{path} must hold prompts, one a line, without {IMAGE_PLACEHOLDER}, which is put first"
        )
    return prompts


def expand(
    asking: Asking,
    data: str | Path,
    prompts: Sequence[str],
    out: Path,
    *,
    image_root: str | Path | None,
    follow_symlinks: bool = False,
) -> Made:
    """New questions about the images of `data`, without answers: every prompt is asked of every image.

    Of what the model writes each line that ends with a question mark is one, unless the same is asked of
    that image already. Raises ValueError for data without images.
    """
    path = Path(data)
    root = Path(image_root) if image_root is not None else path.parent
    first, known = _by_images(record for record, _ in read_records(path))
    if not first:
        raise ValueError(f"{path} has no record with an image to ask questions about")
    dropped, questions = [], []
    for images, record in first.items():
        owner = f"record {record.id!r}"
        try:
            files = [image_path(root, name, owner=owner, follow_symlinks=follow_symlinks) for name in images]
        except ValueError as error:
            dropped.append(Dropped(id=record.id, reason=str(error)))
            continue
        places = f"{IMAGE_PLACEHOLDER}\n" * len(images)
        questions += [
            (images, Question(id=f"{record.id}~{k}", text=places + prompt, images=tuple(files)))
            for k, prompt in enumerate(prompts)
        ]
    answers = asking.answers([question for _, question in questions], out / "answers")
    entries = []
    for images, question in questions:
        answer = answers[question.id]
        new = [] if ERROR in answer else questions_in(answer["answer"], known[images])
        if not new:
            reason = answer.get(ERROR) or "no line of it is a new question"
            dropped.append(Dropped(id=question.id, reason=reason))
        known[images].update(map(normalise, new))
        origin = asking.provenance("expand", question.text)
        for k, text in enumerate(new):
            turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(images) + text)
            entries.append(entry_of(Record(id=f"{question.id}.{k}", images=images, turns=(turn,)), origin))
    return Made(entries=entries, dropped=dropped)


def _by_images(
    records: Iterable[Record],
) -> tuple[dict[tuple[str, ...], Record], dict[tuple[str, ...], set[str]]]:
    """The first record of every image or group of images, and what is asked of them, normalised."""
    first: dict[tuple[str, ...], Record] = {}
    known: dict[tuple[str, ...], set[str]] = {}
    for record in records:
        if record.fault or not record.images:
            continue
        first.setdefault(record.images, record)
        asked = (turn.text.replace(IMAGE_PLACEHOLDER, "") for turn in record.turns if turn.role == "user")
        known.setdefault(record.images, set()).update(map(normalise, asked))
    return first, known


def questions_in(text: str, known: set[str]) -> list[str]:
    """Lines that end with a question mark, without what numbers them, each once and none of the known."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        asked = _BULLET.sub("", line).replace(IMAGE_PLACEHOLDER, "").strip().strip('"').strip()
        if asked.endswith("?") and len(asked) > 1 and normalise(asked) not in known:
            found.setdefault(normalise(asked), asked)
    return list(found.values())


def agreeing(asking: Asking, asked: Sequence[Asked], out: Path) -> Made:
    """Records all of whose answers this second model gives too, up to case and a final full stop."""
    questions = [question for one in asked for question in one.questions]
    answers = asking.answers(questions, out / "answers")
    entries, dropped = [], []
    for one in asked:
        other = next(
            (
                answers[question.id]["answer"]
                for question in one.questions
                if not is_correct(answers[question.id]["answer"], question.truth)
            ),
            None,
        )
        if other is not None:
            dropped.append(Dropped(id=one.record.id, reason=f"the other model answers {other[:80]!r}"))
            continue
        origin = asking.provenance("agreement", one.questions[-1].text)
        entries.append(one.entry([question.truth for question in one.questions], origin))
    return Made(entries=entries, dropped=dropped)
