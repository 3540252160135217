"""A student that answers its records itself while it trains, from YAML to weights.

Shape legend: as of `llava_kd.batch`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import DISTILLED
from torch import Tensor

from llava_kd.assembly.parts import data as build_data
from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.models import student_in
from llava_kd.assembly.parts.on_policy.at_home import AtHome
from llava_kd.assembly.parts.on_policy.writer import OwnAnswersLoader, Writer
from llava_kd.assembly.parts.teacher import teacher_parts
from llava_kd.assembly.settings import load
from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.cli import main
from llava_kd.data.batches.loader import Loader
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.evaluation.generation.writing import GREEDY, Writing
from llava_kd.models.files.checkpoint import Parts
from llava_kd.parallel.world import World

BACKBONES = Path(__file__).parents[1] / "scripts" / "quickstart" / "backbones"
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
KL = {"response_kl": {"weight": 1.0, "divergence": "reverse"}}
ASKED = {"share": 1.0, "max_new_tokens": 6, "batch_size": 3}


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    assert [line["loss"] for line in lines(a)] == [line["loss"] for line in lines(b)]
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def trained(path: Path) -> Path:
    assert main(["train", str(path)]) == 0
    return path.with_suffix("")


# Whole runs ----


def test_a_share_of_0_is_no_option_bit_for_bit(stage) -> None:
    plain = trained(stage("plain", max_steps=4))
    asked = trained(stage("asked", max_steps=4, on_policy={**ASKED, "share": 0.0}))
    assert_same(plain, asked)
    assert all(line["own_answers"] == 0 for line in lines(asked))
    assert [line["cross_entropy"] for line in lines(asked)] == [
        line["cross_entropy"] for line in lines(plain)
    ]


def with_other_answers(data: Path, out: Path) -> Path:
    """The same questions, and answers of other lengths and words."""
    records = json.loads(data.read_text())
    for record in records:
        for number, turn in enumerate(record["conversations"]):
            if turn["from"] == "gpt":
                turn["value"] = "never " * (1 + number % 3)
    out.write_text(json.dumps(records))
    return out


def test_at_a_share_of_1_no_answer_of_the_data_is_read(stage, shapes_dir: Path, tmp_path: Path) -> None:
    true = shapes_dir / "instructions.json"
    changed = with_other_answers(true, tmp_path / "other.json")

    def pair(name: str, **more: object) -> list[Path]:
        paths = [stage(f"{name} {which}", max_steps=3, objective=KL, **more) for which in ("true", "other")]
        paths[1].write_text(paths[1].read_text().replace(str(true), str(changed)))
        return [trained(path) for path in paths]

    assert_same(*pair("own", on_policy=ASKED))
    losses = [[line["loss"] for line in lines(output)] for output in pair("data")]
    assert losses[0] != losses[1]  # without the option they are read


def test_packed_answers_teach_what_they_teach_alone(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"max_steps": 3, "objective": KL, "on_policy": ASKED, "micro_batch_size": 1}

    def packed(name: str) -> Path:
        path = stage(name, **more)
        tree = yaml.safe_load(path.read_text())
        tree["data"]["packing"] = {"max_tokens": 768}
        path.write_text(yaml.safe_dump(tree))
        return trained(path)

    ours = lines(packed("packed"))
    alone = partial(build_data.Order, one_record_per_row=True)
    monkeypatch.setattr(build_data, "Order", alone)
    expected = lines(packed("alone"))
    for a, b in zip(ours, expected, strict=True):
        assert a["own_answer_tokens"] == b["own_answer_tokens"] > 0
        for name in ("loss", "grad_norm", "response_kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_a_run_that_broke_off_goes_on_bit_for_bit(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"max_steps": 6, "on_policy": {**ASKED, "share": 0.6}, "checkpoint": {"every": 2, "keep": 2}}
    whole, broken = trained(stage("whole", **more)), stage("broken", **more)
    written = Writer.rewritten

    def fails(self: Writer, batches: Sequence[Batch], step: int) -> list[Batch]:
        if step >= 3:
            raise RuntimeError("power cut")
        return written(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "rewritten", fails)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["train", str(broken)])
    assert_same(whole, trained(broken))
    is_own = [line["own_answers"] for line in lines(whole)]
    assert set(is_own) == {0.0, 1.0}
    for line in lines(whole):
        assert (line["cross_entropy"] == 0) == (line["own_answers"] == 1)
        assert ("own_answers_cut_share" in line) == (line["own_answers"] == 1)
        if line["own_answers"] == 1:
            assert 0 < line["own_answers_cut_share"] <= 1  # random weights seldom end an answer
            assert line["own_answer_tokens"] <= 6 * line["own_answers_written"]


def test_the_student_answers_as_it_is_and_is_left_so(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, states, modes = [], [], []
    written = Writer.rewritten

    def spy(self: Writer, batches: Sequence[Batch], step: int) -> list[Batch]:
        model, before = self.hand.generator.model, torch.get_rng_state()
        is_training = [module.training for module in model.modules()]
        made = written(self, batches, step)
        heads.append(model.lm_head.weight.detach().clone())
        states.append(torch.equal(before, torch.get_rng_state()))
        modes.append(is_training == [module.training for module in model.modules()] and any(is_training))
        return made

    monkeypatch.setattr(Writer, "rewritten", spy)
    path = stage("run", max_steps=3, objective=KL, on_policy=ASKED, checkpoint={"every": 1, "keep": 5})
    output = trained(path)
    assert states == [True] * 3
    assert modes == [True] * 3
    for step in (1, 2):  # what is saved after a step is what answers at the next
        (saved,) = (output / "checkpoints").glob(f"step-*{step}/state.safetensors")
        held = {name: t for name, t in load_file(saved).items() if t.shape == heads[step].shape}
        assert any(torch.equal(value, heads[step]) for name, value in held.items() if "parameter" in name)
        assert not torch.equal(heads[step], heads[step - 1])


# What is written ----


def own_stage(stage, speaker: Path, data: Path, *, name: str = "own", **more: object) -> Path:
    """A stage of the speaker on a file, under the quickstart's teacher."""
    path = stage(name, **{"on_policy": {**ASKED, "share": 0.5}, **more})
    tree = yaml.safe_load(path.read_text())
    tree["student"] = {"checkpoint": str(speaker)}
    tree["teacher"] = {"checkpoint": str(BACKBONES / "teacher"), "dtype": "float32"}
    tree["data"]["path"] = str(data)
    path.write_text(yaml.safe_dump(tree))
    return path


