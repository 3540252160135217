"""Attention of packed rows: which kernel is chosen, and that each keeps records apart as the block mask does.

Shape legend: B rows, T tokens, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_batches import inputs, record
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model
from transformers.masking_utils import find_packed_sequence_indices

from llava_kd.batch import Inputs
from llava_kd.models.attention import packed as packed_attention
from llava_kd.models.attention.packed import BY_RECORD, FLASH, MASKED_SDPA, VARLEN, Circumstances, choose, use
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.language_model import checkpoint_activations
from llava_kd.models.mllm import MLLM

H200 = Circumstances(
    device_type="cuda",
    compute_capability=9,
    dtype=torch.bfloat16,
    head_width=64,
    attention_dropout=0.0,
    takes_any_kernel=True,
    takes_flash=True,
    has_flash=True,
    has_varlen=True,
)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, VARLEN),
        ({"has_flash": False}, VARLEN),
        ({"takes_flash": False}, VARLEN),
        ({"has_varlen": False}, FLASH),
        ({"attention_dropout": 0.1}, FLASH),
        ({"takes_any_kernel": False}, FLASH),
        ({"has_flash": False, "attention_dropout": 0.1}, BY_RECORD),
        ({"has_flash": False, "has_varlen": False}, BY_RECORD),
        ({"dtype": torch.float32}, BY_RECORD),
        ({"compute_capability": 7}, BY_RECORD),
        ({"head_width": 320}, BY_RECORD),
        ({"head_width": 12}, BY_RECORD),
        ({"device_type": "cpu", "compute_capability": 0}, BY_RECORD),
        ({"takes_any_kernel": False, "takes_flash": False}, MASKED_SDPA),
        ({"takes_any_kernel": False, "dtype": torch.float32}, MASKED_SDPA),
    ],
)
def test_the_first_kernel_that_can_be_used_is_chosen(changes: dict[str, object], kernel: str) -> None:
    assert choose(replace(H200, **changes)) == kernel  # pyright: ignore[reportArgumentType]


def test_this_machine_is_described_as_it_is() -> None:
    found = packed_attention.circumstances(language_model(), device=torch.device("cpu"), dtype=torch.float32)
    assert (found.device_type, found.head_width, found.takes_any_kernel) == ("cpu", 8, True)
    assert choose(found) == BY_RECORD


@pytest.mark.parametrize(
    ("selects", "wants", "kernel"),
    [(True, True, VARLEN), (False, True, BY_RECORD), (False, False, VARLEN), (False, None, VARLEN)],
)
def test_a_kernel_that_insists_on_cudnn_is_not_used(
    monkeypatch: pytest.MonkeyPatch, selects: bool, wants: bool | None, kernel: str
) -> None:
    """As of PyTorch versions that take cuDNN on a Hopper whatever is enabled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(packed_attention, "_select_backend", print if selects else None)
    monkeypatch.setattr(packed_attention, "_should_use_cudnn", None if wants is None else lambda _: wants)
    device = torch.device("cuda", 0)
    found = packed_attention.circumstances(language_model(), device=device, dtype=torch.bfloat16)
    assert choose(replace(found, has_flash=False)) == kernel


@pytest.mark.parametrize(("rows", "has_boundaries"), [([[6], [4]], False), ([[8]], True), ([[5, 2]], True)])
def test_flash_attention_is_told_what_it_would_look_for(
    monkeypatch: pytest.MonkeyPatch, rows: list[list[int]], has_boundaries: bool
) -> None:
    """transformers takes a single row for a packed one, and asks the device in every layer."""
    model = language_model()
    monkeypatch.setattr(model.config, "_attn_implementation", FLASH)
    assert ("cu_seq_lens_q" in packed_attention.arguments(model, packed(rows))) == has_boundaries


rows = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_boundaries_are_those_of_the_block_mask(rows: list[list[int]]) -> None:
    batch = packed(rows)
    places = batch.places
    length = batch.position_ids_BT.shape[1]
    expected = []
    for b, row in enumerate(rows):
        expected += [b * length + sum(row[:r]) for r in range(len(row))]
        expected += [b * length + sum(row)] if sum(row) < length else []
    assert places.boundaries_N.tolist() == [*expected, batch.position_ids_BT.numel()]
    assert sum(places.lengths) == batch.position_ids_BT.numel()
    number_BT = torch.arange(len(places.lengths)).repeat_interleave(torch.tensor(places.lengths))
    number_BT = number_BT.view_as(batch.position_ids_BT)
    theirs_BT = find_packed_sequence_indices(batch.position_ids_BT)
    theirs_BT = torch.zeros_like(number_BT) if theirs_BT is None else theirs_BT
    same, same_theirs = (n[:, :, None] == n[:, None] for n in (number_BT, theirs_BT))
    assert torch.equal(same, same_theirs)


def packed(rows: list[list[int]]) -> Inputs:
    """Rows of records of so many tokens, without images."""
    made = [[record(1, images=0, prompt=n - 1, answer=0) for n in row] for row in rows]
    return replace(inputs(*made), pixels_ICHW=torch.zeros(0, 3, 8, 8), image_is_valid_I=torch.zeros(0).bool())


def language_model(**changes: object) -> Qwen2Model:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **changes,
    )
    torch.manual_seed(0)
    return Qwen2Model(config).eval()


WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
ROWS = [[5, 7, 2], [9, 1], [1]]


