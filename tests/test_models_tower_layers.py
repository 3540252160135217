"""Which weights of a trained tower move: those its features come from, all of them or the last layers'.

Shape legend: I images, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import objective_of
from tiny_towers import TOWERS, make_language_model, make_tower
from torch import Tensor

from llava_kd.assembly.parts.identity import frozen_fingerprints
from llava_kd.assembly.planning.estimate import ModelSizes
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.batch import Batch
from llava_kd.distill.student import Student
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.models.files.checkpoint import Parts, compose, load_stock
from llava_kd.models.mllm import MLLM
from llava_kd.models.towers.layers import last_layers, read_parameters
from llava_kd.models.towers.vision_tower import input_size

NO_LIST = ("open-clip-resnet",)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model("qwen2", tmp_path_factory.mktemp("llm") / "qwen2")


@pytest.fixture(scope="module", params=list(TOWERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def parts(family: str, language_model: Path, tmp_path: Path) -> Parts:
    line = make_tower(family, tmp_path / family)
    return compose(vision_tower=line, language_model=str(language_model), seed=3)


def states(parts: Parts) -> list[Tensor]:
    height, width = input_size(parts.processor.image_processor)
    pixels_ICHW = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    tower = parts.stock.model.vision_tower.eval()
    with torch.no_grad():
        return list(tower(pixels_ICHW, output_hidden_states=True).hidden_states)


def one_step(parts: Parts, last: int | None) -> MLLM:
    """A gradient step of a loss on the features, as an engine with these weights would take it."""
    mllm = MLLM(parts.stock, trainable=("vision_tower",), tower_last_layers=last).train()
    height, width = input_size(parts.processor.image_processor)
    pixels_ICHW = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    batch = inputs(record(1, images=2))
    batch = type(batch)(**{**vars(batch), "pixels_ICHW": pixels_ICHW})
    mllm.image_features(batch).square().mean().backward()
    with torch.no_grad():
        for parameter in parts.stock.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    return mllm


def test_the_last_layer_moves_and_what_lies_below_does_not(family: str, parts: Parts) -> None:
    if family in NO_LIST:
        with pytest.raises(ValueError, match=r"are in no known list; set it to null"):
            MLLM(parts.stock, trainable=("vision_tower",), tower_last_layers=1)
        return
    before = states(parts)
    one_step(parts, 1)
    after = states(parts)
    assert not torch.equal(before[-2], after[-2])
    for below in range(len(before) - 2):
        assert torch.equal(before[below], after[below]), below


def test_every_weight_that_is_read_has_a_gradient_and_no_other(parts: Parts) -> None:
    mllm = one_step(parts, None)
    tower = parts.stock.model.vision_tower
    moved = {name for name, p in tower.named_parameters() if p.grad is not None}
    assert moved == read_parameters(tower, parts.stock.config)
    assert {name for name, p in tower.named_parameters() if p.requires_grad} == moved
    assert all(p.grad is None for name, p in mllm.named_parameters() if not name.startswith("vision_tower"))
    assert 0 < len(moved) < len(dict(tower.named_parameters()))  # layer -2 leaves the last block unread


def test_batch_statistics_stay_as_they_were_learned(language_model: Path, tmp_path: Path) -> None:
    line = make_tower("open-clip-resnet", tmp_path / "resnet")
    parts = compose(vision_tower=line, language_model=str(language_model), seed=3)
    tower = parts.stock.model.vision_tower
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    assert any("running_mean" in name for name in before)
    one_step(parts, None)
    for name, buffer in tower.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_batch_without_images_gives_every_trained_weight_a_gradient_of_zero(student_dir: Path) -> None:
    mllm = MLLM(
        load_stock(str(student_dir)).stock, trainable=("vision_tower", "language_model"), tower_last_layers=1
    )
    batch = Batch(student=inputs(record(1, images=0), record(2, images=0)), record_ids=("a", "b"))
    loss, _ = Student(mllm, objective_of(cross_entropy=CrossEntropy())).train()(batch, batch.counts())
    loss.backward()
    for name, parameter in mllm.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if name.startswith("vision_tower") and parameter.grad is not None:
            assert not bool(parameter.grad.any())
    alone = MLLM(load_stock(str(student_dir)).stock, trainable=("language_model",))
    expected, _ = Student(alone, objective_of(cross_entropy=CrossEntropy()))(batch, batch.counts())
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("feature_layer", "count", "read"), [(-2, 2, 1), (-2, 9, 1), (-1, 3, 2), (-3, 1, 0), (1, 2, 1)]
)
def test_more_layers_than_the_features_come_from_are_refused(
    feature_layer: int, count: int, read: int, tmp_path: Path
) -> None:
    stock = load_stock(str(make_tiny_llava(tmp_path / "m", feature_layer=feature_layer))).stock
    message = rf"last_layers is {count}; .*layer {feature_layer}, come from {read} of its 2 layers"
    with pytest.raises(ValueError, match=message):
        last_layers(stock.model.vision_tower, stock.config, count)


def test_layers_are_counted_from_the_feature_layer_down(tmp_path: Path) -> None:
    stock = load_stock(str(make_tiny_llava(tmp_path / "m", tower_layers=5, feature_layer=-2))).stock
    names = last_layers(stock.model.vision_tower, stock.config, 2)
    assert {".".join(name.split(".")[:3]) for name in names} == {"encoder.layers.2", "encoder.layers.3"}


def test_a_stage_trains_saves_and_resumes_only_these_layers(stage, tmp_path: Path) -> None:
    student = make_tiny_llava(tmp_path / "student", tower_layers=4, hidden=32, tied=True)
    overrides = [f"--student.checkpoint={student}", "--vision_tower_last_layers=2"]
    overrides += ["--checkpoint.every=1", "--objective.visual_kl=null", "--objective.relation=null"]
    config = load(stage("run", trainable=("vision_tower", "multi_modal_projector"), max_steps=2), overrides)
    assert train(config) is None
    files = sorted((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    with safe_open(files[-1], framework="pt") as stream:
        keys = list(stream.keys())
        kept = {key.split("/", 1)[1].removeprefix("mllm.") for key in keys if "/" in key}
    tower = {name for name in kept if name.startswith("vision_tower")}
    assert {".".join(name.split(".")[1:4]) for name in tower} == {"encoder.layers.1", "encoder.layers.2"}
    assert len(kept - tower) == 4  # the projector
    before, after = (load_stock(str(path)).stock for path in (student, tmp_path / "run" / "model"))
    for name, tensor in before.model.vision_tower.state_dict().items():
        is_equal = torch.equal(tensor, after.model.vision_tower.state_dict()[name])
        assert is_equal != (f"vision_tower.{name}" in tower), name


def test_what_a_checkpoint_leaves_out_is_in_the_fingerprint(stage, student_dir: Path) -> None:
    """A run must not go on over another front of its tower, nor stop for the weights that it trains."""
    overrides = ["--vision_tower_last_layers=1"]
    config = load(stage("run", trainable=("vision_tower", "multi_modal_projector")), overrides)

    def taken(name: str | None) -> dict[str, str]:
        parts = load_stock(str(student_dir))
        if name is not None:
            with torch.no_grad():
                parts.stock.model.vision_tower.get_parameter(name).add_(1)
        return frozen_fingerprints(config, parts, None)

    assert taken("encoder.layers.0.mlp.fc1.weight") == taken(None)
    assert taken("embeddings.patch_embedding.weight") != taken(None)
    assert taken("encoder.layers.1.mlp.fc1.weight") != taken(None)


def test_the_plan_counts_only_what_moves(stage, student_dir: Path) -> None:
    config = load(stage("run", trainable=("vision_tower",)), ["--vision_tower_last_layers=1"])
    stock = load_stock(str(student_dir)).stock
    layer = stock.model.vision_tower.encoder.layers[0]
    expected = sum(p.numel() for p in layer.parameters())
    assert (
        ModelSizes.of(stock, config).trained
        == ModelSizes.of_directory(str(student_dir), config).trained
        == expected
    )


def test_the_setting_needs_a_trained_tower(stage) -> None:
    with pytest.raises(ValueError, match=r"`vision_tower_last_layers` is 1 but `trainable` is .*add vision"):
        load(stage("run"), ["--vision_tower_last_layers=1"])
    with pytest.raises(ValueError, match="`vision_tower_last_layers` must be more than 0"):
        load(stage("run", trainable=("vision_tower",)), ["--vision_tower_last_layers=0"])
