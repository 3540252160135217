"""Answers in step on both sides where their templates differ: by the characters that tokens cover.

Shape legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_samples import IMAGE_TOKEN, llama_like, qwen_like
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from tiny_objectives import objective_of
from transformers import PreTrainedTokenizerFast

from llava_kd.assembly.parts.data import make_loader
from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.batch import IGNORE_INDEX, Batch
from llava_kd.data.sources.llava_json import Record, Turn
from llava_kd.data.text.alignment import matched
from llava_kd.data.text.encoder import Encoded, Encoder
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.distill.taught import Taught
from llava_kd.distill.terms.cross_entropy import CrossEntropy
from llava_kd.distill.terms.response_kl import ResponseKL
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import Prediction
from llava_kd.parallel.world import World

QWEN = qwen_like()
ANSWERS = (
    "Red.",
    "There are 3 small triangles and 12 squares",
    "the 2nd: caf\u00e9 \U0001f600",
    "yes\n\nno",
    "7",
)
NAMES = ("plain", "vicuna", "llava_v1", "chatml", "phi4", "tulu")


def encoded(template: str, *, tokenizer: PreTrainedTokenizerFast = QWEN, max_length: int = 500) -> Encoded:
    encoder = Encoder(
        template=TEMPLATES[template],
        tokenizer=tokenizer,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        tokens_per_image=3,
        max_length=max_length,
    )
    return encoder(TALK)


def talk() -> Record:
    turns = []
    for number, answer in enumerate(ANSWERS):
        turns += [
            Turn("user", f"{IMAGE_TOKEN}\n" * (number == 0) + f"Part {number}?"),
            Turn("assistant", answer),
        ]
    return Record(id="talk", images=("a.png",), turns=tuple(turns))


TALK = talk()


def targets(e: Encoded) -> torch.Tensor:
    return e.labels[e.labels != IGNORE_INDEX]


@pytest.mark.parametrize("teacher", NAMES[1:])
@pytest.mark.parametrize("student", NAMES)
def test_a_pair_of_equal_tokens_covers_the_same_characters(student: str, teacher: str) -> None:
    before = encoded(student)
    ours, theirs = matched(TALK, (before, encoded(teacher)))
    assert torch.equal(ours.labels, before.labels)  # the student is trained on all that it was
    assert len(targets(ours)) == len(targets(theirs))
    place = [(e.labels != IGNORE_INDEX).nonzero().squeeze(1) for e in (ours, theirs)]
    shared = targets(ours) == targets(theirs)
    spans = [e.spans[p][shared] for e, p in zip((ours, theirs), place, strict=True)]
    content = spans[0][:, 1] < spans[0][:, 2]
    assert torch.equal(spans[0][content][:, :3], spans[1][content][:, :3])
    if student == teacher:
        assert bool(shared.all())
    # All words but the first of each answer are shared, whatever stands around them.
    for number, answer in enumerate(ANSWERS):
        of_answer = spans[0][content & (spans[0][:, 0] == number)]
        covered = "".join(answer[a:b] for _, a, b, _ in of_answer.tolist())
        first = answer.split(" ")[0]
        assert answer.endswith("\U0001f600") or answer.endswith(covered)
        assert len(covered) >= len(answer) - len(first)


def test_edges_of_different_templates_are_rows_without_kl() -> None:
    ours, theirs = matched(TALK, (encoded("chatml"), encoded("vicuna")))
    shared = targets(ours) == targets(theirs)
    end = TEMPLATES["chatml"].end_token_id(QWEN)
    assert not bool(shared[targets(ours) == end].any())
    assert 0 < int(shared.sum()) < len(shared)


def test_answers_without_a_question_between_them_leave_no_place_for_a_pair() -> None:
    """In `plain` an answer follows the last one's end: nothing can stand beside a space that is a token."""
    with pytest.raises(ValueError, match=r"record 'talk': .*give both sides the same template"):
        matched(TALK, (encoded("vicuna"), encoded("plain")))


