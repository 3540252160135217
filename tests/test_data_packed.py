"""Packed rows against the padded layout of the same records, their oracle; and exact token lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_samples import entry, llama_like, loader_of, qwen_like, side, write_dataset
from tiny_llava import IMAGE_TOKEN, make_tiny_llava

from llava_kd.batch import IGNORE_INDEX, Batch, Inputs
from llava_kd.data.batches.device_stage import tensors_of
from llava_kd.data.batches.lengths import record_sizes
from llava_kd.data.batches.loader import Loader, Side
from llava_kd.data.batches.packing import Packing
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.mllm import MLLM

SIDE = side(max_length=120)
PACKING = Packing(max_tokens=300, max_images=5, packs_per_step=4)


@pytest.fixture
def source(tmp_path: Path) -> LlavaJson:
    entries = [entry(i, images=i % 3, rounds=1 + i % 2) for i in range(30)]
    return LlavaJson(write_dataset(tmp_path, entries), tmp_path)


def make_loader(source: LlavaJson, **changes: object) -> Loader:
    settings: dict = {
        "source": source,
        "student": SIDE,
        "teacher": None,
        "seed": 0,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "packing": PACKING,
    }
    return loader_of(**(settings | changes))


def segments(inputs: Inputs) -> list[dict[str, list]]:
    """The records of a batch, one by one, in order."""
    found = []
    for b in range(inputs.input_ids_BT.shape[0]):
        for number in range(1, int(inputs.segment_ids_BT[b].max()) + 1):
            of_record = inputs.segment_ids_BT[b] == number
            found.append(
                {
                    "ids": inputs.input_ids_BT[b][of_record].tolist(),
                    "labels": inputs.labels_BT[b][of_record].tolist(),
                    "positions": inputs.position_ids_BT[b][of_record].tolist(),
                    "visual": inputs.visual_BT[b][of_record].tolist(),
                }
            )
    return found


def test_packed_rows_hold_the_records_of_the_padded_ones(source: LlavaJson) -> None:
    packed, padded = make_loader(source), make_loader(source, one_record_per_row=True)
    for one, other in zip(packed.batches(0, 3), padded.batches(0, 3), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.record_ids == b.record_ids
            assert segments(a.student) == segments(b.student)
            assert torch.equal(a.student.pixels_ICHW, b.student.pixels_ICHW)
            assert a.student.is_packed
            assert not b.student.is_packed
            assert a.student.input_ids_BT.numel() < b.student.input_ids_BT.numel()


def test_budgets_hold(source: LlavaJson) -> None:
    for group in make_loader(source, micro_batch_size=1).batches(0, 4):
        for batch in group:
            assert batch.student.input_ids_BT.shape[1] <= 300
            assert batch.student.num_images <= 5


def test_first_token_of_a_record_is_never_a_target(source: LlavaJson) -> None:
    for group in make_loader(source).batches(0, 3):
        for batch in group:
            starts = batch.student.position_ids_BT == 0
            assert batch.student.labels_BT[starts].eq(IGNORE_INDEX).all()


def test_workers_and_ranks_get_the_same_packs(source: LlavaJson) -> None:
    alone = [names(group) for group in make_loader(source).batches(0, 4)]
    ranks = [
        [names(group) for group in make_loader(source, rank=rank, world_size=2).batches(0, 4)]
        for rank in range(2)
    ]
    for step in range(4):
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(alone[step])


def names(group: list[Batch]) -> list[str]:
    return [name for batch in group for name in batch.record_ids]


def test_packed_batches_are_the_same_with_any_number_of_workers_and_after_two_resumes(
    source: LlavaJson,
) -> None:
    whole = [batch for group in make_loader(source).batches(0, 4) for batch in group]
    assert any(batch.student.is_packed for batch in whole)
    for num_workers in (0, 1, 2):
        resumed = [
            batch
            for cut in ((0, 1), (1, 2), (2, 4))
            for group in make_loader(source, num_workers=num_workers).batches(*cut)
            for batch in group
        ]
        for one, other in zip(whole, resumed, strict=True):
            assert one.record_ids == other.record_ids
            for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
                assert torch.equal(a, b)


def test_places_that_a_batch_knows_are_those_of_its_rows(source: LlavaJson, tmp_path: Path) -> None:
    (tmp_path / "images" / "1_0.jpg").write_bytes(b"no image")
    teacher = side(tokenizer=SIDE.tokenizer, tokens_per_image=6, max_length=140)
    for group in make_loader(source, teacher=teacher).batches(0, 2):
        for batch in group:
            assert batch.teacher is not None
            assert batch.num_shared_targets == len(batch.student.places.response_N)
            for inputs in (batch.student, batch.teacher):
                known = inputs.known_places
                assert known is not None
                found = replace(inputs, known_places=None).places
                assert known.lengths == found.lengths
                for name, tensor in vars(known).items():
                    assert name == "lengths" or torch.equal(tensor, vars(found)[name])
                segments_BT = torch.zeros_like(inputs.segment_ids_BT).flatten()
                segments_BT[known.boundaries_N[1:-1].long()] = 1  # where another record begins
                changes = inputs.segment_ids_BT.diff(dim=1) != 0
                inside = segments_BT.view_as(inputs.segment_ids_BT)[:, 1:].bool()
                assert torch.equal(inside, changes)


def test_bad_record_in_a_pack_keeps_its_place_and_spares_the_others(
    source: LlavaJson, tmp_path: Path
) -> None:
    good = next(make_loader(source, micro_batch_size=4).batches(0, 1))[0]
    number = next(int(name[1:]) for name in good.record_ids if int(name[1:]) % 3 == 1)
    (tmp_path / "images" / f"{number}_0.jpg").unlink()
    loader = make_loader(source, micro_batch_size=4)
    bad = next(loader.batches(0, 1))[0]
    assert loader.telemetry()["bad_records"] == 1
    place = good.record_ids.index(f"r{number}")
    for index, (one, other) in enumerate(zip(segments(good.student), segments(bad.student), strict=True)):
        assert one["ids"] == other["ids"]
        assert one["positions"] == other["positions"]
        if index == place:
            assert set(other["labels"]) == {IGNORE_INDEX}
        else:
            assert one["labels"] == other["labels"]
    valid = good.student.image_is_valid_I & bad.student.image_is_valid_I
    assert int((~valid).sum()) == 1
    lost = len(good.student.places.distilled_N) - len(bad.student.places.distilled_N)
    assert lost == SIDE.tokens_per_image
    assert good.counts()["images"] - bad.counts()["images"] == 1


def test_pack_smaller_than_max_length_is_an_error(source: LlavaJson) -> None:
    with pytest.raises(ValueError, match=r"max_length, 120; got 100"):
        make_loader(source, packing=Packing(max_tokens=100))


def test_a_record_with_more_images_than_a_pack_may_hold_is_named(source: LlavaJson) -> None:
    """Records 2, 5, 8, ... have two."""
    name = source.record(2).id
    with pytest.raises(
        ValueError, match=rf"1 images, but record {name} alone has 2 \(10 such.*max_images to 2"
    ):
        make_loader(source, packing=Packing(max_tokens=300, max_images=1))


@pytest.mark.parametrize("template", ["plain", "vicuna", "chatml"])
@pytest.mark.parametrize("tokenizer", [qwen_like(), llama_like()], ids=["qwen", "llama"])
def test_lengths_are_those_of_the_encoded_records(
    source: LlavaJson, template: str, tokenizer: object
) -> None:
    reading = side(template=template, tokenizer=tokenizer, max_length=60)
    sizes = record_sizes(source, (reading,))
    encoder = reading.encoder()
    for i in range(len(source)):
        record = source.record(i)
        assert sizes.images[i] == len(record.images)
        assert sizes.tokens[i] == len(encoder(record).ids)


def test_lengths_are_kept_under_the_hash_of_source_and_tokens(
    source: LlavaJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    reading = replace(SIDE, max_length=500)
    first = record_sizes(source, (reading,), cache=cache)
    other = record_sizes(source, (replace(reading, tokens_per_image=9),), cache=cache)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 2
    assert (other.tokens - first.tokens == 5 * first.images).all()
    monkeypatch.setattr("llava_kd.data.batches.lengths._compute", None)  # must not be computed again
    assert (record_sizes(source, (reading,), cache=cache).tokens == first.tokens).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[MLLM, Side]:
    parts = load_stock(str(make_tiny_llava(tmp_path_factory.mktemp("tiny") / "model")))
    tokenizer = parts.processor.tokenizer
    reading = Side(
        tokenizer=tokenizer,
        template=TEMPLATES["chatml"],
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        tokens_per_image=parts.tokens_per_image,
        transform=ImageTransform.from_processor(parts.processor.image_processor),
        max_length=400,
    )
    return MLLM(parts.stock, trainable=["multi_modal_projector", "language_model"]), reading


def loss_and_gradient(mllm: MLLM, group: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of a step, and its gradient in the projector."""
    mllm.zero_grad()
    total = torch.zeros(())
    for batch in group:
        inputs = batch.student
        prediction = mllm(inputs, mllm.image_features(inputs))
        is_target = inputs.targets_BT != IGNORE_INDEX
        logits_NV = prediction.hidden_BTD[is_target] @ prediction.head_VD.T
        targets_N = inputs.targets_BT[is_target]
        total = total + torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    total.backward()
    gradient = mllm.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    return total.detach(), gradient.clone()


def test_model_gives_the_same_loss_and_gradient_packed_and_padded(
    source: LlavaJson, tiny: tuple[MLLM, Side]
) -> None:
    mllm, reading = tiny
    packing = Packing(max_tokens=900, packs_per_step=4)
    settings = {"student": reading, "packing": packing}
    packed, padded = make_loader(source, **settings), make_loader(source, one_record_per_row=True, **settings)
    for one, other in zip(packed.batches(0, 2), padded.batches(0, 2), strict=True):
        assert all(batch.student.is_packed for batch in one)
        for a, b in zip(loss_and_gradient(mllm, one), loss_and_gradient(mllm, other), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
