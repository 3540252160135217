"""What runs on a GPU alone, run without one: no tensor on the wrong device, no waiting host, no slow product.

Stages are assembled and stepped as `llava-kd train` does it, on tensors without values (fake_cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import entry, micros_of, side, write_dataset
from loss_inputs import needs_mixed_products
from tiny_batches import inputs, record
from tiny_llava import make_tiny_llava
from torch import Tensor

pytest.importorskip("triton")
from fake_cuda import CUDA, Watch, fake_cuda, on_fake_cuda, without_values

from llava_kd.assembly.cache_teacher import largest
from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.parts.teacher import teacher_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.stage import assemble
from llava_kd.batch import Batch
from llava_kd.data.batches.device_stage import tensors_of, to_batch
from llava_kd.data.batches.plan import Plan
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.evaluation.generation.generate import Generator
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.parallel.world import World
from llava_kd.training.trainer import StepResult

VOCABULARIES = {
    261,
    280,
}  # rows of the heads of the tiny student and teacher; no other size here is one of them
WHOLE = "--trainable=[vision_tower, multi_modal_projector, language_model]"
RECORDS = [record(1), record(2, images=2, is_valid=False), record(3, images=0), record(4, answer=2)]


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 16, which the fast kernels of attention take."""
    directory = tmp_path_factory.mktemp("student") / "model"
    return make_tiny_llava(directory, hidden=32, heads=2, vocab_size=261, tied=True)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("teacher") / "model", hidden=64, vocab_size=280)


