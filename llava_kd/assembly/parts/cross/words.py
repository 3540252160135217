"""Which columns of both heads are the same token, where answers are matched as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from llava_kd.assembly.parts.cross.tokenizers import are_other, spellers_of
from llava_kd.assembly.parts.data import side_in
from llava_kd.config import TrainConfig
from llava_kd.distill.objective import Objective
from llava_kd.losses.cross.stretches import Words
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts, as_llava
from llava_kd.models.words.pairs import pairs_of


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
    return replace(terms, common=replace(terms.common, words=words))
