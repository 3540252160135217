"""Evaluate a stock LLaVA directory on a LLaVA JSON test file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

from llava_kd.durable import write_text
from llava_kd.evaluation.answers import ERROR, PICTURES, answers_file, claim, mend, merge, read_all
from llava_kd.evaluation.generation.generate import Generator, generate, pictures
from llava_kd.evaluation.generation.model_directory import model_directory
from llava_kd.evaluation.generation.noise import Noise, check_levels
from llava_kd.evaluation.generation.prompt import check_template
from llava_kd.evaluation.generation.questions import (
    Question,
    check_images,
    fingerprint,
    pictures_fingerprint,
    read_llava_json,
)
from llava_kd.evaluation.generation.ranks import Ranks, join_ranks
from llava_kd.evaluation.generation.writing import GREEDY, Writing
from llava_kd.evaluation.scorers.exact import score_exact
from llava_kd.evaluation.stopwatch import counted, seconds_spent

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
NOISE_TABLE = "noise.md"
MAX_NEW_TOKENS = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NoiseSummary(TypedDict):
    """Accuracy of the questions that have a picture, by the level of its noise; "0" is without any."""

    accuracy: dict[str, float]
    count: int
    seed: int


class Summary(TypedDict):
    """What summary.json holds; accuracies are fractions."""

    accuracy: float
    by_type: dict[str, float]
    count: int
    count_by_type: dict[str, int]
    noise: NotRequired[NoiseSummary]
    unreadable: int
    seconds: float
    model: str
    data: str
    fingerprints: dict[str, str | int]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked. `max_new_tokens` None is 32, or each benchmark's own; a device and a type of
    None are the best that there is. `limit`: the first questions of each benchmark alone, for a trial.
    `noise`: levels of noise at which pictures are asked about once more, as drawn from `noise_seed`.
    """

    batch_size: int = 32
    max_new_tokens: int | None = None
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    progress: bool = True
    noise: Sequence[float] = ()
    noise_seed: int = 0


_ASKING = Asking()


def evaluate(
    model_dir: str | Path,
    data_json: str | Path,
    out_dir: str | Path,
    *,
    image_root: str | Path | None = None,
    follow_symlinks: bool = False,
    asking: Asking = _ASKING,
) -> Summary:
    """Ask every question of a LLaVA JSON file, write OUT/answers.jsonl and OUT/summary.json; the summary.

    Under torchrun each rank answers its part. A killed run continues from the answers on disk; a directory
    that holds the answers of another model, file or setting is refused. Answers under noise stand in
    OUT/noise_LEVEL, and their accuracies in the summary and in OUT/noise.md.
    """
    levels = check_levels(asking.noise)
    if asking.limit is not None:
        raise ValueError("a limit needs a benchmark; of a LLaVA JSON file every question is evaluated")
    model_dir, out_dir = model_directory(model_dir), Path(out_dir)
    questions = read_llava_json(data_json, image_root=image_root, follow_symlinks=follow_symlinks)
    if levels and not any(question.images for question in questions):
        raise ValueError(f"{data_json} has no question with a picture, so leave the noise out")
    ranks = join_ranks()
    model = Model(model_dir, ranks=ranks, device=asking.device, dtype=asking.dtype)
    answers, seconds = _asked(model, questions, out_dir, asking)
    score = score_exact(answers)
    summary: Summary = {
        "accuracy": score.accuracy,
        "by_type": score.by_type,
        "count": score.count,
        "count_by_type": score.count_by_type,
        "unreadable": sum(ERROR in answer for answer in answers),
        "seconds": round(seconds, 3),
        "model": str(model_dir),
        "data": str(data_json),
        "fingerprints": json.loads((out_dir / "run.json").read_text(encoding="utf-8")),
        "versions": versions(),
    }
    if levels:
        summary["noise"] = _under_noise(model, questions, answers, out_dir, asking)
    if ranks.rank == 0:
        if "noise" in summary:
            write_text(out_dir / NOISE_TABLE, noise_table(summary["noise"]))
        write_text(out_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _asked(
    model: Model, questions: Sequence[Question], out_dir: Path, asking: Asking
) -> tuple[list[dict[str, str]], float]:
    return answer_questions(
        model,
        questions,
        out_dir,
        batch_size=asking.batch_size,
        max_new_tokens=asking.max_new_tokens or MAX_NEW_TOKENS,
        progress=asking.progress,
    )


def _under_noise(
    model: Model,
    questions: Sequence[Question],
    plain: Sequence[dict[str, str]],
    out_dir: Path,
    asking: Asking,
) -> NoiseSummary:
    """The questions that have a picture, level by level; `plain` are the answers without noise."""
    seen = [question for question in questions if question.images]
    without = [answer for q, answer in zip(questions, plain, strict=True) if q.images]
    accuracy = {"0": score_exact(without).accuracy}
    for level in check_levels(asking.noise):
        noise = Noise(level=level, seed=asking.noise_seed)
        answers, _ = _asked(
            model, [replace(q, noise=noise) for q in seen], out_dir / f"noise_{level:g}", asking
        )
        accuracy[f"{level:g}"] = score_exact(answers).accuracy
    return {"accuracy": accuracy, "count": len(seen), "seed": asking.noise_seed}


def noise_table(found: NoiseSummary) -> str:
    """Markdown: a level a row, and what it lost."""
    plain = found["accuracy"]["0"]
    rows = [
        f"| {level} | {100 * value:.1f} | {100 * (value - plain):+.1f} |"
        for level, value in found["accuracy"].items()
    ]
    head = f"| noise | accuracy of {found['count']:,} questions, % | points |\n|---|---|---|"
    return "\n".join([head, *rows]) + "\n"


class Model:
    """A stock LLaVA directory that is loaded when the first question is asked, and once."""

    def __init__(
        self, directory: Path, *, ranks: Ranks, device: str | None = None, dtype: str | None = None
    ) -> None:
        self.directory = directory
        self.ranks = ranks
        self._device = ranks.device(device)
        self.dtype = dtype or ("bfloat16" if self._device.type == "cuda" else "float32")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self._generator: Generator | None = None

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.directory)

    def generator(self, max_new_tokens: int, writing: Writing = GREEDY) -> Generator:
        if self._generator is None:
            self._generator = Generator.load(self.directory, device=self._device, dtype=DTYPES[self.dtype])
        return replace(self._generator, max_new_tokens=max_new_tokens, writing=writing)


