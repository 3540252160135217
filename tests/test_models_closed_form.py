"""A projector that begins as a fitted linear map: the map, the two layers that are it, a stage that begins.

Shape legend: N pictures, E width of a feature, D width of an embedding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_kd.assembly.parts.data import source_in
from llava_kd.assembly.parts.first_projector import begin_projector
from llava_kd.assembly.parts.models import student_in
from llava_kd.assembly.settings import load
from llava_kd.cli import main
from llava_kd.models.projectors.closed_form import PENALTIES, begin_as, ridge, sized
from llava_kd.parallel.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
E, D = 12, 32


def projector(act: str = "gelu", width: int = D, *, bias: bool = True) -> LlavaMultiModalProjector:
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": E},
        text_config={"model_type": "qwen2", "hidden_size": width, "num_attention_heads": 1},
        projector_hidden_act=act,
        multimodal_projector_bias=bias,
        vision_feature_layer=-2,
    )
    return LlavaMultiModalProjector(config)


def drawn(count: int = 60, rank: int = 5, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    features_NE = torch.randn(count, E, generator=g) * torch.linspace(0.1, 30, E) + 5
    weight_ED = torch.randn(E, rank, generator=g) @ torch.randn(rank, D, generator=g)
    return features_NE, features_NE @ weight_ED / 10 + 1 + noise * torch.randn(count, D, generator=g)


def test_the_map_is_ridge_with_the_penalty_that_leaving_one_out_picks() -> None:
    """By the definitions: each picture predicted from the others, for every penalty, by solving it anew."""
    features_NE, words_ND = drawn(24, noise=3.0)
    found, explained = ridge(features_NE, words_ND)
    X, Y = features_NE.double().numpy(), words_ND.double().numpy()
    Z, C = (X - X.mean(0)) / X.std(0, ddof=1), Y - Y.mean(0)

    def solved(penalty: float) -> np.ndarray:
        return np.linalg.solve(Z.T @ Z + penalty * len(Z) * np.eye(E), Z.T @ C)

    def error(penalty: float) -> float:  # GCV, by the trace of the matrix that makes the fit
        hat = Z @ np.linalg.solve(Z.T @ Z + penalty * len(Z) * np.eye(E), Z.T) + 1 / len(Z)
        left = C - Z @ solved(penalty)
        return float((left**2).sum() / (1 - np.trace(hat) / len(Z)) ** 2)

    best = min(PENALTIES, key=error)
    assert PENALTIES[0] < best < PENALTIES[-1]
    fitted = torch.from_numpy(Z @ solved(best) + Y.mean(0))
    torch.testing.assert_close(found(features_NE.double()), fitted, rtol=1e-9, atol=1e-9)
    assert explained == pytest.approx(1 - error(best) / (C**2).sum(), rel=1e-9)


def test_words_that_pictures_do_not_tell_are_not_explained() -> None:
    features_NE, _ = drawn()
    words_ND = torch.randn(len(features_NE), D, generator=torch.Generator().manual_seed(1))
    assert ridge(features_NE, words_ND)[1] < 0.05
    assert ridge(*drawn(noise=0.0))[1] > 0.999


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu"])
def test_the_two_layers_are_the_map(act: str) -> None:
    features_NE, words_ND = drawn()
    found, _ = ridge(features_NE, words_ND)
    layers = projector(act)
    assert begin_as(layers, found, features_NE) == pytest.approx(1)
    elsewhere_NE = features_NE[:8] * 3 - 20
    expected = found(elsewhere_NE.double()).float()
    torch.testing.assert_close(layers(elsewhere_NE), expected, rtol=1e-3, atol=1e-3)


def test_a_narrow_projector_carries_the_directions_that_matter_most() -> None:
    features_NE, words_ND = drawn(rank=8)
    found, _ = ridge(features_NE, words_ND[:, :8])
    layers = projector(width=8)  # four pairs
    carried = begin_as(layers, found, features_NE)
    outputs_ND = found(features_NE.double())
    centred_ND = outputs_ND - outputs_ND.mean(0)
    sizes = torch.linalg.svdvals(centred_ND).square()
    assert carried == pytest.approx(float(sizes[:4].sum() / sizes.sum()))
    left = (layers(features_NE).detach().double() - outputs_ND).square().sum()
    assert float(left) == pytest.approx(float(sizes[4:].sum()), rel=1e-3)


def test_tokens_lie_as_far_apart_as_embeddings() -> None:
    features_NE, words_ND = drawn()
    found = sized(ridge(features_NE, words_ND)[0], features_NE, 0.02)
    outputs_ND = found(features_NE.double())
    assert float((outputs_ND - outputs_ND.mean(0)).square().mean().sqrt()) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: projector(bias=False), "without biases"),
        (lambda: projector("tanh"), r"a\(x\) - a\(-x\) is not x"),
    ],
)
def test_a_projector_that_cannot_be_a_map_is_refused(make, message: str) -> None:
    features_NE, words_ND = drawn()
    with pytest.raises(ValueError, match=message):
        begin_as(make(), ridge(features_NE, words_ND)[0], features_NE)


def test_one_picture_is_no_map() -> None:
    with pytest.raises(ValueError, match="at least two pictures with words; got 1"):
        ridge(torch.ones(1, E), torch.ones(1, D))


NEW = [
    "--student.checkpoint=null",
    "--student.vision_tower=scripts/quickstart/backbones/vision_tower",
    "--student.language_model=scripts/quickstart/backbones/student_llm",
    "--teacher=null",
    "--objective={cross_entropy: {weight: 1.0}}",
]
FITTED = "--student.projector_start=closed_form"


def test_the_same_data_and_seed_begin_with_the_same_projector(stage, shapes_dir: Path, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    captions = f"--data.path={shapes_dir / 'captions.json'}"
    config = load(
        stage("run"), [*NEW, FITTED, captions, f"--data.images={shapes_dir}", "--data.template=plain"]
    )
    student, said = student_in(config), []
    before = student.stock.model.multi_modal_projector.linear_1.weight.clone()
    begin_projector(config, student, source_in(config), ALONE, said.append)
    assert "projector: begins as a linear map fitted to" in said[0]
    assert not torch.equal(before, student.stock.model.multi_modal_projector.linear_1.weight)
    again = student_in(config)
    begin_projector(config, again, source_in(config), ALONE, said.append)
    for one, other in zip(
        student.stock.model.multi_modal_projector.parameters(),
        again.stock.model.multi_modal_projector.parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_run_goes_on_with_the_projector_that_it_began_with(stage, shapes_dir: Path, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = [*NEW, f"--data.path={shapes_dir / 'captions.json'}", "--data.template=plain", "--optim.lr=1e-12"]
    config = stage("run", max_steps=1)
    assert main(["train", str(config), *words, FITTED]) == 0
    weights = load_file(config.with_suffix("") / "model" / "model.safetensors")
    settings = load(config, [*words, FITTED])
    student = student_in(settings)
    begin_projector(settings, student, source_in(settings), ALONE, lambda line: None)
    expected = student.stock.model.multi_modal_projector.linear_2.weight
    (name,) = (name for name in weights if name.endswith("multi_modal_projector.linear_2.weight"))
    torch.testing.assert_close(weights[name].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([FITTED], "is of a new student with its own projector"),
        ([*NEW, FITTED, "--student.projector=teacher"], "is of a new student with its own projector"),
        ([*NEW, FITTED, "--student.projector_start=clever"], "projector_start"),
    ],
)
def test_a_start_that_cannot_be_is_refused(stage, capsys, words: list[str], message: str) -> None:
    assert main(["train", str(stage("run")), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_stage_without_pictures_cannot_begin_so(stage, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    talk = [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]
    (path := tmp_path / "words.json").write_text(
        json.dumps([{"id": str(i), "conversations": talk} for i in range(4)])
    )
    words = [*NEW, FITTED, f"--data.path={path}", f"--data.images={tmp_path}"]
    assert main(["train", str(stage("run", max_steps=1)), *words]) == 2
    assert "0 of 4 sampled records have both" in capsys.readouterr().err
