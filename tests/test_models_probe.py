"""A record is read as if it were alone, or the model is refused by name: every type of transformers.

The oracle is the stock model over one record at a time.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_decoders import WINDOW, tiny_decoder
from tiny_llava import tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_kd.models.attention.packed import BY_RECORD, MASKED_SDPA, read_rows
from llava_kd.models.attention.probe import choose_kernel, rows_of
from llava_kd.models.attention.row_limits import check_rows
from llava_kd.models.language_model import prepare_language_model

CPU = torch.device("cpu")
STATEFUL = ["qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "granitemoehybrid", "jamba", "minimax"]
DEAF = ["gpt_oss", "xglm", "biogpt"]  # they do not hand positions to their mask


def choose(model: PreTrainedModel, *, is_packed: bool) -> str:
    return choose_kernel(
        model.base_model, device=CPU, dtype=torch.float32, is_packed=is_packed, whose="the student"
    )


@pytest.mark.parametrize("kind", [*STATEFUL, *DEAF])
def test_a_model_that_mixes_packed_records_is_refused_by_name(kind: str) -> None:
    model = tiny_decoder(kind)
    with pytest.raises(
        ValueError, match=rf"{kind}.* of the student .*`data.packing`.*set data.packing to null"
    ):
        choose(model, is_packed=True)
    assert choose(model, is_packed=False) in (MASKED_SDPA, "eager")
    differences = measured(model.base_model, tiny_decoder(kind).base_model, lengths=(9, 5, 7), is_packed=True)
    assert differences["packed"] > 1e-3
    assert max(differences["padded"], differences["later"]) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "phi3", "qwen3_moe"])
def test_a_plain_model_takes_the_kernel_for_records(kind: str) -> None:
    assert choose(tiny_decoder(kind), is_packed=True) == BY_RECORD


def test_a_model_that_drops_keywords_does_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' nemotron does: `records` never reach its attention."""
    model = tiny_decoder("qwen2")
    for layer in model.base_model.layers:
        attend = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda records=None, attend=attend, **known: attend(**known)
        )
    assert choose(model, is_packed=True) == MASKED_SDPA
    model.base_model.set_attn_implementation(BY_RECORD)
    with pytest.raises(ValueError, match="does not pass them on to its attention"):
        read_rows(model.base_model, batch := rows_of([[[1, 2]]], CPU), embedded(model.base_model, batch))


def test_nemotron_is_causal_and_keeps_rows_apart() -> None:
    model, alone = tiny_decoder("nemotron"), tiny_decoder("nemotron")
    choose(model, is_packed=False)
    differences = measured(model.base_model, alone.base_model, lengths=(9, 5, 7), is_packed=False)
    assert max(differences.values()) < 1e-5


def test_a_model_that_sees_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder("qwen2")
    forward = model.base_model.forward

    def looks_ahead(**known: object) -> object:
        output = forward(**known)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(model.base_model, "forward", looks_ahead)
    with pytest.raises(ValueError, match=r"'qwen2'.*changes with the tokens after it"):
        choose(model, is_packed=False)


def test_the_probe_leaves_nothing_behind() -> None:
    """A resumed run draws what the first would have drawn."""
    model = tiny_decoder("qwen2", attention_dropout=0.2)
    model.train()
    model.base_model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    choose(model, is_packed=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.base_model.layers] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_not_taken_for_mixing() -> None:
    for kind, dtype in (("qwen2", torch.bfloat16), ("qwen3_moe", torch.bfloat16), ("llama", torch.float16)):
        for weights in (dtype, torch.float32):
            model = tiny_decoder(kind).to(weights).base_model
            kernel = choose_kernel(model, device=CPU, dtype=dtype, is_packed=True)
            assert kernel == BY_RECORD
    model = tiny_decoder("qwen3_next").to(torch.bfloat16).base_model
    with pytest.raises(ValueError, match=r"qwen3_next.*data\.packing"):
        choose_kernel(model, device=CPU, dtype=torch.bfloat16, is_packed=True)


# The whole list ----


def embedded(model: PreTrainedModel, batch: object) -> Tensor:
    return model.get_input_embeddings()(batch.input_ids_BT)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def measured(
    model: PreTrainedModel, alone: PreTrainedModel, *, lengths: tuple[int, int, int], is_packed: bool
) -> dict[str, float]:
    """Largest difference of a token's output, over its norm, from one record at a time."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 250, (n,), generator=generator).tolist() for n in lengths]

    def read(*rows: list[list[int]]) -> Tensor:
        batch = rows_of(rows, CPU)
        return read_rows(model, batch, embedded(model, batch))

    def apart(one: Tensor, other: Tensor) -> float:
        return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())

    expected = []
    for record in ids:
        batch = rows_of([[record]], CPU)
        expected.append(alone(inputs_embeds=embedded(alone, batch), use_cache=False).last_hidden_state[0])
    padded = read(*([record] for record in ids))
    changed = read([[*ids[0][:-1], ids[0][-1] + 1]], [ids[1]], [ids[2]])
    found = {
        "padded": max(apart(padded[b, :n], expected[b]) for b, n in enumerate(lengths)),
        "later": apart(changed[0, : lengths[0] - 1], padded[0, : lengths[0] - 1]),
    }
    if is_packed:
        packed = read([ids[0], ids[1]], [ids[2]])
        parts = (packed[0, : lengths[0]], packed[0, lengths[0] :][: lengths[1]], packed[1, : lengths[2]])
        found["packed"] = max(apart(part, of) for part, of in zip(parts, expected, strict=True))
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: str, *, is_packed: bool) -> str:
    """In a word, and why. Records are longer than what the probe tries, and than the tiny windows."""
    try:
        with at_most(20):
            model, alone = tiny_decoder(kind), tiny_decoder(kind)
    except Exception as error:  # whatever a class of theirs says to our sizes
        return f"cannot be built: {type(error).__name__} {' '.join(str(error).split())[:120]}"
    lengths = (45, 23, 38)
    try:
        for causal in (model, alone):
            prepare_language_model(causal, tiny_tokenizer(), kind)
    except ValueError as error:
        return f"not for a stock LLaVA: {error}"
    text = model.base_model.config
    try:
        check_rows(text, max_length=45, max_tokens=68 if is_packed else None)
    except ValueError as error:
        lengths = (9, 5, WINDOW)
        try:
            check_rows(text, max_length=WINDOW, max_tokens=WINDOW if is_packed else None)
        except ValueError:
            return f"refused: {error}"
    try:
        choose(model, is_packed=is_packed)
    except ValueError as error:
        return f"refused: {error}"
    differences = measured(model.base_model, alone.base_model, lengths=lengths, is_packed=is_packed)
    equal = max(differences.values()) < 1e-5
    return f"equal{'' if lengths[0] == 45 else ' up to its limit'}" if equal else f"DIFFERS {differences}"


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
def test_every_causal_language_model_is_equal_or_refused(is_packed: bool) -> None:
    found = {kind: outcome(kind, is_packed=is_packed) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    counts = Counter(what.split(":")[0].split(" {")[0] for what in found.values())
    print(json.dumps(found, indent=1), counts, sep="\n")
    assert not [(kind, what) for kind, what in found.items() if "DIFFERS" in what]
    assert all("' language model" in what for what in found.values() if what.startswith("refused"))
    assert counts["equal"] >= 60
    assert counts["cannot be built"] <= 20
