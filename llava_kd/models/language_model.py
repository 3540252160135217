"""Causal language models that a stock LLaVA can hold without changing what they compute.

Shape legend: B rows, T tokens, D width, V vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_kd.models.heads.folding import fold_scaling
from llava_kd.models.heads.scaling import says_of_logits
from llava_kd.models.reading import existing, read_config, read_pretrained, read_tokenizer

IMAGE_TOKEN = "<image>"
_PROBE_IDS = (1, 2, 3, 5, 8)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def load_language_model(
    name: str, *, dtype: torch.dtype, drops_logit_cap: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with an image token and rows for it.

    An image token and rows are added only where there is none; existing rows never move. A factor of its
    logits moves into its final norm; `drops_logit_cap` takes a cap off. Raises ValueError for a model that
    would compute something else inside a stock LLaVA.
    """
    name = existing(name, "the language model")
    if type(text := read_config(name)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"the language model {name} is a {text.model_type!r} model, not a causal language model"
        )
    tokenizer = read_tokenizer(name)
    causal = read_pretrained(AutoModelForCausalLM, name, dtype)
    prepare_language_model(causal, tokenizer, name, drops_logit_cap=drops_logit_cap)
    return causal, tokenizer


def prepare_language_model(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    drops_logit_cap: bool = False,
) -> None:
    """Check a loaded model and give both an image token; see `load_language_model`."""
    causal.eval()
    _check_structure(causal, name)
    try:
        fold_scaling(causal, drops_cap=drops_logit_cap)
    except ValueError as error:
        raise ValueError(f"the language model {name}: {error}") from error
    _check_computation(causal, name)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > causal.config.get_text_config().vocab_size:
        causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def decoder_of(causal: PreTrainedModel) -> nn.Module:
    """The model below the head, of the class that stock LLaVA makes from its config."""
    return causal.base_model


def _check_structure(causal: PreTrainedModel, name: str) -> None:
    """ValueError where stock LLaVA has no place for a part."""
    decoder, kind = decoder_of(causal), causal.config.model_type
    try:
        with torch.device("meta"):
            expected = type(AutoModel.from_config(causal.config))
    except ValueError as error:
        raise ValueError(
            f"the language model {name} ({kind!r}) cannot be part of a stock LLaVA: transformers has no "
            "decoder of its own for it; take another model"
        ) from error
    if type(decoder) is not expected or not {"embed_tokens", "layers"} <= set(dict(decoder.named_children())):
        raise ValueError(
            f"the language model {name} ({kind!r}) cannot be part of a stock LLaVA, which builds a "
            f"{expected.__name__} with embed_tokens and layers; this one is a {type(decoder).__name__} of "
            f"{sorted(dict(decoder.named_children()))}"
        )
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the language model {name} ({kind!r}) must have a linear head; got {head}")
    if head.bias is not None:
        largest = float(head.bias.detach().abs().max())
        if largest > 0:
            raise ValueError(
                f"the language model {name} ({kind!r}) has a bias on its head (lm_head.bias, up to "
                f"{largest:.3g}), which stock LLaVA does not support: its logits would change. Take a model "
                "without one, such as Phi-3 instead of Phi-2"
            )
        head.register_parameter("bias", None)


@torch.no_grad()
def _check_computation(causal: PreTrainedModel, name: str) -> None:
    """ValueError where the head's own input times the head is not what the model predicts.

    Stock LLaVA applies the head and nothing after it: what is left of scaled logits, or a decoder that reads
    ids beside embeddings, would be lost in silence.
    """
    ids_BT = torch.tensor([_PROBE_IDS]) % causal.config.get_text_config().vocab_size
    ids_BT = ids_BT.to(causal.device)
    decoder = decoder_of(causal)
    embedded_BTD = causal.get_input_embeddings()(ids_BT)
    try:
        hidden_BTD = decoder(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the language model {name} ({causal.config.model_type!r}) cannot read embeddings alone, which "
            f"is all that stock LLaVA gives it ({' '.join(str(error).split())}); take another model"
        ) from error
    head = causal.get_output_embeddings()
    assert head is not None
    ours_BTV = head(hidden_BTD).float()
    theirs_BTV = causal(input_ids=ids_BT, use_cache=False).logits.float()
    difference = float((ours_BTV - theirs_BTV).abs().max())
    if not difference <= _TOLERANCE[causal.dtype] * max(1.0, float(theirs_BTV.abs().max())):
        raise ValueError(
            f"the language model {name} ({causal.config.model_type!r}) computes logits from more than its "
            f"decoder and head, which are all that stock LLaVA keeps: logits differ by {difference:.3g}; "
            f"look at {says_of_logits(causal)}"
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations again in the backward, by the name that this transformers does not warn of."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
