"""Tiny random vision towers of every family, as a config line names them, and tiny language models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_llava import PAD_TOKEN, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
)

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 3
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_TIMM_VIT = f"&embed_dim={WIDTH}&depth={DEPTH}&num_heads=2&image_size={SIZE}"


def _transformers(model_type: str, **more: object) -> Callable[[Path], str]:
    def write(directory: Path) -> str:
        config = AutoConfig.for_model(model_type, **{**_VIT, **more})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            AutoModel.from_config(config).save_pretrained(directory)
        edge = {"height": SIZE, "width": SIZE}
        if model_type.startswith("clip"):
            processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=edge)
        elif model_type.startswith("dinov2"):
            processor = BitImageProcessor(size={"shortest_edge": SIZE + 8}, crop_size=edge)
        else:
            processor = SiglipImageProcessor(size=edge)
        processor.save_pretrained(directory)
        return str(directory)

    return write


def _convnext(directory: Path) -> str:
    """A model of feature maps: [8, 16, 24, 32] channels at a 4th, 8th, 16th and 32nd of the edge."""
    config = AutoConfig.for_model("convnext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoModel.from_config(config).save_pretrained(directory)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return str(directory)


def _line(text: str) -> Callable[[Path], str]:
    return lambda directory: text


def _open_clip(**vision: object) -> Callable[[Path], str]:
    def write(directory: Path) -> str:
        import open_clip

        model_cfg = {
            "embed_dim": 16,
            "vision_cfg": {
                **{"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH},
                **{"head_width": 16},
                **vision,
            },
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        }
        directory.mkdir(parents=True)
        preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
        tree = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
        (directory / "open_clip_config.json").write_text(json.dumps(tree))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
        torch.save(model.state_dict(), directory / "open_clip_pytorch_model.bin")
        return str(directory)

    return write


# By family: how to name it, and whether a stock LLaVA can hold it.
TOWERS: dict[str, tuple[Callable[[Path], str], bool]] = {
    "siglip": (_transformers("siglip_vision_model"), True),
    "clip": (_transformers("clip_vision_model"), True),
    "dinov2": (_transformers("dinov2"), True),
    "dinov2-registers": (_transformers("dinov2_with_registers", num_register_tokens=4), True),
    "dinov3": (_transformers("dinov3_vit", num_register_tokens=4), True),
    "vit": (_transformers("vit"), True),
    "deit": (_transformers("deit"), True),
    "ijepa": (_transformers("ijepa"), True),
    "aimv2": (_transformers("aimv2_vision_model"), True),
    "convnext": (_convnext, False),
    "timm-siglip": (_line(f"timm:vit_base_patch16_siglip_224?pretrained=false{_TIMM_VIT}"), True),
    "timm-clip": (_line(f"timm:vit_base_patch16_clip_quickgelu_224?pretrained=false{_TIMM_VIT}"), True),
    "timm-vit": (_line(f"timm:vit_base_patch16_224?pretrained=false{_TIMM_VIT}"), True),
    "timm-dinov2": (
        _line(f"timm:vit_small_patch14_reg4_dinov2?pretrained=false{_TIMM_VIT}&patch_size=8"),
        True,
    ),
    "timm-dinov3": (_line(f"timm:vit_small_patch16_dinov3?pretrained=false{_TIMM_VIT}"), False),
    "timm-convnext": (
        _line(f"timm:convnext_tiny?pretrained=false&dims=[8,16,24,32]&depths=[1,1,1,1]&image_size={SIZE}"),
        False,
    ),
    "timm-hybrid": (
        _line("timm:vit_tiny_r_s16_p8_224?pretrained=false&embed_dim=32&depth=2&num_heads=2&image_size=64"),
        False,
    ),
    "open-clip": (_open_clip(), True),
    "open-clip-scale": (_open_clip(ls_init_value=0.1), False),
    "open-clip-resnet": (_open_clip(layers=[1, 1, 1, 1], width=16, image_size=64), False),
}

GRID = (SIZE // PATCH) ** 2
# Tokens and width at layer -2.
EXPECTED = {
    "siglip": (GRID, WIDTH),
    "clip": (1 + GRID, WIDTH),
    "dinov2": (1 + GRID, WIDTH),
    "dinov2-registers": (5 + GRID, WIDTH),
    "dinov3": (5 + GRID, WIDTH),
    "vit": (1 + GRID, WIDTH),
    "deit": (2 + GRID, WIDTH),
    "ijepa": (GRID, WIDTH),
    "aimv2": (GRID, WIDTH),
    "convnext": (4, 24),
    "timm-siglip": (4, WIDTH),
    "timm-clip": (5, WIDTH),
    "timm-vit": (5, WIDTH),
    "timm-dinov2": (5 + GRID, WIDTH),
    "timm-dinov3": (5 + 4, WIDTH),
    "timm-convnext": (4, 24),
    "timm-hybrid": (1 + 4, WIDTH),
    "open-clip": (1 + GRID, WIDTH),
    "open-clip-scale": (1 + GRID, WIDTH),
    "open-clip-resnet": (16, 256),
}

_LLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
# Those a stock LLaVA can hold, tied and untied, with more rows than tokens, just as many, or too few.
LANGUAGE_MODELS: dict[str, dict[str, object]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "smollm": {"model_type": "smollm3", "tie_word_embeddings": True},
    "phi": {"model_type": "phi", "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    # Their logits are multiplied, by 1/3 and by 1/16.
    "granite": {
        "model_type": "granite",
        "logits_scaling": 3.0,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    },
    "cohere": {"model_type": "cohere", "initializer_range": 0.2, "tie_word_embeddings": True},
}


def make_tower(family: str, directory: Path) -> str:
    """The config line of a tiny tower of that family, with its files in `directory`."""
    return TOWERS[family][0](directory)


def make_language_model(name: str, directory: Path, *, vocab_size: int = 264, **more: object) -> Path:
    """A tiny random causal LM directory, with a tokenizer that has no image token's row to spare or some."""
    settings = {**_LLM, **LANGUAGE_MODELS.get(name, {"model_type": name}), "vocab_size": vocab_size, **more}
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    pad = {"pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN)}
    config = AutoConfig.for_model(**settings, **ids, **pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
