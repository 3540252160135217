"""Exports read by transformers 4.57, on which vLLM, lmms-eval and SGLang often stand.

LLAVA_KD_TRANSFORMERS_4 names a Python that has it, and torch; without it one is made (tests/tools).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import stock_answers
import torch
from PIL import Image
from stock_answers import stock_answers as answers_here
from test_models_served import ours, questions_of, trained
from tiny_towers import TOWERS, make_language_model, make_tower

from llava_kd.assembly.checkpoints import export_to
from llava_kd.assembly.parts.models import student_parts
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import save_stock
from llava_kd.models.files.export import LANGUAGES_OF_4, TOWERS_OF_4, VERSION_OF_4

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from environments import NotRunError, python_of

pytestmark = pytest.mark.slow

PYTHON = "LLAVA_KD_TRANSFORMERS_4"
NUM_QUESTIONS = 60
QUICKSTART = Path(__file__).parents[1] / "scripts" / "quickstart" / "backbones" / "teacher"
# By name: the kind of language model, and settings that transformers 4 keeps elsewhere or under other names.
LANGUAGES: dict[str, tuple[str, dict]] = {
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2, linear": (
        "qwen2",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
    ),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            }
        },
    ),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "smollm": ("smollm", {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3", {}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
}


@pytest.fixture(scope="session")
def python_4() -> str:
    try:
        return python_of("transformers_4")
    except NotRunError as error:
        pytest.skip(f"not run: {error}")


def answers_there(
    python: str, directories: Mapping[str, Path], questions: Sequence[dict], root: Path
) -> dict[str, dict]:
    jobs = [
        {"directory": str(path), "questions": list(questions), "out": str(root / f"{k}.json")}
        for k, path in enumerate(directories.values())
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [python, "-W", "ignore", stock_answers.__file__, str(root / "jobs.json")]
    subprocess.run(words, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True, timeout=550)
    return {
        name: json.loads(Path(job["out"]).read_text()) for name, job in zip(directories, jobs, strict=True)
    }


def test_sixty_answers_of_three_students_are_ours_there_and_here(
    tmp_path: Path, stage: Callable[..., Path], python_4: str
) -> None:
    (tmp_path / "quickstart").mkdir()
    teacher = student_parts(StudentConfig(checkpoint=str(QUICKSTART)), template="auto", seed=0)
    save_stock(teacher, tmp_path / "quickstart" / "run" / "model")
    for template, aspect in (("chatml", "pad"), ("vicuna", "square")):
        (tmp_path / template).mkdir()
        trained(tmp_path / template, stage, template, aspect)
    # Padded at most: two versions resize noise a step of 255 apart, and random weights see it.
    sizes = {"quickstart": (48, 48), "chatml": (32, 20), "vicuna": (32, 32)}
    for name, size in sizes.items():
        directory = tmp_path / name / "export"
        export_to(str(tmp_path / name / "run" / "model"), str(directory), dtype=None, scores=())
        questions = noise_questions(tmp_path / name, size)
        here, expected = answers_here(str(directory), questions), ours(directory, questions)
        there = answers_there(python_4, {name: directory}, questions, tmp_path)[name]
        assert there["version"] == VERSION_OF_4 or PYTHON in os.environ
        for found in (here, there):
            assert found.get("error") is None
            assert found["missing"] == []
            assert found["ids"] == here["ids"]
            torch.testing.assert_close(torch.tensor(found["pixels"]), torch.tensor(here["pixels"]))
            assert found["alone"] == found["batched"] == expected, (name, found["version"])


def noise_questions(root: Path, size: tuple[int, int]) -> list[dict]:
    questions = []
    for k in range(NUM_QUESTIONS):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(k))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(root / f"{k}.png")
        questions.append({"text": f"What is it{', please' * (k % 4)}?", "image": str(root / f"{k}.png")})
    return questions


def _export(root: Path, tower: str, language: str) -> tuple[Path, tuple[str, str]]:
    kind, settings = LANGUAGES[language]
    text = make_language_model(kind, root / "llm", **settings)
    student = StudentConfig(vision_tower=make_tower(tower, root / "tower"), language_model=str(text))
    parts = student_parts(student, template="chatml", seed=1)
    save_stock(parts, root / "model")
    export_to(str(root / "model"), str(root / "export"), dtype=None, scores=())
    config = parts.stock.config
    return root / "export", (config.vision_config.model_type, config.text_config.model_type)


def test_what_the_card_says_of_transformers_4_is_so(tmp_path: Path, python_4: str) -> None:
    """Every stock tower with one language model, and every language model with one tower."""
    pairs = [(tower, "qwen2") for tower, (_, is_stock) in TOWERS.items() if is_stock]
    pairs += [("siglip", language) for language in list(LANGUAGES)[1:]]
    exports, kinds = {}, {}
    for tower, language in pairs:
        name = f"{tower}, {language}"
        exports[name], kinds[name] = _export(tmp_path / name.replace(", ", "-"), tower, language)
    questions = noise_questions(tmp_path, (32, 32))[:3]  # as the towers read them, see above
    there = answers_there(python_4, exports, questions, tmp_path)
    alike = {}
    for name, directory in exports.items():
        here = answers_here(str(directory), questions)
        same = all(here[key] == there[name].get(key) for key in ("ids", "alone", "batched", "missing"))
        alike[name] = same or there[name].get("error") or "other answers"
    cards = {name: (directory / "README.md").read_text() for name, directory in exports.items()}
    said = {n: kinds[n][0] in TOWERS_OF_4 and kinds[n][1] in LANGUAGES_OF_4 for n in exports}
    assert {name: VERSION_OF_4 in card for name, card in cards.items()} == said
    print(json.dumps(alike, indent=1))
    assert {name: alike[name] for name, is_said in said.items() if is_said and alike[name] is not True} == {}


def test_a_base_of_positions_that_is_lost_changes_the_answers(
    tmp_path: Path, shapes_dir: Path, python_4: str
) -> None:
    """The test above would see it: without `rope_theta`, 4.57 computes with 10,000 and says nothing."""
    directory, _ = _export(tmp_path, "siglip", "qwen2")
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    assert tree["text_config"].pop("rope_theta") == 1e6
    path.write_text(json.dumps(tree))
    questions = questions_of(shapes_dir, 3)
    there = answers_there(python_4, {"it": directory}, questions, tmp_path)["it"]
    assert there["rope_theta"] == 10_000
    assert there["alone"] != ours(directory, questions)
