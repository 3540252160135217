"""What TinyLLaVA_Factory and LLaVA write comes back with its own logits, prompt and pixels, or is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from other_layouts import (
    LAYOUTS,
    Original,
    asked,
    halved,
    llava15,
    make_original,
    padded,
    their_ids,
    tiny_config,
    tiny_flat,
    tiny_parts,
    write_tokenizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import END_TOKEN
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from llava_kd.assembly.checkpoints import convert_to
from llava_kd.data.pixels.images import ImageTransform
from llava_kd.evaluation.generation.prompt import render_prompt, render_talk
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.files.convert.converting import convert
from llava_kd.models.files.convert.pixels import padding
from llava_kd.models.files.convert.weights import read_state

PICTURE = Image.fromarray((np.mgrid[:30, :47].sum(0)[..., None] * np.array([3, 5, 7]) % 256).astype(np.uint8))
TALL = PICTURE.rotate(90, expand=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """CLIP's mean colour differs by channel."""
    return make_original(tmp_path_factory.mktemp("clip"), llm="llama", tower="clip")


def logits(parts: Parts) -> Tensor:
    inputs = parts.processor(images=[PICTURE], text="<image> what?", return_tensors="pt")
    with torch.no_grad():
        return parts.stock.eval()(**inputs).logits


