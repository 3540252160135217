"""Tiny random vision-language models of other families than LLaVA, with their own processors, for tests.

Their tokenizer is that of `tiny_llava` with the family's tokens behind it: a tiny LLaVA can learn from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny_llava import SPECIAL_TOKENS, tiny_tokenizer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

WIDTH = 40
WIDE = 0.2  # of what weights are drawn from, so that other inputs give other answers


def chat_template(image: str, *, before: str = "", end: str = "<|im_end|>", strip: bool = False) -> str:
    """Messages of parts, as the processors of these families take them."""
    text = "part['text']|trim" if strip else "part['text']"
    return (
        f"{before}{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
        f"{{% endfor %}}{end}\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer_with(*tokens: str, bos: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    """That of `tiny_llava`, `tokens` behind it; `roles` name what a processor looks for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *tokens]})
    backend = tokenizer.backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=bos,
        extra_special_tokens=roles,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _text(**more: object) -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": WIDE,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        **more,
    }


def _drawn(kind: type, config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():  # some are made of zeros, so no picture would count
            if not parameter.any() and "norm" not in name and "bias" not in name:
                torch.nn.init.normal_(parameter, std=WIDE)
    return model.eval()


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
    )  # fmt: skip


_QWEN_TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>")


def _qwen(
    kind: type, config: type, processor: type, video: type, vision: dict, text: dict, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
    )}  # fmt: skip
    size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    shape = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    made = processor(
        image_processor=Qwen2VLImageProcessor(size=size, **shape),
        tokenizer=tokenizer,
        video_processor=video(size=size, **shape),
        chat_template=_QWEN_TEMPLATE,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 10000.0}
    settings = config(
        vision_config=vision,
        text_config=_text(vocab_size=len(tokenizer), rope_parameters=rope, rope_scaling=rope, **text),
        tie_word_embeddings=False,
        **ids,
    )
    return _drawn(kind, settings, seed), made


def qwen2_vl(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
    }
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": WIDE}
    return _qwen(
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        vision,
        {},
        seed,
    )


def qwen2_5_vl(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 64,
    }
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    vision |= {"fullatt_block_indexes": [1], "initializer_range": WIDE}
    return _qwen(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor,
        vision, {}, seed,
    )  # fmt: skip


def qwen3_vl(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 64,
    }
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": WIDE}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return _qwen(
        Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor,
        vision, {"head_dim": 10}, seed,
    )  # fmt: skip


def internvl(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    roles = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = tokenizer_with("<img>", "</img>", "<IMG_CONTEXT>", "<video>", video_token="<video>", **roles)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>\n"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": [32, 32], "patch_size": [8, 8], "initializer_range": WIDE}
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text(vocab_size=len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return _drawn(InternVLForConditionalGeneration, config, seed), processor


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava_next(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with(image_token="<image>")
    size = {"height": 32, "width": 32}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\n"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=Qwen2Config(**_text(vocab_size=len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        tie_word_embeddings=False,
    )
    return _drawn(LlavaNextForConditionalGeneration, config, seed), processor


def llava_onevision(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with("<video>", image_token="<image>", video_token="<video>")
    size = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_PINPOINTS),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>\n"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Qwen2Config(**_text(vocab_size=len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _drawn(LlavaOnevisionForConditionalGeneration, config, seed), processor


def _idefics(seed: int, *, is_smol: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(4) for j in range(4)]
    own = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows, "<video>")
    tokenizer = tokenizer_with(*own)
    images = SmolVLMImageProcessor if is_smol else Idefics3ImageProcessor
    settings = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    shared = {
        "image_processor": images(**settings),
        "tokenizer": tokenizer,
        "image_seq_len": 4,
        "chat_template": chat_template("<image>", end="<end_of_utterance>"),
    }
    if is_smol:
        size = {"longest_edge": 32}
        video = SmolVLMVideoProcessor(
            size=size, max_image_size=size, video_sampling={"fps": 1, "max_frames": 2}
        )
        processor = SmolVLMProcessor(video_processor=video, **shared)
    else:
        processor = Idefics3Processor(**shared)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "initializer_range": WIDE}
    kind = SmolVLMForConditionalGeneration if is_smol else Idefics3ForConditionalGeneration
    config = (SmolVLMConfig if is_smol else Idefics3Config)(
        vision_config=vision,
        text_config=_text(vocab_size=len(tokenizer), model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _drawn(kind, config, seed), processor


def idefics3(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    return _idefics(seed, is_smol=False)


def smolvlm(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    return _idefics(seed, is_smol=True)


def gemma3(seed: int, **text: object) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tokenizer_with(*own.values(), bos="<|endoftext|>", **own)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>", before="{{ bos_token }}"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = _text(vocab_size=len(tokenizer), head_dim=10, query_pre_attn_scalar=10, sliding_window=64)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Gemma3TextConfig(**settings, pad_token_id=tokenizer.pad_token_id, **text),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        initializer_range=WIDE,
        tie_word_embeddings=False,
    )
    return _drawn(Gemma3ForConditionalGeneration, config, seed), processor


def mistral3(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = tokenizer_with("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 48}, patch_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**vision, image_size=48, patch_size=8, initializer_range=WIDE),
        text_config=MistralConfig(**_text(vocab_size=len(tokenizer), head_dim=10)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return _drawn(Mistral3ForConditionalGeneration, config, seed), processor


def paligemma(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Its processor has no chat template: it takes no conversation."""
    tokenizer = tokenizer_with("<bos>", bos="<bos>", image_token="<image>")
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=32, patch_size=8, vision_use_head=False),
        text_config=_text(vocab_size=len(tokenizer), head_dim=10, model_type="gemma"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
    )
    return _drawn(PaliGemmaForConditionalGeneration, config, seed), processor


TEACHERS: Mapping[str, Callable[[int], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "mistral3": mistral3,
}


def scale_and_cap(patch: pytest.MonkeyPatch, kind: type[PreTrainedModel], cap: float = 2.0) -> None:
    """Let a family's own forward do what those of Gemma 4 and Granite do: 0.4 times its logits, capped."""
    own = kind.forward

    def forward(self: PreTrainedModel, *args: object, **given: object) -> object:
        said = own(self, *args, **given)
        said.logits = cap * torch.tanh(0.4 * said.logits / cap)
        return said

    patch.setattr(kind, "forward", forward)


def write_teacher(
    directory: Path,
    make: Callable[[int], tuple[PreTrainedModel, ProcessorMixin]],
    seed: int = 3,
) -> Path:
    model, processor = make(seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
