"""Whether answers are matched as text, because the two tokenizers differ, and what that leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llava_kd.config import TrainConfig
from llava_kd.data.batches.model_side import Side
from llava_kd.data.text.stretches import Speller, Spellers
from llava_kd.distill.terms.term import Term
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.vocabulary import is_other
from llava_kd.models.words.spelling import spelled


def are_other(terms: Mapping[str, Term], student: Parts, teacher: AnyParts | None) -> bool:
    """Whether the tokenizers differ and a term reads answers as text.

    Raises ValueError for terms that cannot, and for a teacher that is no LLaVA.
    """
    by_text = [name for name, term in terms.items() if term.reads.stretches]
    if teacher is None or not by_text:
        return False
    if not is_other(student.tokenizer, teacher.tokenizer):
        return False
    as_llava(teacher, f"`objective.{by_text[0]}` over two tokenizers")
    if by_token := [name for name, term in terms.items() if _reads_tokens(term)]:
        raise ValueError(
            "terms that compare tokens one by one need the same tokenizer in student and teacher, but "
            f"these differ: remove {' and '.join(by_token)} and keep {' and '.join(by_text)}, or use a "
            "teacher of the student's family"
        )
    return True


def _reads_tokens(term: Term) -> bool:
    reads = term.reads
    if reads.stretches:
        return False
    is_taught = reads.teacher != "nothing" or reads.switched is not None
    return is_taught and (reads.vocabulary or reads.switched is not None or "response" in reads.places)


def spellers_of(config: TrainConfig, sides: tuple[Side, Side]) -> Spellers:
    """How both sides spell, for a loader. ValueError for settings that other tokenizers do not go with."""
    if found := next(_beyond(config), None):
        what, remedy = found
        raise ValueError(f"{what}, but teacher and student have different tokenizers: {remedy}")
    student, teacher = (
        Speller(
            spelled(side.tokenizer),
            frozenset(
                template.end_token_id(side.tokenizer)
                for template in (side.template, *side.source_templates.values())
            ),
        )
        for side in sides
    )
    return student, teacher


def _beyond(config: TrainConfig) -> Iterator[tuple[str, str]]:
    assert config.teacher is not None
    if config.teacher.cache is not None:
        yield "`teacher.cache` stores predictions at the student's tokens", "set teacher.cache to null"
    if config.teacher.several is not None:
        yield "`teacher.several` needs one vocabulary", "set teacher.several to null"
    if config.teacher.visual_dependency is not None:
        yield "`teacher.visual_dependency` weights single response tokens", "set it to null"
    if config.token_policy is not None:
        yield "`token_policy` changes single response tokens", "set token_policy to null"
    if config.on_policy is not None:
        yield "`on_policy` generates tokens of one vocabulary", "set on_policy to null"
    if config.pictures is not None:
        yield "`pictures` compares logits of one vocabulary", "set pictures to null"