def answer_questions(
    model: Model,
    questions: Sequence[Question],
    out_dir: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
    writing: Writing = GREEDY,
) -> tuple[list[dict[str, str]], float]:
    """Every question answered, on disk, in the order of the questions; and the seconds of all calls.

    One whose pictures cannot be read has the empty answer, and is asked again once they can.
    """
    ranks = model.ranks
    identity: dict[str, str | int] = {
        "model": model.fingerprint,
        "data": fingerprint(questions),
        PICTURES: pictures_fingerprint(questions),
        "max_new_tokens": max_new_tokens,
        "dtype": model.dtype,
        **writing.identity,
    }
    if ranks.rank == 0:
        claim(out_dir, identity)
        for path in [answers_file(out_dir), *out_dir.glob("answers.rank*.jsonl")]:
            mend(path)
    ranks.barrier()
    done = read_all(out_dir)
    todo = [q for q in questions if q.id not in done or (ERROR in done[q.id] and not pictures(q)[1])]
    if done and todo and ranks.rank == 0:
        logger.warning(
            "%s: %d of %d questions are answered; continuing",
            out_dir,
            len(questions) - len(todo),
            len(questions),
        )
    check_images(todo)
    if todo:
        with counted(out_dir) if ranks.rank == 0 else nullcontext():
            generator = model.generator(max_new_tokens, writing)
            check_template(generator.processor, (question.messages for question in todo))
            ranks.barrier()  # every rank has read what was there before any adds to it
            generate(generator, todo, out_dir=out_dir, ranks=ranks, batch_size=batch_size, progress=progress)
            ranks.barrier()
    ranks.barrier()
    if ranks.rank == 0:
        merge(out_dir, [question.id for question in questions])
    ranks.barrier()
    answers = read_all(out_dir)
    missing = [question.id for question in questions if question.id not in answers]
    if missing:
        raise ValueError(
            f"{out_dir}: {len(missing)} questions have no answer, the first is {missing[0]!r}; run again"
        )
    given = [answers[question.id] for question in questions]
    if ranks.rank == 0 and (fault := unreadable(given)):
        logger.warning("%s", fault)
    return given, seconds_spent(out_dir)


def unreadable(answers: Sequence[Mapping[str, str]]) -> str:
    """What to say of the questions whose pictures could not be read; nothing where there is none."""
    faults = [answer[ERROR] for answer in answers if ERROR in answer]
    if not faults:
        return ""
    return (
        f"{len(faults)} of {len(answers)} questions have no readable picture and count as wrong; once the "
        f"pictures are repaired, the same command answers these again. The first: {faults[0]}"
    )


def model_fingerprint(directory: Path) -> str:
    """Hash of a model directory: small files whole, of large ones the size and 16 evenly spaced pieces."""
    digest = hashlib.sha256()
    piece = 1 << 20
    names = [
        p for p in directory.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt")
    ]
    for path in sorted(names):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= 64 * piece:
                digest.update(file.read())
                continue
            for k in range(16):
                file.seek((size - piece) * k // 15)
                digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "pillow")
    found = {name: version(name) for name in names}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
