"""Every tower family with three language models, on one side and against another teacher, end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llava import make_tiny_llava
from tiny_runs import write_stage
from tiny_towers import TOWERS, make_language_model, make_tower
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.models.files.checkpoint import compose, load_stock, save_stock

pytestmark = pytest.mark.slow
LLMS = ("qwen2", "llama", "gemma")


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llms")
    return {name: make_language_model(name, root / name) for name in LLMS}


@pytest.fixture(scope="module", params=list(TOWERS))
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tower(request.param, tmp_path_factory.mktemp("tower") / request.param)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tower, image size and grid, and padding rows in its vocabulary: 25 patches of 40 x 40."""
    return make_tiny_llava(tmp_path_factory.mktemp("teacher") / "m", image_size=40, vocab_size=280, seed=9)


@pytest.mark.parametrize("side", ["same side", "different side"])
@pytest.mark.parametrize("llm", LLMS)
def test_a_combination_distils_and_comes_back_in_stock_transformers(
    line: str,
    llm: str,
    side: str,
    llms: dict[str, Path],
    other_teacher: Path,
    shapes_dir: Path,
    tmp_path: Path,
) -> None:
    strategy = "default" if side == "different side" else "full"
    parts = compose(
        vision_tower=line, language_model=str(llms[llm]), vision_feature_select_strategy=strategy, seed=1
    )
    save_stock(parts, tmp_path / "student")
    teacher = other_teacher
    if side == "same side":
        teacher = tmp_path / "teacher"
        wider = compose(
            vision_tower=line, language_model=str(llms[llm]), vision_feature_select_strategy=strategy, seed=2
        )
        save_stock(wider, teacher)
    stage = write_stage(
        tmp_path / "run",
        data=shapes_dir,
        student=tmp_path / "student",
        teacher=teacher,
        max_steps=2,
        global_batch_size=2,
    )
    config = load(stage, ["--data.visual_alignment=resample"])
    if parts.visual_grid.prefix and side == "different side":
        with pytest.raises(ValueError, match=r"prefix tokens \(CLS, registers\)"):
            train(config)
        return
    assert train(config) is None
    ours = load_stock(str(tmp_path / "run" / "model")).stock.eval()
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)
    inputs = processor(images=[image], text="<image> what?", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
