"""Evaluation split over two ranks under torchrun, and slices of a live model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from tiny_llava import make_tiny_llava

from llava_kd.evaluation.answers import answers_file, read_lines
from llava_kd.evaluation.generation.generate import Generator, generate
from llava_kd.evaluation.generation.ranks import Ranks
from llava_kd.evaluation.runner import Asking, evaluate
from llava_kd.evaluation.slices import Slice, read_slice, score_slices

TWO_RANKS = """
import json, sys
import torch
torch.set_num_threads(1)
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.ranks import join_ranks
from llava_kd.evaluation.runner import Asking, evaluate
from llava_kd.evaluation.slices import read_slice, score_slices
model, data, out = sys.argv[1:]
summary = evaluate(model, data, out, asking=Asking(batch_size=2, max_new_tokens=6, progress=False))
ranks = join_ranks()
live = Generator.load(model, device=torch.device("cpu"))
part = read_slice("all", data)
figures = [
    score_slices(live.model, live.processor, [part], rank=ranks.rank, world_size=2, max_new_tokens=6,
                 is_sharded=is_sharded)["slice/all"]
    for is_sharded in (False, True)
]
with open(f"{out}/seen{ranks.rank}.json", "w") as file:
    json.dump([summary["accuracy"], *figures], file)
ranks.barrier()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data_json(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Seven questions; the truths of some are what the model answers."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    records = []
    for k in range(7):
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(root / f"{k}.png")
        question = {"from": "human", "value": f"<image>\nQuestion {k}" + "?" * k}
        records.append(
            {"id": f"r{k}", "image": f"{k}.png", "conversations": [question, {"from": "gpt", "value": "x"}]}
        )
    path = root / "test.json"
    path.write_text(json.dumps(records))
    live = Generator.load(model_dir, device=torch.device("cpu"), max_new_tokens=6)
    texts = live.answer(read_slice("all", path).questions)
    for k in (0, 3, 4):
        records[k]["conversations"][1]["value"] = texts[k]
    path.write_text(json.dumps(records))
    return path


def test_the_parts_of_the_ranks_are_disjoint_and_whole(
    model_dir: Path, data_json: Path, tmp_path: Path
) -> None:
    live = Generator.load(model_dir, device=torch.device("cpu"), max_new_tokens=2)
    questions = read_slice("all", data_json).questions
    for rank in range(3):
        ranks = Ranks(rank=rank, world_size=3)
        generate(live, questions, out_dir=tmp_path, ranks=ranks, batch_size=2, progress=False)
    parts = [[a["id"] for a in read_lines(answers_file(tmp_path, rank))] for rank in range(3)]
    assert sorted(len(part) for part in parts) == [2, 2, 3]
    assert sorted(name for part in parts for name in part) == sorted(q.id for q in questions)


@pytest.mark.distributed
def test_two_ranks_give_the_answers_of_one(model_dir: Path, data_json: Path, tmp_path: Path) -> None:
    one = evaluate(model_dir, data_json, tmp_path / "one", asking=Asking(max_new_tokens=6, progress=False))
    assert one["accuracy"] == pytest.approx(3 / 7)
    whole = (tmp_path / "one" / "answers.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "two"
    out.mkdir()
    # A run that was killed on three ranks: some answers of each are there already.
    (out / "run.json").write_text((tmp_path / "one" / "run.json").read_text())
    (out / "answers.jsonl").write_text(whole[5])
    (out / "answers.rank2.jsonl").write_text(whole[1] + whole[2][:15])
    words = [TWO_RANKS, str(model_dir), str(data_json), str(out)]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2, function=ranks.execute).wait()
    assert ended.codes == (0, 0), ended.log
    assert (out / "answers.jsonl").read_text().splitlines(keepends=True) == whole
    assert not list(out.glob("answers.rank*"))
    for rank in (0, 1):
        assert json.loads((out / f"seen{rank}.json").read_text()) == pytest.approx([3 / 7] * 3)


def test_a_slice_leaves_the_model_as_it_was(model_dir: Path, data_json: Path) -> None:
    live = Generator.load(model_dir, device=torch.device("cpu"))
    live.model.model.language_model.train()
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    state = torch.get_rng_state()
    part = read_slice("few", data_json, count=2)
    figures = score_slices(live.model, live.processor, [part, Slice(name="none", questions=())])
    assert set(figures) == {"slice/few", "slice/none", "slice/seconds"}
    assert figures["slice/none"] == 0
    assert live.model.model.language_model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in live.model.state_dict().items())
    assert all(parameter.grad is None for parameter in live.model.parameters())
