"""A student that answers for itself, as the settings ask for it."""

from __future__ import annotations

import copy

from llava_kd.assembly.parts.data import served, side_in
from llava_kd.assembly.parts.on_policy.writer import OwnAnswersLoader, Writer
from llava_kd.config import TrainConfig
from llava_kd.data.batches.loader import Loader
from llava_kd.data.batches.model_side import Side
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.writing import Writing
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.vocabulary import num_common_columns
from llava_kd.parallel.engine import Engine
from llava_kd.training.trainer import Loader as AnyLoader


def with_own_answers(
    config: TrainConfig, loader: Loader, student: Parts, teacher: AnyParts | None, engine: Engine
) -> AnyLoader:
    """The loader, behind a student that answers where the settings ask for one.

    ValueError for a teacher that does not read the student's tokens as its own.
    """
    asked = config.on_policy
    if asked is None:
        return loader
    assert teacher is not None
    assert config.teacher is not None
    its = as_llava(teacher, "`on_policy`")
    sides = side_in(config, student, config.student), side_in(config, its, config.teacher)
    _check_alike(*sides)
    ends = {template.end_token_id(sides[0].tokenizer) for template in sides[0].source_templates.values()}
    generator = Generator(
        student.stock,
        # Its own: the loader's thread reads ahead with the student's tokenizer.
        copy.deepcopy(served(student, config.data).processor),
        max_new_tokens=asked.max_new_tokens,
        writing=Writing(temperature=asked.temperature, top_p=asked.top_p, seed=config.seed),
        num_tokens=num_common_columns(
            student.processor.tokenizer,
            its.processor.tokenizer,
            student_rows=student.stock.lm_head.weight.shape[0],
            teacher_rows=its.stock.lm_head.weight.shape[0],
        ),
        more_ends=tuple(ends),
    )
    writer = Writer(
        generator, engine.inference, max_length=config.data.max_length, batch_size=asked.batch_size
    )
    return OwnAnswersLoader(loader, writer, share=asked.share, seed=config.seed)


def _check_alike(student: Side, teacher: Side) -> None:
    """Tokens that the student writes are laid behind the teacher's own prompt as they are."""
    templates = [(side.template, side.source_templates) for side in (student, teacher)]
    if templates[0] != templates[1]:
        raise ValueError(
            "`on_policy` has the teacher read the tokens that the student wrote: both sides must have one "
            f"template; the student's is {student.template.name}, the teacher's {teacher.template.name}; set "
            "data.template, or on_policy to null"
        )
    sides = (student, teacher)
    ends = [side.template.end_token_id(side.tokenizer) for side in sides]
    if ends[0] != ends[1]:
        words = [s.tokenizer.convert_ids_to_tokens(end) for s, end in zip(sides, ends, strict=True)]
        raise ValueError(
            "`on_policy` has the teacher read the tokens that the student wrote, and the student ends "
            f"answers with {words[0]!r}, the teacher with {words[1]!r}; take a data.template with an end "
            "token of its own, or set on_policy to null"
        )


def on_policy_lines(config: TrainConfig) -> list[str]:
    """What a dry run says of it: nothing without."""
    asked = config.on_policy
    if asked is None:
        return []
    how = "greedily"
    if asked.temperature > 0:
        how = f"at temperature {asked.temperature:g}, top_p {asked.top_p:g}"
    return [
        f"own answers      at {asked.share:.0%} of the steps, {how}, up to {asked.max_new_tokens} tokens; "
        "their labels do not count"
    ]
