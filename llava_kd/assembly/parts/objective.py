"""The loss terms that the settings ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from llava_kd.assembly.parts.lending import dbild
from llava_kd.config import KLConfig, ObjectiveConfig
from llava_kd.distill.objective import KL, CrossEntropy, Objective, Relation
from llava_kd.distill.options import Attention
from llava_kd.losses import dbild as fast_dbild
from llava_kd.losses import head_loss, reference, reference_top_k, relation, top_k
from llava_kd.models.files.checkpoint import Parts
from llava_kd.models.towers.visual_grid import check_resample, resample
from llava_kd.models.vocabulary import num_common_columns

HEAD_LOSSES = {"fast": head_loss.head_loss, "reference": reference.head_loss}
DBILDS = {"fast": fast_dbild.dbild_loss, "reference": reference.dbild_loss}
TOP_K_LOSSES = {"fast": top_k.top_k_head_loss, "reference": reference_top_k.top_k_head_loss}
RELATIONS = {"fast": relation.relation_rows, "reference": reference.relation_rows}


def objective(
    config: ObjectiveConfig,
    student: Parts,
    teacher: Parts | None,
    visual_alignment: Literal["refuse", "resample"] = "refuse",
) -> Objective:
    """The weighted terms, with the vocabulary that both heads share and how their visual tokens line up."""
    over_words = (config.response_kl, config.visual_kl, config.response_dbild, config.visual_switch)
    needs_vocabulary = any(term is not None for term in over_words)
    num_common = None
    if needs_vocabulary and teacher is not None:
        num_common = num_common_columns(
            student.processor.tokenizer,
            teacher.processor.tokenizer,
            student_rows=student.stock.lm_head.weight.shape[0],
            teacher_rows=teacher.stock.lm_head.weight.shape[0],
        )
    needs_grid = any(t is not None for t in (config.visual_kl, config.relation, config.attention))
    ce, rel, attention = config.cross_entropy, config.relation, config.attention
    return Objective(
        cross_entropy=None if ce is None else CrossEntropy(weight=ce.weight),
        response_kl=_kl(config.response_kl),
        visual_kl=_kl(config.visual_kl),
        relation=None
        if rel is None
        else Relation(weight=rel.weight, tap=rel.tap, centre=rel.centre, normalise=rel.normalise),
        response_dbild=dbild(config.response_dbild),
        visual_switch=dbild(config.visual_switch),
        attention=None
        if attention is None
        else Attention(weight=attention.weight, drop_sinks=attention.drop_sinks),
        num_common=num_common,
        align=_alignment(student, teacher, visual_alignment) if needs_grid and teacher is not None else None,
        head_loss=HEAD_LOSSES[config.losses],
        top_k_head_loss=TOP_K_LOSSES[config.losses],
        relation_rows=RELATIONS[config.losses],
        dbild_loss=DBILDS[config.losses],
    )


def _alignment(
    student: Parts, teacher: Parts, visual_alignment: Literal["refuse", "resample"]
) -> Callable[[Tensor], Tensor] | None:
    """None where both grids are equal. Raises ValueError where they may not, or cannot, be resampled."""
    target, source = student.visual_grid, teacher.visual_grid
    if source == target:
        return None
    if visual_alignment == "refuse":
        raise ValueError(
            f"visual_kl, relation and attention need equal grids: the student has {target}, the teacher "
            f"{source}; set data.visual_alignment to resample, use the teacher's tower, layer and "
            "vision_feature_select_strategy, or drop these terms"
        )
    check_resample(source, target)
    return functools.partial(resample, source=source, target=target)


def wants_head_gram(config: ObjectiveConfig) -> bool:
    return config.losses == "fast" and config.relation is not None and config.relation.tap == "logits"


def _kl(config: KLConfig | None) -> KL | None:
    if config is None:
        return None
    return KL(
        weight=config.weight,
        temperature=config.temperature,
        divergence=reference.Divergence(config.divergence, config.mix),
    )