def hidden_BTD(model: Qwen2Model, batch: Inputs) -> Tensor:
    return model(
        inputs_embeds=model.embed_tokens(batch.input_ids_BT),
        position_ids=batch.position_ids_BT if batch.is_packed else None,
        use_cache=False,
        **packed_attention.arguments(model, batch),
    ).last_hidden_state


@pytest.mark.parametrize("kernel", [BY_RECORD, MASKED_SDPA])
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "sliding window"])
@pytest.mark.parametrize("rows", [ROWS, [[6], [4]], [[8]]], ids=["packed", "padded", "one"])
def test_each_record_is_read_as_if_it_were_alone(
    kernel: str, window: dict[str, object], rows: list[list[int]]
) -> None:
    """The oracle is the stock model over one record at a time."""
    stock, model = language_model(**window), language_model(**window)
    use(model, kernel)
    batch = packed(rows)
    result_BTD = hidden_BTD(model, batch)
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            ids_BT = batch.input_ids_BT[b : b + 1, start : start + length]
            alone_BTD = stock(input_ids=ids_BT, use_cache=False).last_hidden_state
            torch.testing.assert_close(
                result_BTD[b, start : start + length], alone_BTD[0], rtol=1e-5, atol=1e-5
            )
            start += length


def test_gradients_are_those_of_the_block_mask() -> None:
    batch = packed(ROWS)
    real_BT1 = (batch.segment_ids_BT > 0).unsqueeze(-1)
    weights_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kernel in (MASKED_SDPA, BY_RECORD):
        model = language_model().train()
        checkpoint_activations(model)
        use(model, kernel)
        (hidden_BTD(model, batch) * real_BT1 * weights_D).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_a_kernel_would_leave_out_is_refused(name: str) -> None:
    q_BHTK, k_BGTK = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=rf"needs \['{name}'\], which this kernel does not support"):
        packed_attention._by_record(
            torch.nn.Module(),
            q_BHTK,
            k_BGTK,
            k_BGTK,
            None,
            records=packed([[4, 2]]).places,
            **{name: torch.ones(1)},
        )


def test_a_model_with_other_layers_keeps_its_own_attention() -> None:
    model = language_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    found = packed_attention.circumstances(model, device=torch.device("cpu"), dtype=torch.float32)
    assert choose(found) == MASKED_SDPA
    eager = language_model()
    eager.set_attn_implementation("eager")
    found = packed_attention.circumstances(eager, device=torch.device("cpu"), dtype=torch.float32)
    assert choose(found) == MASKED_SDPA
    assert use(eager, MASKED_SDPA) == "eager"


def test_generation_by_a_trained_model_is_as_before(student_dir: Path, tmp_path: Path) -> None:
    """Left-padded batches with a cache: the kernels for packed rows must not lose their mask."""
    parts = load_stock(str(student_dir))
    ids_BT = torch.randint(1, 250, (2, 7), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    words = {"attention_mask": mask_BT, "max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    before = parts.stock.generate(input_ids=ids_BT, **words)
    alone = parts.stock.generate(
        input_ids=ids_BT[:1, 4:], max_new_tokens=5, do_sample=False, min_new_tokens=5
    )
    assert before[0, -5:].tolist() == alone[0, -5:].tolist()
    use(parts.stock.model.language_model, BY_RECORD)
    assert torch.equal(parts.stock.generate(input_ids=ids_BT, **words), before)
    parts.stock.save_pretrained(tmp_path)
    assert "llava_kd" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


# On a GPU ----

GPU = pytest.mark.gpu


def on_gpu(kernel: str, batch: Inputs, window: dict[str, object]) -> Tensor:
    model = language_model(**window).to("cuda", torch.bfloat16)
    use(model, kernel)
    return hidden_BTD(model, batch.to("cuda")).float()


@GPU
@pytest.mark.parametrize("kernel", [FLASH, VARLEN])
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["full", "sliding window"])
def test_a_fast_kernel_gives_what_one_record_at_a_time_gives(kernel: str, window: dict[str, object]) -> None:
    found = packed_attention.circumstances(
        language_model(), device=torch.device("cuda"), dtype=torch.bfloat16
    )
    if not packed_attention.KERNELS[kernel](found):
        pytest.skip(f"{kernel} is not here: {found}")
    batch = packed([[50, 70, 20], [90, 10], [33]])
    expected, got = on_gpu(BY_RECORD, batch, window), on_gpu(kernel, batch, window)
    real_BT = (batch.segment_ids_BT > 0).cuda()
    exact_BTD = hidden_BTD(language_model(**window), batch).cuda()
    errors = [float((x - exact_BTD)[real_BT].norm() / exact_BTD[real_BT].norm()) for x in (got, expected)]
    assert errors[0] <= 1.5 * errors[1] + 1e-3


@GPU
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
def test_a_cuda_step_waits_for_nothing(student_dir: Path, is_packed: bool) -> None:
    """PyTorch itself raises at a synchronisation."""
    mllm = MLLM(load_stock(str(student_dir)).stock, trainable=("multi_modal_projector",)).to("cuda")
    mllm.stock.to("cuda")
    found = packed_attention.circumstances(
        mllm.language_model, device=torch.device("cuda"), dtype=torch.float32
    )
    use(mllm.language_model, choose(found))
    made = [record(1), record(2, images=0)]
    batch = inputs(made) if is_packed else inputs(*made)
    batch = replace(batch, known_places=batch.places).to("cuda")
    mllm(batch, mllm.image_features(batch))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mllm(batch, mllm.image_features(batch)).hidden_BTD.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