def loaded(path: Path) -> tuple[Parts, Loader]:
    config = load(path)
    student = student_in(config)
    loader, _ = make_loader(config, ALONE, student, teacher_parts(config))
    return student, loader


def writer_of(student: Parts, *, batch_size: int = 4, writing: Writing = GREEDY, longest: int = 12) -> Writer:
    generator = Generator(student.stock, student.processor, max_new_tokens=longest, writing=writing)
    return Writer(AtHome(generator, nullcontext, batch_size), max_length=512)


def texts(student: Parts, side: Inputs) -> list[str]:
    """Of each row, its labels as text."""
    return [
        student.processor.tokenizer.decode(row[row != IGNORE_INDEX], skip_special_tokens=True).strip()
        for row in side.labels_BT
    ]


def test_greedy_answers_are_those_of_eval_one_by_one(
    stage, speaker: Path, shapes_dir: Path, tmp_path: Path
) -> None:
    data = shapes_dir / "test.json"
    path = own_stage(stage, speaker, data, global_batch_size=6, micro_batch_size=3)
    student, loader = loaded(path)
    (batches,) = loader.batches(0, 1)
    found: dict[str, str] = {}
    for batch in writer_of(student).rewritten(batches, 0):
        found |= dict(zip(batch.record_ids, texts(student, batch.student), strict=True))
    words = ["--model", str(speaker), "--data", str(data), "--out", str(tmp_path / "eval")]
    assert main(["eval", *words, "--batch_size", "1", "--max_new_tokens", "12"]) == 0
    asked = map(json.loads, (tmp_path / "eval" / "answers.jsonl").read_text().splitlines())
    assert found == {one["id"]: one["answer"] for one in asked}
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("writing", [GREEDY, Writing(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
def test_answers_are_the_same_in_any_batch_and_any_cut(
    stage, speaker: Path, shapes_dir: Path, writing: Writing
) -> None:
    path = own_stage(
        stage, speaker, shapes_dir / "instructions.json", global_batch_size=8, micro_batch_size=8
    )
    student, loader = loaded(path)
    (whole,) = loader.batches(0, 1)
    one = writer_of(student, batch_size=1, writing=writing).rewritten(whole, 5)
    many = writer_of(student, batch_size=8, writing=writing).rewritten(whole, 5)
    assert torch.equal(one[0].student.labels_BT, many[0].student.labels_BT)
    other = writer_of(student, batch_size=8, writing=writing).rewritten(whole, 6)
    assert torch.equal(other[0].student.labels_BT, many[0].student.labels_BT) == writing.is_greedy
    halves = load(path)
    halves = replace(halves, micro_batch_size=4)
    loader, _ = make_loader(halves, ALONE, student, teacher_parts(halves))
    (cut,) = loader.batches(0, 1)
    again = writer_of(student, batch_size=8, writing=writing).rewritten(cut, 5)
    said = [text for batch in again for text in texts(student, batch.student)]
    assert said == texts(student, one[0].student)


def test_cut_and_empty_answers_are_counted(stage, speaker: Path, shapes_dir: Path) -> None:
    path = own_stage(stage, speaker, shapes_dir / "test.json", global_batch_size=6, micro_batch_size=6)
    student, loader = loaded(path)
    (batches,) = loader.batches(0, 1)
    short = writer_of(student, longest=1)
    (batch,) = short.rewritten(batches, 0)
    assert short.counted["own_answers_written"] == short.counted["own_answers_cut"] == 6
    assert len(batch.student.places.response_N) == 6
    first = batch.student.labels_BT[batch.student.labels_BT != IGNORE_INDEX].tolist()
    silent = writer_of(student)
    silent.hand.generator = replace(silent.hand.generator, more_ends=tuple(first))
    (batch,) = silent.rewritten(batches, 0)
    assert silent.counted["own_answers_empty"] == 6
    assert silent.counted["own_answers_cut"] == 0
    assert len(batch.student.places.response_N) == 6


def test_only_common_tokens_are_written(stage, student_dir: Path) -> None:
    student, loader = loaded(stage("run", on_policy={**ASKED, "share": 0.5}))
    (batches,) = loader.batches(0, 1)
    writer = writer_of(student, writing=Writing(temperature=50.0))
    writer.hand.generator = replace(writer.hand.generator, num_tokens=7)
    for batch in writer.rewritten(batches, 0):
        labels = batch.student.labels_BT
        assert int(labels.max()) < 7


def test_steps_are_drawn_by_seed_and_step_in_the_share_asked_for() -> None:
    def own(share: float, seed: int = 0) -> list[bool]:
        loader = OwnAnswersLoader(None, None, share=share, seed=seed)  # type: ignore[arg-type]
        return [loader.is_own(step) for step in range(2000)]

    assert own(0.3) == own(0.3)
    assert own(0.3) != own(0.3, seed=1)
    assert sum(own(0.3)) / 2000 == pytest.approx(0.3, abs=0.03)
    assert not any(own(0.0))
    assert all(own(1.0))


# What is refused ----

LABELLED = DISTILLED | {"label_smoothing": {"weight": 0.1}}
REFUSED = {
    "above 1": ({"on_policy.share": 1.5}, r"`on_policy\.share` must be from 0 to 1; got 1\.5"),
    "below 0": ({"on_policy.share": -0.1}, r"`on_policy\.share` must be from 0 to 1; got -0\.1"),
    "hot": ({"on_policy.temperature": -1}, r"`on_policy\.temperature`"),
    "no token": ({"on_policy.max_new_tokens": 0}, r"`on_policy\.max_new_tokens` must be more than 0"),
    "cache": (
        {"teacher.cache": "there"},
        "`on_policy` need the teacher model itself, but teacher.cache is there",
    ),
    "no teacher": (
        {"teacher": None, "objective": {"cross_entropy": {}}},
        "`teacher` is null; set teacher.checkpoint",
    ),
    "policy": ({"token_policy": {"spans": [{"pattern": "email"}]}}, "`token_policy` and `on_policy` both"),
    "pictures": (
        {"pictures": {"mixup": {}}},
        "`pictures` and `on_policy` both weight the tokens of an answer",
    ),
    "labels": ({"objective": LABELLED}, r"`objective\.label_smoothing` uses them as labels"),
    "trust": (
        {"objective": {"response_kl": {"trust": "first"}}, "on_policy.share": 1.0},
        r"`objective\.response_kl` uses them as labels; leave it out \(in response_kl: set trust to all\)",
    ),
    "all own": ({"on_policy.share": 1.0}, r"`on_policy\.share` 1 leaves `objective\.cross_entropy`"),
    "visual": (
        {"objective": {"cross_entropy": {}, "visual_kl": {}}},
        "needs a term that compares answers with the teacher's, but the terms are cross_entropy, visual_kl",
    ),
    "agreement": (
        {"teacher.several": {"checkpoints": ["b"], "weights": "agreement"}, "objective": {"response_kl": {}}},
        r"`teacher\.several\.weights` agreement",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(stage, case: str) -> None:
    changes, message = REFUSED[case]
    path = stage("run", on_policy={"share": 0.5})
    words = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
    if "objective" in changes:  # in place of the terms that are there
        tree = yaml.safe_load(path.read_text()) | {"objective": changes["objective"]}
        path.write_text(yaml.safe_dump(tree))
        words = [word for word in words if not word.startswith("--objective=")]
    with pytest.raises(ValueError, match=message):
        load(path, words)


def test_another_template_of_the_teacher_is_refused_by_name(
    stage, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stage("run", on_policy={"share": 0.5})
    assert main(["train", str(path), "--teacher.template=chatml"]) == 2
    assert (
        "student and teacher must have the same template; the student's is vicuna, the teacher's"
        in capsys.readouterr().err
    )


def test_a_plan_says_what_the_student_will_write(stage, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage("run", on_policy={"share": 0.25, "max_new_tokens": 9})
    assert main(["train", str(path), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "own answers      at 25% of the steps, at temperature 1, top_p 1, up to 9 tokens" in said
