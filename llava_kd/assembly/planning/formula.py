"""The loss of a stage as a formula: weights, what each term sums and reads, each tap and its module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_kd.assembly.parts.objective import terms_of
from llava_kd.config import ObjectiveConfig
from llava_kd.distill.learned_weights import learnable
from llava_kd.distill.terms.term import Need, Term
from llava_kd.models.taps import Tap, tapped_module

SERVED_BY: Mapping[Need, str] = {
    "nothing": "no teacher",
    "logits": "the teacher's logits (live, or a cache of the largest)",
    "states": "the teacher's states (live, or a cache of hidden states)",
    "model": "the teacher itself (live)",
}


def loss_formula(
    config: ObjectiveConfig,
    student: LlavaForConditionalGeneration,
    teacher: PreTrainedModel | None,
) -> list[str]:
    """Lines for a plan; of the models only the modules are looked at, so their weights may be on `meta`.

    Raises ValueError for a tap that names no module of its model.
    """
    terms = terms_of(config)
    total = " + ".join(f"{term.weight:g} * {name}" for name, term in terms.items())
    lines = [f"loss             {total}"]
    for name, term in terms.items():
        lines.append(f"  {name}: {term.label or type(term).__name__}")
        lines += [f"    {line}" for line in (_sum_of(term), *_settings(term))]
        if term.compares_rows:
            lines.append(
                "    compares rows with each other within a micro-batch of a rank: micro_batch_size and "
                "packing change its value"
            )
        lines += [f"    {line}" for line in _taps(name, student, term.reads.student_taps, "student")]
        if isinstance(teacher, LlavaForConditionalGeneration):
            lines += [f"    {line}" for line in _taps(name, teacher, term.reads.teacher_taps, "teacher")]
    if config.learned_weights is not None:
        lines.append(f"  weights that are learned, starting from these values: {', '.join(learnable(terms))}")
    return lines


def _sum_of(term: Term) -> str:
    rows = " and ".join(f"{place} rows" for place in term.reads.places)
    rows = "stretches of response text" if term.reads.stretches else rows
    what = f"sum over {rows}" if rows else "sum"
    return f"= {what} / {term.denominator.name} of the step; reads {SERVED_BY[term.reads.teacher]}"


def _settings(term: Term) -> Iterator[str]:
    shown = [f"{f.name} {_word(getattr(term, f.name))}" for f in fields(term) if f.name != "weight"]
    if shown:
        yield f"with {', '.join(shown)}"


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _taps(
    name: str, stock: LlavaForConditionalGeneration, taps: tuple[str, ...], whose: str
) -> Iterator[str]:
    for text in taps:
        tap = Tap.parse(text)
        try:
            module = tapped_module(stock, tap)
        except ValueError as error:
            raise ValueError(f"{name} reads the {whose}: {error}") from error
        yield f"{whose}'s {tap.side} of {tap.path}: {type(module).__name__}{_width(module)}"


def _width(module: torch.nn.Module) -> str:
    """What its first matrix makes of what, where it has one."""
    shapes = [tuple(p.shape) for p in module.parameters() if p.ndim == 2]
    return f", first matrix {shapes[0][0]} x {shapes[0][1]}" if shapes else ""
