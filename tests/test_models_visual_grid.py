"""Resampling of visual features between grids: identities, and an oracle of plain sums.

Shape legend: I images, M source tokens, N target tokens, E width.
"""

from __future__ import annotations

import pytest
import torch
from tiny_batches import inputs, record
from tiny_objectives import objective_of
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from llava_kd.batch import Batch
from llava_kd.distill.taught import Taught
from llava_kd.distill.terms.relation import Relation
from llava_kd.distill.terms.visual_kl import VisualKL
from llava_kd.models.mllm import Prediction
from llava_kd.models.towers.visual_grid import VisualGrid, check_resample, resample, visual_grid


def plane(grid: VisualGrid) -> Tensor:
    """One image whose two features are the row and column of each patch's centre, in shares of the edge."""
    rows = (torch.arange(grid.rows) + 0.5) / grid.rows
    columns = (torch.arange(grid.columns) + 0.5) / grid.columns
    places = torch.cartesian_prod(rows, columns)[grid.missing :]
    return torch.cat([torch.full((grid.prefix, 2), -7.0), places])[None]


def test_equal_grids_give_the_same_numbers() -> None:
    grid = VisualGrid(rows=3, columns=3, prefix=1)
    features_IME = torch.randn(2, grid.num_tokens, 4)
    assert resample(features_IME, source=grid, target=grid) is features_IME


def test_a_halved_grid_holds_weighted_means_of_its_neighbourhood() -> None:
    """The triangle filter of antialiasing, written out: its half-width is the scale, 2 source cells."""
    source, target = VisualGrid(rows=4, columns=4), VisualGrid(rows=2, columns=2)
    map_RC = torch.randn(4, 4)
    weights_NM = torch.tensor(
        [[max(0.0, 1 - abs((m + 0.5) - 2 * (n + 0.5)) / 2) for m in range(4)] for n in range(2)]
    )
    weights_NM = weights_NM / weights_NM.sum(1, keepdim=True)
    expected = weights_NM @ map_RC @ weights_NM.T
    ours = resample(map_RC.reshape(1, 16, 1), source=source, target=target)
    torch.testing.assert_close(ours.view(2, 2), expected)


def test_a_finer_grid_keeps_rows_rows_and_columns_columns() -> None:
    source, target = VisualGrid(rows=4, columns=4), VisualGrid(rows=8, columns=8)
    inner = plane(target).view(8, 8, 2)[1:-1, 1:-1]  # at the border the outermost value is held
    ours = resample(plane(source), source=source, target=target).view(8, 8, 2)[1:-1, 1:-1]
    torch.testing.assert_close(ours, inner)


def test_constants_stay_constant_in_every_direction() -> None:
    for rows, columns in ((27, 24), (3, 5), (1, 1)):
        source, target = VisualGrid(rows=16, columns=16), VisualGrid(rows=rows, columns=columns)
        ours = resample(torch.full((1, 256, 2), 3.0), source=source, target=target)
        torch.testing.assert_close(ours, torch.full((1, rows * columns, 2), 3.0))


def test_a_dropped_first_patch_is_put_back_and_taken_out() -> None:
    whole, cut = VisualGrid(rows=3, columns=3), VisualGrid(rows=3, columns=3, missing=1)
    features_IME = torch.randn(1, 9, 2)
    ours = resample(features_IME, source=whole, target=cut)
    torch.testing.assert_close(ours, features_IME[:, 1:])
    filled = resample(features_IME[:, 1:], source=cut, target=whole)
    torch.testing.assert_close(filled[:, 1:], features_IME[:, 1:])
    torch.testing.assert_close(filled[:, 0], features_IME[:, 1])


def test_prefix_tokens_are_carried_left_out_or_refused() -> None:
    source = VisualGrid(rows=2, columns=2, prefix=1)
    features_IME = torch.randn(1, 5, 2)
    same = resample(features_IME, source=source, target=VisualGrid(rows=3, columns=3, prefix=1))
    torch.testing.assert_close(same[:, 0], features_IME[:, 0])
    assert same.shape == (1, 10, 2)
    without = resample(features_IME, source=source, target=VisualGrid(rows=2, columns=2))
    torch.testing.assert_close(without, features_IME[:, 1:])
    with pytest.raises(ValueError, match=r"student has 5 prefix tokens .* teacher 1"):
        resample(features_IME, source=source, target=VisualGrid(rows=2, columns=2, prefix=5))
    bare = VisualGrid(rows=2, columns=2)
    for onto, what in (
        ("student", r"student has 1 .* the teacher 0: .*strategy to default"),
        ("teacher", r"teacher has 1 .* the student 0: .*drop visual_switch"),
    ):
        with pytest.raises(ValueError, match=what):
            check_resample(bare, source, onto=onto)


def test_no_image_gives_no_tokens() -> None:
    source, target = VisualGrid(rows=2, columns=2), VisualGrid(rows=3, columns=3)
    assert resample(torch.zeros(0, 1, 6), source=source, target=target).shape == (0, 9, 6)


@pytest.mark.parametrize(
    ("vision", "strategy", "expected"),
    [
        ("siglip", "full", VisualGrid(rows=4, columns=4)),
        ("siglip", "default", VisualGrid(rows=4, columns=4, missing=1)),
        ("clip", "full", VisualGrid(rows=4, columns=4, prefix=1)),
        ("clip", "default", VisualGrid(rows=4, columns=4)),
    ],
)
def test_the_grid_of_a_tower_follows_from_its_strategy(vision, strategy, expected) -> None:
    kind = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[vision]
    config = LlavaConfig(
        vision_config=kind(image_size=32, patch_size=8),
        text_config={"model_type": "qwen2"},
        vision_feature_select_strategy=strategy,
    )
    assert visual_grid(config) == expected


@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text only"])
def test_visual_terms_read_the_teacher_through_the_alignment(with_images: bool) -> None:
    """A teacher that is the student seen through an alignment has no KL and no relation loss."""
    batch = Batch(student=inputs([record(1, images=int(with_images)), record(2, images=int(with_images))]))
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(*batch.student.input_ids_BT.shape, 8, generator=generator)
    student = Prediction(
        hidden_BTD=hidden_BTD,
        projected_IND=torch.zeros(batch.student.num_images, 4, 8),
        head_VD=torch.randn(30, 8, generator=generator),
        bias_V=None,
    )
    halved = Prediction(**{**vars(student), "hidden_BTD": hidden_BTD / 2})
    for align, is_zero in ((lambda features: features * 2, True), (lambda features: features + 1.0, False)):
        terms = objective_of(
            visual_kl=VisualKL(), relation=Relation(tap="hidden"), num_common=30, align=align
        )
        means = terms(student, Taught(prediction=halved), batch, batch.counts()).means
        for value in means.values():
            assert (abs(float(value)) < 1e-5) == (is_zero or not with_images)
