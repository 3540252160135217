"""GGUF language models read back: the numbers, words and refusals of `llava-kd convert FILE.gguf`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_samples import llama_like, qwen_like
from test_models_gguf import LLAMA3_ROPE, TEXT
from tiny_towers import make_language_model, make_tower
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llava_kd.assembly.parts.models import student_parts
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import save_stock
from llava_kd.models.language_model import load_language_model

pytest.importorskip("gguf", reason="the gguf extra is not installed")
import gguf
import gguf_by_hand as by_hand

from llava_kd.models.files.gguf.exporting import LANGUAGE, export_gguf
from llava_kd.models.files.gguf.language import as_neighbours
from llava_kd.models.files.gguf.reading import _numbers, from_neighbours, gguf_file, read_language_model


def written(
    root: Path,
    kind: str,
    *,
    tokenizer: Callable[[], PreTrainedTokenizerFast] = qwen_like,
    dtype: str = "float32",
    **more: object,
) -> Path:
    """The language file of an exported student; what it was made of stands in root/text."""
    text = make_language_model(kind, root / "text", vocab_size=900, **more)
    tokenizer().save_pretrained(text)
    student = StudentConfig(vision_tower=make_tower("siglip", root / "tower"), language_model=str(text))
    save_stock(student_parts(student, template="chatml", seed=0), root / "model")
    export_gguf(root / "model", root / "gguf", dtype=dtype)
    return root / "gguf" / LANGUAGE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_was_exported_is_read_back(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    causal, tokenizer = read_language_model(path)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    before = AutoTokenizer.from_pretrained(tmp_path / "text")
    ids = before(TEXT)["input_ids"]
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids) == TEXT
    cut, cut_before = (
        t.backend_tokenizer.pre_tokenizer.pre_tokenize_str("2026 DON'T\r\n go") for t in (tokenizer, before)
    )
    assert cut == cut_before
    assert tokenizer("<|im_end|>x")["input_ids"][0] == before.convert_tokens_to_ids("<|im_end|>")
    ids_BT = torch.tensor([ids])
    expected_BTV = original(input_ids=ids_BT).logits
    torch.testing.assert_close(causal(input_ids=ids_BT).logits, expected_BTV, rtol=1e-5, atol=1e-5)
    assert causal.config.tie_word_embeddings == original.config.tie_word_embeddings


@torch.no_grad()
def test_few_bits_are_the_numbers_that_llama_cpp_computes_with(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", dtype="q8_0")
    causal, tokenizer = read_language_model(path)
    ids = tokenizer(TEXT)["input_ids"]
    found_TV = causal(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found_TV, by_hand.logits(path, ids), rtol=1e-3, atol=1e-3)


def test_a_block_of_four_bits_by_hand() -> None:
    """Q4_1: 32 numbers as scale * q + least, the low nibbles first."""
    row = torch.linspace(-3, 5, 64).reshape(2, 32).numpy()
    kind = gguf.GGMLQuantizationType.Q4_1
    data = gguf.quants.quantize(row, kind)
    scale, least = (data[:, 2 * k : 2 * k + 2].copy().view(np.float16).astype(np.float32) for k in (0, 1))
    nibbles = np.concatenate([data[:, 4:] & 15, data[:, 4:] >> 4], 1)
    tensor = SimpleNamespace(name="x", data=data, tensor_type=kind, shape=[32, 2])
    np.testing.assert_array_equal(_numbers(tensor, Path("f")).numpy(), scale * nibbles + least)


def test_neighbours_go_back_to_halves() -> None:
    weight_RD = torch.arange(48.0).reshape(16, 3)
    assert torch.equal(from_neighbours(as_neighbours(weight_RD, 2), 2), weight_RD)
    assert not torch.equal(as_neighbours(weight_RD, 2), weight_RD)


def test_the_command_writes_a_language_model_for_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "llama")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    assert main(["convert", str(alone), "--out", str(tmp_path / "out")]) == 0
    assert "for student.language_model" in capsys.readouterr().out
    causal, _ = load_language_model(str(tmp_path / "out"), dtype=torch.float32)
    assert causal.config.model_type == "llama"
    assert main(["convert", str(path), "--out", str(tmp_path / "no"), "--template", "chatml"]) == 2
    assert "only a language model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("phi3", {}, r"architecture 'phi3'.* GGUF files of llama, qwen2"),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, "scales its positions"),
        ("llama", {"tokenizer": llama_like}, "tokenizer of kind 'llama'"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, kind: str, more: dict, message: str) -> None:
    path = written(tmp_path, kind, **more)
    with pytest.raises(ValueError, match=message):
        read_language_model(path)


def test_a_cut_file_and_a_folder_of_two(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="no whole GGUF file"):
        read_language_model(tmp_path / "a.gguf")
    assert gguf_file(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        gguf_file(tmp_path)
