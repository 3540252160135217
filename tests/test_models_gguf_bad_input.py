"""What cannot be written as GGUF, or not as asked: one line that says why, and nothing in its place."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower
from tokenizers import Tokenizer, models, pre_tokenizers

from llava_kd.assembly.parts.models import student_parts
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import save_stock

pytest.importorskip("gguf", reason="the gguf extra is not installed")
import gguf_by_hand as by_hand

from llava_kd.models.files.gguf.exporting import LANGUAGE, VISION, export_gguf
from llava_kd.models.files.gguf.writing import read_back


def student(root: Path, tower: str = "siglip", kind: str = "qwen2", **more: object) -> Path:
    text = make_language_model(kind, root / "text", **more)
    config = StudentConfig(vision_tower=make_tower(tower, root / "tower"), language_model=str(text))
    save_stock(student_parts(config, template="chatml", seed=0), root / "model")
    return root / "model"


def change(directory: Path, name: str, edit: Callable[[dict], object]) -> Path:
    path = directory / name
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    return directory


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_llava(tmp_path / "tiny", hidden=64)


@pytest.mark.parametrize(
    ("tower", "kind", "more", "said"),
    [
        ("dinov2", "qwen2", {}, r"tower 'dinov2', which llama.cpp's vision file has no map for; it has"),
        ("convnext", "qwen2", {}, r"no map for; it has \['clip_vision_model', 'siglip_vision_model'\]"),
        ("siglip", "stablelm", {}, "'stablelm', which there is no GGUF map for; there is one for .*'llama'"),
        ("siglip", "olmo3", {}, r"no GGUF map for.*\(did you mean olmo, olmo2\?\)"),
        ("clip", "qwen2", {}, "strategy 'full'; .* 'clip_vision_model' needs 'default'"),
        ("siglip", "llama", {"hidden_act": "gelu"}, "its activation must be silu; it is gelu"),
        ("siglip", "smollm", {"no_rope_layers": [1, 0]}, "each 4th layer must be without positions"),
        ("siglip", "gemma3", {"query_pre_attn_scalar": 4}, "query_pre_attn_scalar must be head_dim"),
    ],
)
def test_a_student_that_llama_cpp_has_no_map_for(
    tmp_path: Path, tower: str, kind: str, more: dict, said: str
) -> None:
    source = student(tmp_path, tower, kind, **more)
    with pytest.raises(ValueError, match=said):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_kind(tmp_path: Path, tiny: Path) -> None:
    path = tiny / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = Tokenizer(models.WordLevel(vocab=tree["model"]["vocab"], unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([token["content"] for token in tree["added_tokens"]])
    path.write_text(words.to_str())
    with pytest.raises(ValueError, match="is of kind WordLevel; GGUF files are written for BPE"):
        export_gguf(tiny, tmp_path / "out")


def test_a_rule_of_words_that_nobody_knows_is_written_as_default_and_told(tmp_path: Path, tiny: Path) -> None:
    def edit(tree: dict) -> None:
        punctuation = {"type": "Punctuation", "behavior": "Isolated"}
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [punctuation, tree["pre_tokenizer"]]}

    assert not any("rule by which" in note for note in export_gguf(tiny, tmp_path / "known"))
    notes = export_gguf(change(tiny, "tokenizer.json", edit), tmp_path / "out")
    (note,) = [note for note in notes if "rule by which" in note]
    assert "load with a warning, split some words and numbers differently" in note
    assert note.removeprefix("llama.cpp: ") in (tmp_path / "out" / "README.md").read_text()
    assert by_hand.settings(tmp_path / "out" / LANGUAGE)["tokenizer.ggml.pre"] == "default"


def test_adapters_beside_the_weights(tmp_path: Path, tiny: Path) -> None:
    path = tiny / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("q_proj.weight") and "language" in name)
    state[name.replace(".weight", ".lora_A.default.weight")] = torch.zeros(2, 64)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"holds adapters beside the weights .* merge them first"):
        export_gguf(tiny, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda state, name: state.pop(name), "has no weight language_model.norm.weight"),
        (lambda state, name: state.update({name: torch.ones(3)}), r"must be of shape \(64,\)"),
        (lambda state, name: state.update({"model.extra": torch.ones(3)}), "has the weight extra"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_weights_that_are_not_those_of_the_config(
    tmp_path: Path, tiny: Path, edit: Callable[[dict, str], object], said: str
) -> None:
    path = tiny / "model.safetensors"
    state = load_file(path)
    edit(state, next(name for name in state if name.endswith("norm.weight") and "layer" not in name[20:]))
    save_file(state, path)
    with pytest.raises(ValueError, match=said):
        export_gguf(tiny, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [(1e5, "float16", "more than float16 can; take --dtype bfloat16"), (float("nan"), "q8_0", "not finite")],
)
def test_numbers_that_a_type_cannot_hold(
    tmp_path: Path, tiny: Path, value: float, dtype: str, said: str
) -> None:
    path = tiny / "model.safetensors"
    state = load_file(path)
    next(tensor for name, tensor in state.items() if name.endswith("k_proj.weight"))[0, 0] = value
    save_file(state, path)
    with pytest.raises(ValueError, match=said):
        export_gguf(tiny, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_few_bits_of_rows_that_are_no_blocks(tmp_path: Path) -> None:
    source = _narrow(make_tiny_llava(tmp_path / "narrow", hidden=48, layers=1))
    for dtype in ("q8_0", "q4_0"):
        with pytest.raises(ValueError, match=rf"multiples of 32 numbers, as {dtype} needs .* width is 48"):
            export_gguf(source, tmp_path / "out", dtype=dtype)


def _narrow(source: Path) -> Path:
    """The same with an MLP of 40."""
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        if "language" in name and ".mlp." in name:
            cut = tensor[:, :40] if "down_proj" in name else tensor[:40]
            state[name] = cut.contiguous()
    save_file(state, source / "model.safetensors")
    return change(source, "config.json", lambda tree: tree["text_config"].update(intermediate_size=40))


def test_a_head_that_no_cache_of_q8_0_can_hold_is_told(tmp_path: Path, tiny: Path) -> None:
    notes = export_gguf(tiny, tmp_path / "out")
    assert any("a head is 16 wide, no multiple of 32, so its cache cannot be quantised" in n for n in notes)


def test_a_directory_that_holds_another_model(tmp_path: Path, tiny: Path) -> None:
    other = make_tiny_llava(tmp_path / "other", hidden=64, seed=1)
    export_gguf(tiny, tmp_path / "out")
    before = (tmp_path / "out" / LANGUAGE).read_bytes()
    for source, dtype in ((other, None), (tiny, "float16")):
        with pytest.raises(ValueError, match="out holds another model or other files; give a new one"):
            export_gguf(source, tmp_path / "out", dtype=dtype)
    assert (tmp_path / "out" / LANGUAGE).read_bytes() == before
    for words in ([], ["--format", "gguf"]):  # stock beside it, and it beside stock
        assert main(["export", str(tiny), "--out", str(other), *words]) == 2


@pytest.mark.parametrize("name", [LANGUAGE, VISION, "Modelfile"])
def test_an_export_that_was_cut_half_way_is_seen(tmp_path: Path, tiny: Path, name: str) -> None:
    export_gguf(tiny, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{name} was cut or changed since the export; remove"):
        export_gguf(tiny, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} was cut or changed"):
        export_gguf(tiny, tmp_path / "out")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_that_is_cut_is_no_whole_file(tmp_path: Path, tiny: Path, share: float) -> None:
    export_gguf(tiny, tmp_path / "out")
    path = tmp_path / "out" / LANGUAGE
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="no whole GGUF file"):
        read_back(path)


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / LANGUAGE).write_bytes(b"GGUF")
    export_gguf(tiny, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_words_that_do_not_fit(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(tiny), "--out", str(tmp_path / "out"), "--dtype", "q8_0"]) == 2
    assert "--dtype q8_0 needs --format gguf" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(tiny), "--out", str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "pip install 'llava_kd[gguf]'" in capsys.readouterr().err
