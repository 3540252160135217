"""The figures of docs/teachers.md against the project's own estimate, from the shapes of the models alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config, SiglipVisionConfig

from llava_kd.assembly.planning.estimate import ModelSizes, memory
from llava_kd.assembly.settings import load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/teachers.md").read_text()
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# Width, inner width, layers, heads, heads of keys; whether the head is the table of words.
QWEN = {
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, True),
    "qwen1.5-4b": (2560, 6912, 40, 20, 20, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, True),
    "qwen1.5-0.5b": (1024, 2816, 24, 16, 16, True),
}
LLAMA = {"7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40), "1.1b": (2048, 5632, 22, 32, 4)}
# Teacher, student, row of the table, place there, billions of both LLMs, tokens of a picture, GB sharded.
PAIRS = [
    ("qwen2.5-3b", "qwen2.5-0.5b", "TinyLLaVA Qwen2.5-3B", 0, (3.09, 0.49), 729, 18),
    ("qwen2.5-3b", "qwen2.5-1.5b", "TinyLLaVA Qwen2.5-3B", 1, (3.09, 1.54), 729, 25),
    ("qwen1.5-4b", "qwen1.5-0.5b", "TinyLLaVA Qwen1.5-4B", 0, (3.95, 0.46), 729, 20),
    ("7b", "1.1b", "LLaVA-1.5 7B", 0, (6.74, 1.1), 576, 24),
    ("13b", "1.1b", "LLaVA-1.5 13B", 0, (13.0, 1.1), 576, 36),
]


def directory(name: str, folder: Path) -> str:
    """A LLaVA of its shapes, without weights."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shapes = QWEN.get(name) or LLAMA[name]
    own = dict(zip((*names, "num_key_value_heads"), shapes, strict=False))
    if name in QWEN:
        vision = SiglipVisionConfig(**SIGLIP, image_size=384, patch_size=14)
        text = Qwen2Config(**own, vocab_size=151936, tie_word_embeddings=shapes[5])  # pyright: ignore
    else:
        vision = CLIPVisionConfig(**CLIP, image_size=336, patch_size=14)
        text = LlamaConfig(**own, vocab_size=32064)
    strategy = "full" if name in QWEN else "default"
    LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_select_strategy=strategy
    ).save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.parametrize(
    ("teacher", "student", "row", "place", "billions", "visual", "sharded"),
    PAIRS,
    ids=lambda value: str(value),
)
def test_memory_and_hours_are_those_of_the_shapes(
    teacher: str,
    student: str,
    row: str,
    place: int,
    billions: tuple[float, float],
    visual: int,
    sharded: int,
    tmp_path: Path,
) -> None:
    cells = next(line for line in PAGE.splitlines() if line.startswith(f"| {row}")).split("|")
    folders = {"student": directory(student, tmp_path), "teacher": directory(teacher, tmp_path)}
    words = [f"--{side}.checkpoint={folder}" for side, folder in folders.items()]
    of_other = ModelSizes.of_directory(folders["teacher"])
    for engine, ranks in (("auto", 1), ("fsdp2", 8)):
        config = load(ROOT / "scripts/stage3_dft.yaml", [*words, f"--engine.kind={engine}"])
        trained = ModelSizes.of_directory(folders["student"], config)
        needed = sum(memory(config, ranks, trained, of_other).values()) / 1e9
        if engine == "auto":
            assert re.findall(r"[\d.]+", cells[5])[place] == f"{needed:.1f}"
            assert float(re.findall(r"[\d.]+", cells[4])[0]) == pytest.approx(
                2 * sum(of_other.parameters.values()) / 1e9, rel=0.03
            )
        else:
            assert round(needed) == sharded
    of_teacher, of_student = billions
    tower = 2 * visual * (0.43 if visual == 729 else 0.3)
    long, short = visual + 300, visual + 30  # tokens of a record, of a caption
    operations = 558e12 * (short * (6 * of_student + 2 * of_teacher) + tower)
    operations += 665e12 * (long * 8 * of_student + tower)
    operations += 665e12 * (long * (8 * of_student + 2 * of_teacher) + tower)
    hours = [round(operations / (0.4 * peak * 1e12) / 3600) for peak in (989, 312)]
    assert re.findall(r"\d+", cells[6])[2 * place :][:2] == [str(hour) for hour in hours]


def test_the_page_names_what_sharding_needs_in_the_order_of_the_table() -> None:
    said = re.search(r"on 8 GPUs it is ([^.]*) GB", PAGE)
    assert said is not None
    assert [int(number) for number in re.findall(r"\d+", said[1])] == [pair[-1] for pair in PAIRS]
