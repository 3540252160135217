"""What a model does to its logits around the head: found by running its own forward, for students undone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_teachers import gemma3, paligemma
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from llava_kd.models.foreign.reading import ForeignModel, refuse_other_logits
from llava_kd.models.heads.folding import _scale_states, fold_scaling
from llava_kd.models.heads.scaling import Scaling, scaling_of

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 300, "initializer_range": 0.2}


def causal(kind: str, **more: object) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **more})).eval()


def llava_of_gemma2() -> PreTrainedModel:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "image_size": 32}
    vision["num_attention_heads"] = 4
    text = AutoConfig.for_model("gemma2", **SMALL, head_dim=8)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def capped_paligemma(cap: float | None = 2.0) -> PreTrainedModel:
    model = paligemma(3)[0]
    model.config.get_text_config().final_logit_softcapping = cap
    return model


FOUND: dict[str, tuple[Callable[[], PreTrainedModel], Scaling]] = {
    "llama": (lambda: causal("llama"), Scaling()),
    "granite": (lambda: causal("granite", logits_scaling=3.0), Scaling(after=1 / 3)),
    "cohere": (lambda: causal("cohere"), Scaling(after=0.0625)),
    "gemma2": (lambda: causal("gemma2", head_dim=8), Scaling(cap=30.0)),
    "gemma3 alone": (
        lambda: causal("gemma3_text", head_dim=8, final_logit_softcapping=7.0),
        Scaling(cap=7.0),
    ),
    "gemma3 with pictures, which passes over it": (
        lambda: gemma3(3, final_logit_softcapping=7.0)[0],
        Scaling(),
    ),
    "paligemma with pictures": (capped_paligemma, Scaling(cap=2.0)),
    "llava, which passes over it": (llava_of_gemma2, Scaling()),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_done_to_logits_is_found_without_weights(name: str) -> None:
    make, expected = FOUND[name]
    found = scaling_of(make().to("meta"))
    assert (found.before, found.cap) == (
        expected.before,
        pytest.approx(expected.cap) if expected.cap else None,
    )
    assert found.after == pytest.approx(expected.after, rel=1e-9)


def test_a_factor_before_the_head_and_one_after_it_are_told_apart() -> None:
    model = causal("llama")
    kept = model.forward

    def forward(**kwargs: object):
        states = model.model(**kwargs).last_hidden_state
        said = kept(**kwargs)
        said.logits = 3 * torch.tanh(0.2 * model.lm_head(0.5 * states) / 3)
        return said

    model.forward = forward
    found = scaling_of(model)
    assert found.before == pytest.approx(0.5)
    assert found.after == pytest.approx(0.2)
    assert found.cap == pytest.approx(3.0)


@pytest.mark.parametrize(
    "after",
    [lambda z: z.abs(), lambda z: z + 1, lambda z: 5 * torch.tanh(z / 5) + 0.1 * z, lambda z: z[..., :-1]],
    ids=["another form", "a shift", "more than a cap", "fewer columns"],
)
def test_what_is_more_than_a_factor_and_a_cap_is_refused(after: Callable) -> None:
    model = causal("llama")
    kept = model.forward

    def forward(**kwargs: object):
        said = kept(**kwargs)
        said.logits = after(said.logits)
        return said

    model.forward = forward
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than a factor and a cap"):
        scaling_of(model)


def test_a_capped_teacher_says_what_its_own_forward_says() -> None:
    model = ForeignModel(capped_paligemma())
    refuse_other_logits(model)
    ids_BT = torch.tensor([[1, 7, 9, 30]])
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        states_BTD = model.hidden(ids_BT, mask_BT, {})
        theirs_BTV = model.stock(input_ids=ids_BT, attention_mask=mask_BT).logits
    logits_BTV = model.head(states_BTD)
    assert model.cap == 2.0
    torch.testing.assert_close(2 * torch.tanh(logits_BTV / 2), theirs_BTV, rtol=1e-5, atol=1e-5)
    assert float((logits_BTV - theirs_BTV).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("granite", {"logits_scaling": 3.0, "tie_word_embeddings": True}),
        ("cohere", {}),
        ("falcon_h1", {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 7.0}),
    ],
)
@torch.no_grad()
def test_a_student_has_nothing_left_to_do_after_its_head(kind: str, more: dict) -> None:
    model = causal(kind, **more)
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    before_BTV = model(ids_BT).logits
    did = fold_scaling(model, drops_cap=True)
    assert not did.is_plain
    assert scaling_of(model).is_plain
    states_BTD = model.base_model(ids_BT).last_hidden_state
    after_BTV = model.get_output_embeddings()(states_BTD)
    if did.cap is not None:
        after_BTV = did.cap * torch.tanh(after_BTV / did.cap)
    torch.testing.assert_close(after_BTV, before_BTV, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_norm_of_one_plus_its_weight_takes_a_factor_too() -> None:
    model = causal("gemma", head_dim=8)
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    before_BTD = model.model(ids_BT).last_hidden_state
    _scale_states(model, 0.3)
    torch.testing.assert_close(model.model(ids_BT).last_hidden_state, 0.3 * before_BTD, rtol=1e-5, atol=1e-5)


def test_a_factor_that_no_norm_can_take_is_refused() -> None:
    model = causal("granite", logits_scaling=3.0)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="its last module, a Identity, cannot take the factor"):
        fold_scaling(model, drops_cap=False)
