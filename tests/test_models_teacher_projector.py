"""A student with its teacher's projector: what it computes, what is trained, and how it comes back from disk.

Shape legend: I images, N tokens of an image, E tower width, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from llava_kd.evaluation.generation.generate import Generator
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.files.export import export
from llava_kd.models.mllm import MLLM
from llava_kd.models.projectors.from_teacher import folded, with_teacher_projector
from llava_kd.models.projectors.reused import ReusedProjectorLlava


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """With biases that count: those of a fresh model are zero."""
    parts = load_stock(str(make_tiny_llava(tmp_path_factory.mktemp("t") / "m", hidden=48)))
    for layer in (
        parts.stock.model.multi_modal_projector.linear_1,
        parts.stock.model.multi_modal_projector.linear_2,
    ):
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    return parts


def student(directory: Path, teacher: Parts, *, hidden: int) -> Parts:
    own = load_stock(str(make_tiny_llava(directory / f"own{hidden}", hidden=hidden, tied=hidden < 48)))
    return with_teacher_projector(own, teacher, seed=3)


def logits_BTV(stock: LlavaForConditionalGeneration) -> Tensor:
    batch = inputs(record(1), record(2, images=2))
    with torch.no_grad():
        return stock.eval()(input_ids=batch.input_ids_BT, pixel_values=batch.pixels_ICHW).logits


def test_it_is_the_teachers_projector_and_then_a_linear_map(tmp_path: Path, teacher: Parts) -> None:
    parts = student(tmp_path, teacher, hidden=32)
    features_INE = torch.randn(2, 16, 32)
    theirs = teacher.stock.model.multi_modal_projector(features_INE)
    carry = parts.stock.model.multi_modal_projector.width_map
    expected = theirs @ carry.weight.T + carry.bias
    torch.testing.assert_close(parts.stock.model.multi_modal_projector(features_INE), expected)
    assert float(carry.weight.detach().abs().max()) <= 48**-0.5
    again = student(tmp_path, teacher, hidden=32).stock.model.multi_modal_projector.width_map.weight
    assert torch.equal(carry.weight, again)


@pytest.mark.parametrize(
    "trainable", [("multi_modal_projector",), ("multi_modal_projector", "language_model")]
)
def test_the_map_alone_is_trained_of_it(tmp_path: Path, teacher: Parts, trainable: tuple[str, ...]) -> None:
    mllm = MLLM(student(tmp_path, teacher, hidden=32).stock, trainable=trainable)
    names = {n for n, p in mllm.named_parameters() if p.requires_grad and "projector" in n}
    assert names == {f"multi_modal_projector.width_map.{kind}" for kind in ("weight", "bias")}
    source = teacher.stock.model.multi_modal_projector.linear_1.weight
    assert mllm.multi_modal_projector.linear_1.weight.data_ptr() != source.data_ptr()


def test_it_comes_back_from_disk_and_answers(tmp_path: Path, teacher: Parts) -> None:
    parts = student(tmp_path, teacher, hidden=32)
    save_stock(parts, tmp_path / "model")
    back = load_stock(str(tmp_path / "model"))
    assert isinstance(back.stock, ReusedProjectorLlava)
    assert torch.equal(logits_BTV(back.stock), logits_BTV(parts.stock))
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_BTV(auto), logits_BTV(parts.stock))
    loaded = Generator.load(tmp_path / "model", device=torch.device("cpu")).model
    assert torch.equal(logits_BTV(loaded), logits_BTV(parts.stock))


@pytest.mark.parametrize("hidden", [48, 64], ids=["equal width", "wider student"])
def test_a_teacher_no_wider_than_the_student_folds_into_stock(
    tmp_path: Path, teacher: Parts, hidden: int
) -> None:
    parts = student(tmp_path, teacher, hidden=hidden)
    save_stock(parts, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert type(stock) is LlavaForConditionalGeneration
    assert stock.config.model_type == "llava"
    before, after = logits_BTV(parts.stock), logits_BTV(stock)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_a_wider_teacher_has_no_stock_form(tmp_path: Path, teacher: Parts) -> None:
    save_stock(student(tmp_path, teacher, hidden=32), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"48 wide inside; stock LLaVA's is as wide as the language model, 32"
    ):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stock_model_is_folded_into_itself(teacher: Parts) -> None:
    assert folded(teacher, "it") is teacher


def test_another_tower_and_a_reusing_teacher_are_refused(tmp_path: Path, teacher: Parts) -> None:
    other = load_stock(str(make_tiny_llava(tmp_path / "other", hidden=32, seed=8)))
    with pytest.raises(
        ValueError, match="towers differ in weights, settings, preprocessing, layer or strategy"
    ):
        with_teacher_projector(other, teacher, seed=0)
    again = student(tmp_path, teacher, hidden=32)
    with pytest.raises(ValueError, match="own projector is a reused one"):
        with_teacher_projector(teacher, again, seed=0)