def same_logits(ours: Parts, theirs: Parts) -> None:
    image_id = theirs.stock.config.image_token_id
    found, expected = logits(ours), logits(theirs)
    kept = torch.arange(found.shape[-1]) != image_id  # a row that both draw at random where there was none
    torch.testing.assert_close(found[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", [False, True], ids=["the tower it names", "--vision_tower"])
@pytest.mark.parametrize("layout", ["tiny parts", "tiny flat"])
def test_a_tower_without_an_image_processor_takes_that_of_its_name(
    original: Original, layout: str, tower: bool, tmp_path: Path
) -> None:
    source = LAYOUTS[layout](original, tmp_path / "source")
    hub = original.tower
    if tower:  # the name leads nowhere on this machine, and the given folder has other weights
        hub = shutil.copytree(original.tower, tmp_path / "copy")
        state = load_file(hub / "model.safetensors")
        save_file({n: t + 1 for n, t in state.items()}, hub / "model.safetensors")
        tree = json.loads((source / "config.json").read_text())
        tree["vision_model_name_or_path"] = tree["vision_config"]["model_name_or_path"] = "nobody/no-tower"
        (source / "config.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=r"image processor of nobody/no-tower .* with --vision_tower"):
            convert(source)
    parts, _ = convert(source, vision_tower=str(hub) if tower else None)
    same_logits(parts, original.parts)
    expected = AutoImageProcessor.from_pretrained(original.tower).to_dict()
    assert parts.processor.image_processor.to_dict() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_weights_are_read_as_they_are(
    original: Original, layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    parts, _ = convert(LAYOUTS[layout](original, tmp_path / "source", dtype=dtype))
    state = parts.stock.model.language_model.state_dict()
    for name, tensor in halved(original.text, dtype).items():
        if name != "model.embed_tokens.weight":
            assert torch.equal(state[name.removeprefix("model.")], tensor.float())


@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_other_towers_of_tinyllava(family: str, tmp_path: Path) -> None:
    original = make_original(tmp_path, tower=family, strategy="full")
    source = tiny_parts(original, tmp_path / "source", vision_feature_select_strategy="cls_patch")
    same_logits(convert(source)[0], original.parts)
    if family == "dinov2":  # resizes to 40 and crops to 32
        padded_one = tiny_parts(original, tmp_path / "padded", image_aspect_ratio="pad")
        with pytest.raises(ValueError, match=r"is pad, and the image processor .* resizes to 40, crops"):
            convert(padded_one)


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_shards_are_read_whole_or_not_at_all(original: Original, indexed: bool, tmp_path: Path) -> None:
    source = tiny_parts(original, tmp_path / "source")
    folder = source / "language_model"
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    files = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    for k, file in enumerate(files):
        torch.save({name: state[name] for name in names[k::2]}, folder / file)
    if indexed:
        index = {"weight_map": {name: files[k % 2] for k, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same_logits(convert(source)[0], original.parts)
    (folder / files[1]).unlink()
    with pytest.raises(ValueError, match=r"incomplete download: (its index lists|it has 1 of 2 shards)"):
        convert(source)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists '../secret.safetensors', which is not a file in its folder"):
        read_state(tmp_path / "model")


def linear(original: Original) -> dict[str, Tensor]:
    return {name.removeprefix("0."): t for name, t in original.connector.items() if name.startswith("0.")}


@pytest.mark.parametrize("layout", ["parts", "llava"])
def test_a_linear_connector_is_the_same_function(original: Original, layout: str, tmp_path: Path) -> None:
    one = linear(original)
    if layout == "parts":
        source = tiny_parts(original, tmp_path / "source", connector_type="linear")
        state = {f"_connector.{name}": tensor for name, tensor in one.items()}
        torch.save(state, source / "connector/pytorch_model.bin")
    else:
        source = llava15(original, tmp_path / "source", mm_projector_type="linear", image_aspect_ratio=None)
        state = original.text | {f"model.mm_projector.{name}": tensor for name, tensor in one.items()}
        save_file(state, source / "model.safetensors")
    convert_to(str(source), str(tmp_path / "out"))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    features_IND = torch.randn(2, 5, 32)
    expected = nn.functional.linear(features_IND, one["weight"], one["bias"])
    assert torch.equal(stock.model.multi_modal_projector(features_IND), expected)


def test_gemma_scales_visual_features_as_it_did_when_they_were_trained(tmp_path: Path) -> None:
    """transformers 4 multiplied words and features alike by the root of the width; 5 does words alone."""
    original = make_original(tmp_path, llm="gemma")
    parts, _ = convert(tiny_parts(original, tmp_path / "source"))
    features_IND = torch.randn(1, 4, 32)
    theirs = original.parts.stock.model.multi_modal_projector(features_IND) * 32**0.5
    torch.testing.assert_close(parts.stock.model.multi_modal_projector(features_IND), theirs)
    later, _ = convert(tiny_parts(original, tmp_path / "later", transformers_version="5.1.0"))
    same_logits(later, original.parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prompt_is_the_one_of_their_code(original: Original, layout: str, tmp_path: Path) -> None:
    """The tokenizer ends turns with its own token; LLaVA's and TinyLLaVA's answers end with it too."""
    lines = convert_to(str(LAYOUTS[layout](original, tmp_path / "source")), str(tmp_path / "out"))
    assert "llava_v1" in lines[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    talk = ["<image>\nWhat?", "A cat.", "Sure?"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=True)]
    assert render_prompt(processor, "<image>\nWhat?") == asked(talk[:1], end=END_TOKEN)
    assert render_talk(processor, messages) == asked(talk, end=END_TOKEN)
    assert load_stock(str(tmp_path / "out")).stock.generation_config.eos_token_id == (
        processor.tokenizer.eos_token_id
    )


def test_a_picture_is_padded_and_marked_as_llava_did(clip: Original, tmp_path: Path) -> None:
    source = llava15(clip, tmp_path / "source", mm_use_im_start_end=True, vocab_size=None)
    tree = json.loads((source / "config.json").read_text()) | {"vocab_size": 264}
    (source / "config.json").write_text(json.dumps(tree))
    lines = convert_to(str(source), str(tmp_path / "out"))
    assert "<im_start><image><im_end>" in lines[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    tokenizer = processor.tokenizer
    rows = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert rows == [260, 261]  # what LLaVA's loader gives them: the first after a tokenizer of 260
    prompt = render_prompt(processor, "<image>\nWhat?")
    marks = ("<im_start>", "<im_end>")
    assert prompt == asked(["<image>\nWhat?"], end=END_TOKEN, around=marks)
    image_id = load_stock(str(tmp_path / "out")).stock.config.image_token_id
    for picture in (PICTURE, TALL):
        found = processor(images=[picture], text=prompt, return_tensors="pt")
        ids = [i for i in found["input_ids"][0].tolist() if i != image_id]
        assert ids == [i for i in their_ids(prompt, tokenizer, image_id) if i != image_id]
        plain = AutoImageProcessor.from_pretrained(clip.tower, backend="pil")
        square = padded(picture, plain.image_mean)
        theirs_ICHW = plain(square, return_tensors="pt")["pixel_values"]
        transform = ImageTransform.from_processor(processor.image_processor)
        ours_CHW = transform(torch.from_numpy(np.array(picture)))
        torch.testing.assert_close(ours_CHW, theirs_ICHW[0], rtol=0, atol=1e-6)
        stock_ICHW = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")(
            picture, return_tensors="pt"
        )["pixel_values"]
        torch.testing.assert_close(stock_ICHW, theirs_ICHW, rtol=0, atol=1e-6)


def test_without_pad_the_processor_is_the_towers_own(clip: Original, tmp_path: Path) -> None:
    parts, _ = convert(llava15(clip, tmp_path / "source", image_aspect_ratio="square"))
    expected = AutoImageProcessor.from_pretrained(clip.tower)
    assert parts.processor.image_processor.to_dict() == expected.to_dict()
    assert padding(expected).to_dict()["do_pad"]


def test_marks_without_rows_of_their_own_are_refused(clip: Original, tmp_path: Path) -> None:
    source = llava15(clip, tmp_path / "source", mm_use_im_start_end=True, vocab_size=260)
    path = source / "model.safetensors"
    state = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:260].contiguous()
    save_file(state, path)
    with pytest.raises(ValueError, match="trained with <im_start>, <im_end> around a picture"):
        convert(source)


def lora(original: Original, out: Path) -> tuple[Path, dict[str, Tensor]]:
    """As TinyLLaVA's recipe leaves it: base weights by wrapped names, factors on top; and the merged ones."""
    source = tiny_parts(original, out)
    path = source / "language_model/pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    adapted = [name for name in state if "q_proj.weight" in name or "v_proj.weight" in name]
    factors, merged = {}, dict(original.text)
    for name in adapted:
        state[name.replace(".weight", ".base_layer.weight")] = weight = state.pop(name)
        stem = f"base_model.model.language_model.{name.removesuffix('.weight')}"
        a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged[name] = weight + 16 / 4 * (b @ a)
    torch.save(state, path)
    save_file(factors, source / "adapter_model.safetensors")
    tree = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "task_type": "CAUSAL_LM"}
    (source / "adapter_config.json").write_text(json.dumps(tree))
    return source, merged


def test_tinyllavas_adapters_are_merged(original: Original, tmp_path: Path) -> None:
    source, merged = lora(original, tmp_path / "source")
    state = convert(source)[0].stock.model.language_model.state_dict()
    for name in merged:
        if name != "model.embed_tokens.weight":
            torch.testing.assert_close(state[name.removeprefix("model.")], merged[name])
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"not plain LoRA \(LORA of rank 4, with use_dora\)"):
        convert(source)


def _llava_lora(original: Original, out: Path) -> Path:
    source = llava15(original, out)
    (source / "model.safetensors").unlink()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, source / "non_lora_trainables.bin")
    return source


def _projector_alone(original: Original, out: Path) -> Path:
    source = llava15(original, out)
    (source / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, source / "mm_projector.bin")
    return source


def _deepspeed(original: Original, out: Path) -> Path:
    source = llava15(original, out)
    (source / "model.safetensors").unlink()
    (source / "zero_to_fp32.py").write_text("")
    (source / "global_step7").mkdir()
    return source


def _connector(kind: str, *names: str) -> Callable[[Original, Path], Path]:
    def write(original: Original, out: Path) -> Path:
        source = tiny_parts(original, out, connector_type=kind)
        state = {f"_connector.{name}": torch.zeros(32, 32) for name in names}
        torch.save(state, source / "connector/pytorch_model.bin")
        return source

    return write


def _next(original: Original, out: Path) -> Path:
    source = llava15(original, out)
    state = load_file(source / "model.safetensors") | {"model.image_newline": torch.zeros(32)}
    save_file(state, source / "model.safetensors")
    return source


def _tower_elsewhere(original: Original, out: Path) -> Path:
    source = llava15(original, out)
    own = {f"model.vision_tower.{name}": tensor for name, tensor in original.vision.items()}
    save_file(load_file(source / "model.safetensors") | own, source / "model.safetensors")
    return source


def _quantised(original: Original, out: Path) -> Path:
    source = tiny_parts(original, out)
    path = source / "language_model/pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    name = next(name for name in state if "q_proj.weight" in name)
    torch.save(state | {name: state[name].to(torch.int8)}, path)
    return source


def _openelm(original: Original, out: Path) -> Path:
    source = tiny_flat(original, out)
    tree = tiny_config(original, text_config={"model_type": "openelm", "model_dim": 32})
    (source / "config.json").write_text(json.dumps(tree))
    return source


def _another_model(original: Original, out: Path) -> Path:
    write_tokenizer(original, out)
    (out / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return out


def _gguf(original: Original, out: Path) -> Path:
    out.mkdir()
    (out / "model-q4.gguf").write_bytes(b"GGUF")
    return out


def _changed(layout: Callable[..., Path], **changes: object) -> Callable[[Original, Path], Path]:
    return lambda original, out: layout(original, out, **changes)


REFUSED: dict[str, tuple[Callable[[Original, Path], Path], str]] = {
    "llava lora": (_llava_lora, r"LoRA adapters .* merge them into their base first"),
    "projector": (_projector_alone, r"projector of a first stage alone \(mm_projector.bin\)"),
    "deepspeed": (_deepspeed, r"shards of DeepSpeed.* zero_to_fp32.py"),
    "mlp3x": (_connector("mlp3x_gelu", "0.weight", "2.weight", "4.weight"), "the connector 'mlp3x_gelu'"),
    "resampler": (_connector("resampler", "latents", "norm.weight"), "the connector 'resampler'"),
    "qformer": (_connector("qformer", "query_tokens", "projector.weight"), "the connector 'qformer'"),
    "mof_mlp": (_connector("mof_mlp", "clip.0.weight", "dinov2.0.weight"), "the connector 'mof_mlp'"),
    "identity": (_connector("identity"), "the connector 'identity'"),
    "unknown": (_connector("ldp", "a.weight"), "the connector 'ldp'"),
    "mof": (_changed(tiny_parts, vision_model_name_or_path="mof:openai/clip"), r"two vision towers \(mof\)"),
    "anyres": (_changed(llava15, image_aspect_ratio="anyres"), r"LLaVA-NeXT \(1.6\) checkpoint: image_asp"),
    "anyres tiny": (_changed(tiny_flat, image_aspect_ratio="anyres"), "image_aspect_ratio must be square or"),
    "newline": (_next, r"LLaVA-NeXT \(1.6\) checkpoint: it has an image_newline"),
    "s2": (_changed(llava15, s2=True), r"several scales \(s2\)"),
    "int8": (_quantised, r"quantised \(model.*q_proj.weight is torch.int8\)"),
    "config of int8": (_changed(llava15, quantization_config={}), "is quantised; convert the checkpoint"),
    "openelm": (_openelm, "is of type 'openelm', which this transformers has no code for"),
    "another": (_another_model, "is a 'qwen2_vl' model"),
    "gguf": (_gguf, "holds a GGUF file"),
    "trained tower": (
        _changed(llava15, unfreeze_mm_vision_tower=True),
        r"was trained together with its vision tower .*, and has no weights of it",
    ),
    "tunable tower": (
        _changed(llava15, mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model"),
        "was trained together with its vision tower",
    ),
    "tower elsewhere": (_tower_elsewhere, r"has the weight model.vision_tower\..* or they would be left out"),
    "two layers": (_changed(llava15, mm_vision_select_layer=[-2, -3]), "must be one layer"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_by_its_name(
    original: Original, write: Callable[[Original, Path], Path], message: str, tmp_path: Path
) -> None:
    source = write(original, tmp_path / "source")
    with pytest.raises(ValueError, match=message) as caught:
        convert(source)
    assert "\n" not in str(caught.value)


def test_a_converted_model_is_written_without_pickles_or_code(original: Original, tmp_path: Path) -> None:
    save_stock(convert(tiny_parts(original, tmp_path / "source"))[0], tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_sentencepiece_file_alone_names_the_packages_that_read_it(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks for tiktoken there, which does not help."""
    for name in ("sentencepiece", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)
    source = tiny_parts(original, tmp_path / "source")
    for path in source.glob("*token*"):
        path.unlink()
    (source / "tokenizer.model").write_bytes(b"\x0a\x05\x0a\x01a\x15\x00")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match=r"SentencePiece file alone .* pip install sentencepiece protobuf"):
        convert(source)