def on_device(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with every tensor in it changed."""
    if isinstance(found, Tensor):
        return change(found)
    if isinstance(found, tuple):
        return tuple(on_device(one, change) for one in found)
    if not is_dataclass(found) or isinstance(found, type):
        return found
    return replace(found, **{f.name: on_device(getattr(found, f.name), change) for f in fields(found)})


def batch_of(*, is_packed: bool = False, has_two_sides: bool = False) -> Batch:
    rows = inputs(RECORDS[:2], RECORDS[2:]) if is_packed else inputs(*RECORDS)
    rows = replace(rows, known_places=rows.places)
    batch = Batch(student=rows, record_ids=("a", "b", "c", "d"))
    if has_two_sides:
        batch = replace(batch, teacher=rows, num_shared_targets=len(rows.places.response_N) - 1)
    return batch


def step_of(config: Path, *overrides: str, batch: Batch) -> tuple[StepResult, Watch, str]:
    """A step of two micro-batches, and what was seen of it."""
    settings = load(
        config,
        [
            "--engine.device=auto",
            "--engine.precision=bf16",
            *(["--teacher.dtype=bfloat16"] if "--teacher=null" not in overrides else []),
            *overrides,
        ],
    )
    student = student_parts(settings.student, template=settings.data.template, seed=0)
    teacher = teacher_parts(settings)
    said: list[str] = []
    with fake_cuda() as (mode, watch):
        for parts in (student, teacher):
            if parts is not None:
                without_values(parts.stock, mode)
        world = World(rank=0, size=1, device=CUDA)
        trainer, _ = assemble(settings, world, student, teacher, said.append)
        batch = on_device(batch, lambda tensor: on_fake_cuda(mode, tensor))
        with watch:
            result = trainer.step([batch, batch], 0)
    (kernel,) = (line for line in said if line.startswith("attention of the student"))
    return result, watch, kernel


def check(result: StepResult, watch: Watch) -> None:
    assert {value.device for value in (*result.means.values(), result.grad_norm)} == {CUDA}
    assert watch.waits == {}
    assert watch.races == {}
    assert watch.launches["gradient"] >= 2  # the rows of each micro-batch went through Triton
    slow = {p.line for p in watch.products if p.precision == "float32" and VOCABULARIES & set(p.sizes)}
    assert slow == set(), "products over the vocabulary in full fp32 take ten times as long"


@dataclass(frozen=True, kw_only=True)
class Case:
    overrides: tuple[str, ...] = ()
    is_packed: bool = False
    has_two_sides: bool = False


CASES = {
    "recipe": Case(),
    "packed": Case(is_packed=True),
    "two sides": Case(has_two_sides=True),
    "checkpointing": Case(overrides=("--engine.activation_checkpointing=true",), is_packed=True),
    "projector alone": Case(overrides=("--trainable=[multi_modal_projector]",)),
    "whole tower": Case(overrides=(WHOLE, "--engine.activation_checkpointing=true")),
    "no teacher": Case(overrides=("--teacher=null", "--objective={cross_entropy: {weight: 1.0}}")),
    "other terms": Case(
        overrides=(
            WHOLE,
            "--objective.response_kl.divergence=jsd",
            "--objective.visual_kl.temperature=2",
            "--objective.relation.centre=true",
            "--objective.relation.normalise=true",
            "--objective.response_dbild={}",
            "--objective.visual_switch={}",
            "--objective.attention={}",
        ),
        is_packed=True,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_stays_on_the_device(stage: Callable[..., Path], case: Case) -> None:
    needs_mixed_products()
    torch.backends.cuda.enable_cudnn_sdp(True)
    batch = batch_of(is_packed=case.is_packed, has_two_sides=case.has_two_sides)
    result, watch, said = step_of(stage("run"), *case.overrides, batch=batch)
    assert said == "attention of the student: llava_kd_varlen"
    check(result, watch)
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "a plan is built for each new length of a row"


def test_a_wait_a_slow_product_and_a_foreign_tensor_are_seen() -> None:
    """The detectors themselves."""
    with fake_cuda() as (_, watch):
        there, here = torch.ones(4, 4, device=CUDA), torch.ones(4, 4)
        with watch:
            there[torch.zeros(1, dtype=torch.long)]
            here.to(CUDA)
            there.to("cpu", non_blocking=True)  # the host may read it before it is there
            here.to(CUDA, non_blocking=True)  # from pinned memory: nobody waits
            assert (there @ there).device == CUDA
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            there + here
        with pytest.raises(RuntimeError):
            bool(there.sum() > 0)
    assert (watch.waits, watch.races) == ({"the test": 2}, {"the test": 1})
    assert [(p.precision, p.sizes) for p in watch.products] == [("float32", (4, 4, 4))]


def test_gradients_are_those_of_the_autograd_engine() -> None:
    """The walk through the graph, on values."""
    from fake_cuda import backward

    def loss(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).relu()
        return (y * x.mean(0) + y.to(torch.bfloat16).float()).sqrt().sum() + w.max()

    torch.manual_seed(0)
    leaves = [torch.rand(3, 3, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    backward(loss(*leaves))
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, gradient)


def test_a_batch_that_comes_back_to_the_host_is_there() -> None:
    """As the writer of a teacher's cache reads it."""
    made = batch_of(has_two_sides=True)
    with fake_cuda() as (mode, watch):
        batch = on_device(made, lambda tensor: on_fake_cuda(mode, tensor))
        with watch:
            back = batch.to("cpu")
            assert {tensor.device.type for tensor in tensors_of(back)} == {"cpu"}
            assert watch.races == {}
            watch.waits.clear()
            back.to(CUDA)
    assert watch.waits == {}


def test_the_largest_logits_are_products_of_16_bits() -> None:
    with fake_cuda() as (_, watch), watch:
        hidden_ME, head_CE = (torch.ones(n, 16, device=CUDA, dtype=torch.bfloat16) for n in (8, 280))
        kept = largest(hidden_ME, head_CE, None, k=4, temperature="std")
    dtypes = {"top_logits_MK": torch.float32, "top_columns_MK": torch.int32, "rest_M": torch.float32}
    assert {name: tensor.dtype for name, tensor in kept.items()} == dtypes | {"std_M": torch.float32}
    assert [p.precision for p in watch.products] == ["bfloat16"]


def test_images_are_made_on_the_device(tmp_path: Path) -> None:
    """The last stage of loading, from raw images of several sizes; transforms of two sides."""
    entries = [entry(i, images=i % 3) for i in range(8)]
    source = LlavaJson(write_dataset(tmp_path, entries), tmp_path)
    student = side()
    sides = (student, side(tokenizer=student.tokenizer, tokens_per_image=9, size=30))
    plan = Plan(num_records=len(source), seed=0, global_batch_size=8, world_size=1)
    micros = micros_of(
        source=source, sides=sides, plan=plan, micro_batch_size=4, rank=0, max_pixels=10**6, leaves_raw=True
    )
    made = [micros[0, number] for number in range(2)]
    with fake_cuda() as (mode, _):
        for micro, (number, one) in product(made, enumerate(sides)):
            alone = replace(micro, rows=micro.rows[number : number + 1])  # what is shared is counted by value
            batch = to_batch(on_device(alone, mode.from_tensor), (one,), CUDA)
            assert {tensor.device for tensor in tensors_of(batch)} == {CUDA}
            assert batch.student.pixels_ICHW.shape == (micro.num_images, 3, *one.transform.size)


def test_answers_are_generated_on_the_device(student_dir: Path) -> None:
    parts = load_stock(str(student_dir), dtype=torch.bfloat16)
    given = parts.processor(
        text=["<image>one", "<image>and two"],
        images=[torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    with fake_cuda() as (mode, _):
        without_values(parts.stock, mode)
        stock = parts.stock.to(CUDA)
        generator = Generator(stock, parts.processor, max_new_tokens=3, early_stop=False)  # pyright: ignore
        given = type(given)({name: mode.from_tensor(tensor) for name, tensor in given.items()})
        ids_BN = generator.greedy(given)
    assert (ids_BN.shape, ids_BN.device) == ((2, 3), CUDA)