def test_what_truncation_takes_from_one_side_is_taken_from_the_other() -> None:
    whole = encoded("chatml")
    short = encoded("llava_v1", max_length=len(encoded("llava_v1").ids) - 12)
    ours, theirs = matched(TALK, (whole, short))
    assert ours.is_truncated
    assert len(targets(ours)) == len(targets(theirs)) < len(targets(whole))
    assert targets(ours).tolist() == targets(whole)[: len(targets(ours))].tolist()


def test_answers_that_tokenizers_cut_otherwise_name_the_record() -> None:
    with pytest.raises(
        ValueError, match=r"record 'talk': student and teacher must read the same answer tokens"
    ):
        matched(TALK, (encoded("chatml"), encoded("chatml", tokenizer=llama_like())))


def test_a_row_of_other_tokens_has_cross_entropy_and_no_kl() -> None:
    """The teacher is the student but for one row, whose token differs between the sides: no KL is left."""
    generator = torch.Generator().manual_seed(0)
    student = inputs(record(1), record(2))
    row, column = (student.labels_BT != IGNORE_INDEX).nonzero()[3].tolist()
    labels_BT = student.labels_BT.clone()
    labels_BT[row, column] += 1
    teacher = replace(student, labels_BT=labels_BT)
    hidden_BTD = torch.randn(*student.input_ids_BT.shape, 8, generator=generator)
    other_BTD = hidden_BTD.clone()
    other_BTD[row, column - 1] += 1
    head_VD = torch.randn(300, 8, generator=generator)
    projected_IND = torch.zeros(student.num_images, 16, 8)
    ours, theirs = (
        Prediction(hidden_BTD=h, projected_IND=projected_IND, head_VD=head_VD, bias_V=None)
        for h in (hidden_BTD, other_BTD)
    )
    objective = objective_of(cross_entropy=CrossEntropy(), response_kl=ResponseKL(), num_common=300)
    batch = Batch(student=student, teacher=teacher, record_ids=("a", "b"))
    means = objective(ours, Taught(prediction=theirs), batch, batch.counts()).means
    assert float(means["response_kl"]) == pytest.approx(0, abs=1e-6)
    alone = objective_of(cross_entropy=CrossEntropy())(ours, Taught(), batch, batch.counts()).means
    torch.testing.assert_close(means["cross_entropy"], alone["cross_entropy"])
    same = replace(batch, teacher=student)
    assert float(objective(ours, Taught(prediction=theirs), same, batch.counts()).means["response_kl"]) > 1e-3


def test_a_run_with_a_template_on_each_side(stage, tmp_path: Path) -> None:
    """Each side's own: the student's of its family, the teacher's of its directory; one shared tower."""
    teacher = make_tiny_llava(tmp_path / "teacher", hidden=48, vocab_size=280)
    processor = load_stock(str(teacher)).processor
    processor.chat_template = TEMPLATES["vicuna"].chat_template
    processor.tokenizer.chat_template = processor.chat_template
    processor.save_pretrained(teacher)
    path = stage("run", template="auto", max_steps=2)
    config = load(path, [f"--teacher.checkpoint={teacher}"])
    assert train(config) is None
    assert not (tmp_path / "run" / "bad_records.jsonl").exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["response_kl"] > 0 for line in lines if "loss" in line)
    student = student_parts(config.student, template="auto", seed=0)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    loader, shares_tower = make_loader(config, world, student, load_stock(str(teacher)))
    batch = next(loader.batches(0, 1))[0]
    assert shares_tower
    assert batch.teacher is not None
    texts = [
        student.processor.tokenizer.decode(side.input_ids_BT[0]) for side in (batch.student, batch.teacher)
    ]
    assert "<|im_start|>user" in texts[0]
    assert "USER: " in texts[1]
    named = load(path, ["--teacher.template=chatml", "--student.template=chatml"])
    loader, _ = make_loader(named, world, student, load_stock(named.teacher.checkpoint))  # type: ignore[union-attr]
    assert next(loader.batches(0, 1))[0].teacher is None
