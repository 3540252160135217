"""Which columns of both heads are the same token, where answers are matched as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from llava_kd.assembly.parts.cross.tokenizers import are_other, spellers_of
from llava_kd.assembly.parts.data import side_in
from llava_kd.config import TrainConfig
from llava_kd.distill.objective import Objective
from llava_kd.distill.terms.cross.response_cross import ResponseCross
from llava_kd.losses.cross.projection import Projection
from llava_kd.losses.cross.stretches import Words
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.words.pairs import Pairs, pairs_of
from llava_kd.models.words.projection import rules_of


def with_words(
    config: TrainConfig,
    terms: Objective,
    student: Parts,
    teacher: AnyParts | None,
    say: Callable[[str], None],
) -> Objective:
    """The objective, with the tokens that both sides have where their tokenizers differ.

    ValueError where they have none, and for settings that such a teacher does not go with.
    """
    if teacher is None or config.teacher is None or not are_other(terms.terms, student, teacher):
        return terms
    teacher = as_llava(teacher, "`objective` over two tokenizers")
    mine, theirs = side_in(config, student, config.student), side_in(config, teacher, config.teacher)
    spellers_of(config, (mine, theirs))
    ends = mine.template.end_token_id(mine.tokenizer), theirs.template.end_token_id(theirs.tokenizer)
    device = student.stock.lm_head.weight.device
    pairs = pairs_of(
        mine.tokenizer,
        theirs.tokenizer,
        ends,
        student_rows=student.stock.lm_head.weight.shape[0],
        teacher_rows=teacher.stock.lm_head.weight.shape[0],
    )
    say(f"two tokenizers: {pairs}")
    words = Words(
        student_K=torch.tensor(pairs.student, device=device),
        teacher_K=torch.tensor(pairs.teacher, device=device),
        student_A=torch.tensor(pairs.student_alone, dtype=torch.long, device=device),
        teacher_B=torch.tensor(pairs.teacher_alone, dtype=torch.long, device=device),
    )
    sides = (mine.tokenizer, theirs.tokenizer)
    projection = _projection(_projected(terms), sides, pairs, words, say)
    return replace(terms, common=replace(terms.common, words=words, projection=projection))


def _projected(terms: Objective) -> ResponseCross | None:
    """The term that projects. ValueError where two do so, and not alike."""
    asked = [term for term in terms.terms.values() if isinstance(term, ResponseCross)]
    asked = [term for term in asked if term.form != "pairs"]
    if len({(term.form, term.spread) for term in asked}) > 1:
        raise ValueError("terms that project one vocabulary onto another must share `form` and `spread`")
    return asked[0] if asked else None


def _projection(
    term: ResponseCross | None,
    sides: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    pairs: Pairs,
    words: Words,
    say: Callable[[str], None],
) -> Projection | None:
    """`sides`: student and teacher."""
    if term is None or term.form == "pairs":
        return None
    same = dict(zip(pairs.student, pairs.teacher, strict=True))
    if term.form == "onto_teacher":
        rules = rules_of(*sides, same, spread=term.spread)
    else:
        student, teacher = sides
        rules = rules_of(teacher, student, {b: a for a, b in same.items()}, spread=term.spread)
    say(f"{'student onto teacher' if term.form == 'onto_teacher' else 'teacher onto student'}: {rules}")
    entries = (torch.tensor(column, device=words.student_K.device) for column in
               (rules.source, rules.target, rules.weight))  # fmt: skip
    return Projection(term.form, words, *entries)
