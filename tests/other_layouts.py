"""Folders as the code of TinyLLaVA_Factory and LLaVA leaves them, and what that code feeds its models.

Written after a reading of TinyLLaVA_Factory 53f12c7 (`training_recipe/base.py`, `lora_recipe.py`,
`model/configuration_tinyllava.py`, `data/template/`, `data/image_preprocess.py`) and LLaVA c121f04
(`train/train.py`, `model/builder.py`, `mm_utils.py`, `conversation.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_towers import make_language_model, make_tower
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava_kd.models.files.checkpoint import Parts, compose

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@dataclass(frozen=True, kw_only=True)
class Original:
    """A stock model, and the folders of the language model and tower that it was put together from."""

    parts: Parts
    llm: Path
    tower: Path

    @property
    def text(self) -> dict[str, Tensor]:
        """Named as parameters are: a tied head once, under the name of the embeddings."""
        return load_file(self.llm / "model.safetensors")

    @property
    def vision(self) -> dict[str, Tensor]:
        """By the names of transformers 4, which wrote SigLIP and CLIP below `vision_model.`."""
        state = load_file(self.tower / "model.safetensors")
        kind = json.loads((self.tower / "config.json").read_text())["model_type"]
        inner = "" if kind == "dinov2" else "vision_model."
        return {f"{inner}{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}

    @property
    def connector(self) -> dict[str, Tensor]:
        state = self.parts.stock.model.multi_modal_projector.state_dict()
        return {n.replace("linear_1", "0").replace("linear_2", "2"): t.clone() for n, t in state.items()}

    def config(self, name: str) -> dict:
        return json.loads((getattr(self, name) / "config.json").read_text())


def make_original(
    root: Path, *, llm: str = "qwen2", tower: str = "siglip", strategy: str = "default"
) -> Original:
    vision = Path(make_tower(tower, root / f"tiny-{tower}"))
    language = make_language_model(llm, root / f"tiny-{llm}")
    assert strategy in ("default", "full")
    parts = compose(
        vision_tower=str(vision),
        language_model=str(language),
        vision_feature_select_strategy=strategy,
        seed=4,
    )
    return Original(parts=parts, llm=language, tower=vision)


def halved(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {n: t.contiguous() if dtype is None else t.to(dtype).contiguous() for n, t in state.items()}


def tiny_config(original: Original, **changes: object) -> dict:
    tree = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "connector_type": "mlp2x_gelu",
        "llm_model_name_or_path": str(original.llm),
        "tokenizer_name_or_path": str(original.llm),
        "vision_model_name_or_path": str(original.tower),
        "vision_model_name_or_path2": "",
        "image_token_index": -200,
        "image_aspect_ratio": "square",
        "text_config": original.config("llm"),
        "vision_config": {
            **original.config("tower"),
            "model_name_or_path": str(original.tower),
            "model_name_or_path2": "",
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "tokenizer_use_fast": False,
        "tokenizer_padding_side": "right",
        "tune_type_llm": "full",
        "transformers_version": "4.39.3",
    }
    return {k: v for k, v in (tree | changes).items() if v is not None}


def write_tokenizer(original: Original, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in original.llm.glob("*token*"):
        shutil.copy(path, out)


def tiny_parts(original: Original, out: Path, *, dtype: torch.dtype | None = None, **changes: object) -> Path:
    """Three folders of pickled parameters; a config beside two of them, and no image processor anywhere."""
    write_tokenizer(original, out)
    (out / "config.json").write_text(json.dumps(tiny_config(original, **changes)))
    (out / "trainer_state.json").write_text("{}")
    connector = {f"_connector.{name}": tensor for name, tensor in original.connector.items()}
    states = {"language_model": original.text, "vision_tower": original.vision, "connector": connector}
    for folder, state in states.items():
        (out / folder).mkdir()
        torch.save(halved(state, dtype), out / folder / "pytorch_model.bin")
    (out / "language_model/config.json").write_text(json.dumps(original.config("llm")))
    (out / "vision_tower/config.json").write_text(json.dumps(original.config("tower")))
    return out


def tiny_flat(original: Original, out: Path, *, dtype: torch.dtype | None = None, **changes: object) -> Path:
    """One state, as the fine-tuning writes it and as it is published."""
    write_tokenizer(original, out)
    (out / "config.json").write_text(json.dumps(tiny_config(original, **changes)))
    state = {
        **{f"language_model.{name}": tensor for name, tensor in original.text.items()},
        **{f"vision_tower._vision_tower.{name}": tensor for name, tensor in original.vision.items()},
        **{f"connector._connector.{name}": tensor for name, tensor in original.connector.items()},
    }
    save_file(halved(state, dtype), out / "model.safetensors", metadata={"format": "pt"})
    return out


def llava15(original: Original, out: Path, *, dtype: torch.dtype | None = None, **changes: object) -> Path:
    """One state of a language model with `model.mm_projector` in it; the tower is named and not kept."""
    write_tokenizer(original, out)
    text = original.config("llm")
    tree = {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": f"llava_{text['model_type']}",
        "mm_vision_tower": str(original.tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "transformers_version": "4.37.2",
    } | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    state = original.text | {f"model.mm_projector.{n}": t for n, t in original.connector.items()}
    save_file(halved(state, dtype), out / "model.safetensors", metadata={"format": "pt"})
    return out


LAYOUTS = {"tiny parts": tiny_parts, "tiny flat": tiny_flat, "llava": llava15}


def asked(talk: list[str], *, end: str, around: tuple[str, str] = ("", "")) -> str:
    """The prompt of their code: the picture goes before the words of its turn, whatever stood where."""
    text = SYSTEM
    for number, words in enumerate(talk):
        if number % 2:
            text += f" {words}{end}"
            continue
        if "<image>" in words:
            words = f"{around[0]}<image>{around[1]}\n{words.replace('<image>', '').strip()}"
        text += f"USER: {words} ASSISTANT:"
    return text


def their_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, image_id: int) -> list[int]:
    """The text between pictures is tokenised by itself, each piece without the token that starts it."""
    pieces = [tokenizer(piece)["input_ids"] for piece in prompt.split("<image>")]
    lead = [tokenizer.bos_token_id] if pieces[0][:1] == [tokenizer.bos_token_id] else []
    ids = list(lead)
    for number, piece in enumerate(pieces):
        ids += ([image_id] if number else []) + piece[len(lead) :]
    return ids


def padded(picture: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Pasted into the middle of a square of the mean colour, cut to whole numbers."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
