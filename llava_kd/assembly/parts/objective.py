"""The loss terms that the settings ask for, what they need of the two models, and what they may teach."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from llava_kd.assembly.parts.cross.tokenizers import are_other
from llava_kd.config import ObjectiveConfig, TrainConfig
from llava_kd.distill.formulas import FORMULAS, Align, Common
from llava_kd.distill.head_terms import head_requests
from llava_kd.distill.learned_weights import LearnedWeights, learnable
from llava_kd.distill.objective import Objective
from llava_kd.distill.terms.term import Term, Widths
from llava_kd.distill.token_policy import TokenPolicy, refuse_beside
from llava_kd.losses.divergence import Temperature
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.foreign.loading import AnyParts
from llava_kd.models.taps import tapped_widths
from llava_kd.models.towers.stages import STAGE, check_tokens, on_visual_tokens
from llava_kd.models.towers.vision_tower import num_prefix_tokens
from llava_kd.models.towers.visual_grid import VisualGrid, check_resample, resample
from llava_kd.models.vocabulary import num_common_columns


def terms_of(config: ObjectiveConfig) -> dict[str, Term]:
    """The terms that are on, by name: the settings are the terms themselves."""
    return {name: term for name, term in config.terms.items() if isinstance(term, Term)}


def token_policy(config: TrainConfig) -> TokenPolicy | None:
    """What is taught of private tokens; None where all tokens are alike.

    ValueError for terms that it does not reach, or that it does not fit, and without the teacher it is of.
    """
    settings = config.token_policy
    if settings is None:
        return None
    policy = TokenPolicy(
        temperature=settings.temperature,
        noise=settings.noise,
        kl=settings.kl,
        cross_entropy=settings.cross_entropy,
        seed=config.seed,
    )
    terms = terms_of(config.objective)
    requests = head_requests(terms)
    compared: dict[str, Temperature] = {
        name: request.temperature
        for name, request in requests.items()
        if request.divergence is not None and request.place == "response"
    }
    if policy.changes_targets and not compared:
        raise ValueError(
            "`token_policy.temperature` and `noise` change the teacher's predictions at response tokens, "
            "but no term compares them; add response_kl, or leave both out"
        )
    past = {
        name: bool(
            name not in requests
            and ("response" in term.reads.places or term.reads.student_taps or term.reads.teacher_taps)
        )
        for name, term in terms.items()
    }
    refuse_beside(policy, {name: (past[name], compared.get(name)) for name in terms})
    return policy


def policy_lines(config: TrainConfig) -> list[str]:
    """What a dry run says of private tokens: nothing without a policy."""
    policy = token_policy(config)
    if policy is None:
        return []
    heat = "as for others" if policy.temperature is None else f"at temperature {policy.temperature:g}"
    return [
        f"private tokens   at score 1: teacher {heat}, noise {policy.noise:g}, divergence x {policy.kl:g}, "
        f"hard label x {policy.cross_entropy:g}"
    ]


def objective(
    config: ObjectiveConfig,
    student: Parts,
    teacher: AnyParts | None,
    visual_alignment: Literal["refuse", "resample"] = "refuse",
    *,
    seed: int = 0,
) -> Objective:
    """The weighted terms, with the vocabulary that both heads share and how their visual tokens line up.

    `seed` is of the weights that terms bring.
    """
    terms = terms_of(config)
    num_common = None
    by_number = not are_other(terms, student, teacher)
    if by_number and any(term.reads.vocabulary for term in terms.values()) and teacher is not None:
        num_common = num_common_columns(
            student.processor.tokenizer,
            teacher.tokenizer,
            student_rows=student.stock.lm_head.weight.shape[0],
            teacher_rows=teacher.head.weight.shape[0],
        )
    by_grid = [name for name, term in terms.items() if term.reads.grids]
    align = None
    if by_grid and teacher is not None:
        grids = teacher.visual_grid, student.visual_grid
        needs = (
            f"{' and '.join(by_grid)} need equal visual grids, but the student has {grids[1]}, the teacher "
            f"{grids[0]}"
        )
        align = carried(*grids, visual_alignment, refusal=needs)
    return Objective(
        terms=terms,
        common=Common(
            num_common=num_common,
            align=align,
            stage_align=_stage_align(terms, student),
            formulas=FORMULAS[config.losses],
        ),
        modules=_modules(terms, student, teacher, seed),
        learned=_learned(config, terms, student),
    )


def _stage_align(terms: Mapping[str, Term], student: Parts) -> Align | None:
    """How stages of the student's tower come to its visual tokens; None where no term reads one.

    ValueError, by the name of the term, where a visual token has no place on a map.
    """
    for name, term in terms.items():
        if any(tap.startswith(STAGE) for tap in term.reads.student_taps):
            try:
                check_tokens(student.visual_grid)
            except ValueError as error:
                raise ValueError(f"{name} reads the student: {error}") from error
            prefix = num_prefix_tokens(student.stock.config)
            return functools.partial(on_visual_tokens, prefix=prefix, target=student.visual_grid)
    return None


def _learned(config: ObjectiveConfig, terms: Mapping[str, Term], student: Parts) -> LearnedWeights | None:
    settings = config.learned_weights
    if settings is None:
        return None
    names = learnable(terms)
    if not names:
        raise ValueError(
            f"`objective.learned_weights` has no weight to learn, because {', '.join(terms)} do not read "
            "the teacher or can be negative; add a term such as response_kl, or set learned_weights to "
            "null"
        )
    made = LearnedWeights(names, strength=settings.strength, most=settings.most)
    return made.to(student.stock.lm_head.weight.device)


def _modules(
    terms: Mapping[str, Term], student: Parts, teacher: AnyParts | None, seed: int
) -> dict[str, nn.Module]:
    """Weights that terms bring, equal on every rank and whatever else was drawn before."""
    made = {}
    for name, term in terms.items():
        widths = _widths(name, term, student, teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = term.module(widths)
            except ValueError as error:
                raise ValueError(f"`objective.{name}`: {error}") from error
        if module is not None:
            made[name] = module.to(student.stock.lm_head.weight.device)
    return made


def _widths(name: str, term: Term, student: Parts, teacher: AnyParts | None) -> Widths:
    """Raises ValueError for a tap that a model lacks."""

    def tapped(parts: Parts, taps: tuple[str, ...], whose: str) -> dict[str, int]:
        if type(term).module is Term.module:
            return {}  # it brings no weights, so nothing has to run
        try:
            return tapped_widths(parts.stock, taps)
        except ValueError as error:
            raise ValueError(f"{name} reads the {whose}: {error}") from error

    return Widths(
        student=student.stock.lm_head.weight.shape[1],
        teacher=None if teacher is None else teacher.head.weight.shape[1],
        student_taps=tapped(student, term.reads.student_taps, "student"),
        teacher_taps=tapped(teacher, term.reads.teacher_taps, "teacher")
        if isinstance(teacher, Parts)
        else {},
    )


def carried(
    source: VisualGrid,
    target: VisualGrid,
    visual_alignment: Literal["refuse", "resample"],
    *,
    refusal: str,
    onto: Literal["student", "teacher"] = "student",
) -> Align | None:
    """How features of one grid come to another; None where both are equal.

    Raises ValueError, which begins with `refusal`, where they may not be resampled, or cannot.
    """
    if source == target:
        return None
    if visual_alignment == "refuse":
        raise ValueError(
            f"{refusal}; set data.visual_alignment to resample, use the teacher's tower, layer and "
            "vision_feature_select_strategy, or remove these terms"
        )
    check_resample(source, target, onto=onto)
    return functools.partial(resample, source=source, target=target)


def wants_head_gram(config: ObjectiveConfig) -> bool:
    """Whether a term reads the Gram matrix of a frozen head, which the plain formulas do not use."""
    return config.losses == "fast" and any(term.reads.head_gram for term in terms_of(config).values())
