"""Other layouts into stock directories, and stock directories out: equal logits, or refused with why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import make_language_model, make_tower
from transformers import AutoModel, LlavaForConditionalGeneration

from llava_kd.models.files.checkpoint import Parts, compose, load_stock, save_stock
from llava_kd.models.files.convert.converting import convert
from llava_kd.models.files.export import export, llama_cpp_notes, vllm_notes
from llava_kd.models.files.older_tools import make_portable


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Path]:
    """A stock student with the parts that TinyLLaVA would hold, and the folder of its parts."""
    root = tmp_path_factory.mktemp("parts")
    tower = make_tower("siglip", root / "tower")
    llm = make_language_model("qwen2", root / "llm")
    strategy = "default"
    return (
        compose(vision_tower=tower, language_model=str(llm), vision_feature_select_strategy=strategy, seed=4),
        root,
    )


def tiny_llava_layout(original: tuple[Parts, Path], out: Path, *, pickled: bool = False) -> Path:
    """As TinyLLaVA_Factory writes it: three folders of weights, and the parts' configs in the top one."""
    parts, root = original
    connector = parts.stock.model.multi_modal_projector.state_dict()
    numbers = {"linear_1": "0", "linear_2": "2"}
    projector = {f"_connector.{numbers[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in connector.items()}
    text = load_file(root / "llm" / "model.safetensors")
    for folder, state in (("connector", projector), ("language_model", text)):
        (out / folder).mkdir(parents=True)
        if pickled:
            torch.save(state, out / folder / "pytorch_model.bin")
        else:
            save_file({n: t.contiguous() for n, t in state.items()}, out / folder / "model.safetensors")
    (out / "vision_tower").symlink_to(root / "tower", target_is_directory=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text((root / "llm" / name).read_text())
    tree = {
        "model_type": "tinyllava",
        "text_config": json.loads((root / "llm" / "config.json").read_text()),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
    }
    (out / "config.json").write_text(json.dumps(tree))
    return out


def llava_layout(original: tuple[Parts, Path], out: Path) -> Path:
    """As LLaVA-1.5 writes it: one state, `mm_projector` beside the language model, the tower by name."""
    parts, root = original
    connector = parts.stock.model.multi_modal_projector.state_dict()
    numbers = {"linear_1": "0", "linear_2": "2"}
    state = load_file(root / "llm" / "model.safetensors")
    for name, tensor in connector.items():
        stem, kind = name.split(".")
        state[f"model.mm_projector.{numbers[stem]}.{kind}"] = tensor
    out.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, out / "model.safetensors")
    config = json.loads((root / "llm" / "config.json").read_text())
    tower = {"mm_vision_tower": str(root / "tower"), "mm_vision_select_layer": -2, "mm_hidden_size": 32}
    (out / "config.json").write_text(json.dumps({**config, **tower, "model_type": "llava_qwen2"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text((root / "llm" / name).read_text())
    return out


def logits(parts: Parts) -> torch.Tensor:
    image = torch.arange(3 * 40 * 50, dtype=torch.int32).remainder(251).to(torch.uint8).view(3, 40, 50)
    inputs = parts.processor(images=[image], text="<image> what?", return_tensors="pt")
    with torch.no_grad():
        return parts.stock.eval()(**inputs).logits


@pytest.mark.parametrize("layout", ["tiny", "tiny, pickled", "llava"])
def test_a_layout_comes_back_with_the_logits_of_its_parts(
    original: tuple[Parts, Path], layout: str, tmp_path: Path
) -> None:
    if layout == "llava":
        source = llava_layout(original, tmp_path / "source")
    else:
        source = tiny_llava_layout(original, tmp_path / "source", pickled="pickled" in layout)
    parts, _ = convert(source)
    assert parts.tokens_per_image == 15  # strategy `patch` drops the first of SigLIP's tokens
    save_stock(parts, tmp_path / "stock")
    ours, expected = logits(load_stock(str(tmp_path / "stock"))), logits(original[0])
    image_id = original[0].stock.config.image_token_id
    kept = torch.arange(ours.shape[-1]) != image_id  # a row that this and the original draw at random
    torch.testing.assert_close(ours[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)


def test_a_half_download_is_refused_by_name(original: tuple[Parts, Path], tmp_path: Path) -> None:
    source = tiny_llava_layout(original, tmp_path / "source")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (source / "language_model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"incomplete download: .*model-00001-of-00002"):
        convert(source)
    (source / "connector").rename(source / "elsewhere")
    with pytest.raises(ValueError, match=r"incomplete download: .*no connector"):
        convert(source)
    with pytest.raises(ValueError, match=r"has no config.json"):
        convert(tmp_path / "nothing")


def test_a_checkpoints_own_tower_is_the_one_that_is_kept(
    original: tuple[Parts, Path], tmp_path: Path
) -> None:
    """LLaVA-1.5 may train its tower: the weights beside the language model count, not those of the name."""
    source = llava_layout(original, tmp_path / "source")
    path = source / "model.safetensors"
    trained = {
        name: tensor + 0.1 for name, tensor in load_file(original[1] / "tower/model.safetensors").items()
    }
    inner = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in trained.items()}
    state = load_file(path) | {f"model.vision_tower.vision_tower.{name}": t for name, t in inner.items()}
    save_file(state, path)
    tower = convert(source)[0].stock.model.vision_tower.state_dict()
    names = {name.removeprefix("vision_model."): name for name in trained}
    assert all(torch.equal(tower[name], trained[names[name]]) for name in tower)
    save_file(state | {"model.vision_tower.vision_tower.vision_model.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"its own vision tower has 1 weights that its config does not know"):
        convert(source)


def _rewritten(**changes: object) -> Callable[[Path], None]:
    """Set keys of config.json; None takes one out."""

    def change(source: Path) -> None:
        path = source / "config.json"
        tree = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))

    return change


@pytest.mark.parametrize(
    ("layout", "spoil", "message"),
    [
        (llava_layout, _rewritten(model_type=None), "has no model_type, such as llava_llama"),
        (llava_layout, _rewritten(mm_vision_select_layer=-9), r"of 3 layers must be from -4 to -1; got -9"),
        (llava_layout, _rewritten(mm_vision_select_feature="cls"), "select strategy must be one of"),
        (tiny_llava_layout, _rewritten(vision_feature_layer=[-2, -3]), r"must be one layer; got \[-2, -3\]"),
        (
            llava_layout,
            lambda source: (source / "config.json").write_text('{"model_type": "lla'),
            r"the file .*config.json cannot be read: Unterminated",
        ),
        (
            llava_layout,
            lambda source: (source / "model.safetensors").write_text("version https://git-lfs"),
            r"the weights .*model.safetensors cannot be read",
        ),
        (
            llava_layout,
            lambda source: [(source / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
            r"the tokenizer of .* cannot be read",
        ),
        (
            tiny_llava_layout,
            lambda source: [
                (source / "connector/model.safetensors").unlink(),
                torch.save({"weight": Path}, source / "connector/pytorch_model.bin"),
            ],
            "holds more than tensors, which is never loaded",
        ),
    ],
    ids=["no type", "layer", "feature", "two layers", "config", "pointer", "tokenizer", "pickle"],
)
def test_a_spoilt_directory_says_what_is_wrong_with_which_file(
    original: tuple[Parts, Path],
    layout: Callable[..., Path],
    spoil: Callable[[Path], object],
    message: str,
    tmp_path: Path,
) -> None:
    source = layout(original, tmp_path / "source")
    spoil(source)
    with pytest.raises(ValueError, match=message):
        convert(source)


def test_another_layout_is_sent_to_convert(original: tuple[Parts, Path], tmp_path: Path) -> None:
    for layout in (llava_layout, tiny_llava_layout):
        source = layout(original, tmp_path / layout.__name__)
        with pytest.raises(ValueError, match="run `llava-kd convert` on it first"):
            load_stock(str(source))


@pytest.mark.parametrize("text", [None, "nope", "{}"], ids=["missing", "no JSON", "other keys"])
def test_scores_that_cannot_be_read_stop_an_export_before_it_writes(
    original: tuple[Parts, Path], text: str | None, tmp_path: Path
) -> None:
    save_stock(original[0], tmp_path / "model")
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary.json"):
        export(tmp_path / "model", tmp_path / "out", scores=[tmp_path / "summary.json"])
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit_name_the_tensor(original: tuple[Parts, Path], tmp_path: Path) -> None:
    source = tiny_llava_layout(original, tmp_path / "source")
    path = source / "connector" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "_connector.0.weight": torch.zeros(32, 7)}, path)
    with pytest.raises(ValueError, match=r"linear_1.weight is \(32, 7\) where its config needs \(32, 32\)"):
        convert(source)
    save_file({n: t for n, t in state.items() if n != "_connector.2.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as linear_2.bias"):
        convert(source)


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
@pytest.mark.parametrize("family", ["siglip", "clip", "timm-siglip", "open-clip"])
def test_an_export_has_the_names_and_keys_that_vllm_reads(family: str, llm: str, tmp_path: Path) -> None:
    """Those of its LLaVA and of its towers, which keep the inner `vision_model`; it was not run."""
    tower = make_tower(family, tmp_path / "tower")
    directory = make_language_model(llm, tmp_path / "llm")
    parts = compose(vision_tower=tower, language_model=str(directory))
    parts.stock.config.text_config.architectures = None
    save_stock(parts, tmp_path / "run" / "model")
    notes = export(tmp_path / "run" / "model", tmp_path / "out")
    assert not any("vLLM" in note for note in notes)
    before = ("language_model.model.", "language_model.lm_head.")
    after = ("model.language_model.", "lm_head.")
    names = load_file(tmp_path / "out" / "model.safetensors")
    text = [n.removeprefix("model.") for n in names if "language_model" in n or "lm_head" in n]
    assert all(n.startswith(before) for n in text) or all(
        n.startswith((after[0][6:], after[1])) for n in text
    )
    others = {n.removeprefix("model.").split(".")[0] for n in names} - {"language_model", "lm_head"}
    assert others == {"vision_tower", "multi_modal_projector"}
    seen = [n.split("vision_tower.")[1] for n in names if "vision_tower." in n]
    parts_of_tower = {".".join(n.split(".")[:2]) for n in seen}
    known = {f"vision_model.{n}" for n in ("embeddings", "encoder", "post_layernorm", "pre_layrnorm")}
    assert {"vision_model.embeddings", "vision_model.encoder"} <= parts_of_tower <= known
    projector = {n.split("multi_modal_projector.")[1] for n in names if "multi_modal_projector" in n}
    assert projector == {f"linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    assert config["text_config"]["model_type"] == llm
    causal = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    assert config["text_config"]["architectures"] == [causal[llm]]
    kind = "siglip_vision_model" if "siglip" in family else "clip_vision_model"
    assert config["vision_config"]["model_type"] == kind
    assert config["vision_config"].get("vision_use_head", False) is False
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == (llm == "qwen2")
    wanted = {"image_token_index", "vision_feature_layer", "vision_feature_select_strategy"}
    assert wanted | {"projector_hidden_act"} <= set(config)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert {"patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"} <= set(processor)


def test_a_sharded_export_is_renamed_with_its_index(original: tuple[Parts, Path], tmp_path: Path) -> None:
    original[0].stock.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    original[0].processor.save_pretrained(tmp_path / "out")
    make_portable(tmp_path / "out", original[0].stock.config)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 1
    assert index["weight_map"] == {name: file for file, state in shards.items() for name in state}
    size = sum(t.nbytes for state in shards.values() for t in state.values())
    assert index["metadata"]["total_size"] == size
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    before = original[0].stock.state_dict()
    assert all(torch.equal(before[name], again[name]) for name in again)
    assert {name.split(".")[2] for name in set(before) - set(again)} == {"head"}


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_no_layer_has_a_final_normalisation_that_vllm_would_leave_out(family: str, tmp_path: Path) -> None:
    tower = AutoModel.from_pretrained(make_tower(family, tmp_path / "tower"))
    pixels_ICHW = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = tower(pixels_ICHW, output_hidden_states=True).hidden_states[-1]
        tower.get_submodule("post_layernorm").weight.fill_(3.0)
        after = tower(pixels_ICHW, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_export_is_checked_and_has_a_card(
    original: tuple[Parts, Path], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    run = tmp_path / "my-run"
    save_stock(original[0], run / "model")
    (run / "run.json").write_text(json.dumps({"versions": {"torch": "9.9"}, "config": "seed: 5\n"}))
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "summary.json").write_text(json.dumps({"accuracy": 0.5, "count": 8}))
    export(run / "model", tmp_path / "out", dtype=dtype, scores=[tmp_path / "vqa" / "summary.json"])
    again = load_stock(str(tmp_path / "out"), dtype=dtype or torch.float32)
    assert again.stock.dtype == (dtype or torch.float32)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "# my-run",
        "| version: torch | 9.9 |",
        "seed: 5",
        "| vqa | 0.5000 | 8 |",
        "15 tokens an image",
    ):
        assert words in card
    before = (tmp_path / "out" / "model.safetensors").stat()
    notes = export(run / "model", tmp_path / "out", dtype=dtype, scores=[tmp_path / "vqa" / "summary.json"])
    assert "already: nothing to do" in notes[0]  # what a kill at its very end leaves
    assert (tmp_path / "out" / "model.safetensors").stat() == before
    with pytest.raises(ValueError, match="is not empty"):
        export(run / "model", tmp_path / "out", dtype=torch.float16)


def test_what_stock_llava_cannot_express_is_not_exported(
    original: tuple[Parts, Path], tmp_path: Path
) -> None:
    line = make_tower("timm-convnext", tmp_path)
    parts = compose(vision_tower=line, language_model=str(original[1] / "llm"))
    save_stock(parts, tmp_path / "student")
    with pytest.raises(ValueError, match=r"timm:convnext_tiny, for which stock LLaVA has no class"):
        export(tmp_path / "student", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert any("llava_kd_tower" in note for note in vllm_notes(parts) + llama_cpp_notes(parts))
