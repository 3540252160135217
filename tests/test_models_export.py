"""Exports that are killed, cards that name no folder, and what transformers 4 wants beside the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from data_samples import llama_like
from safetensors import safe_open
from tiny_llava import make_tiny_llava
from tiny_towers import make_language_model, make_tower

from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.models.files.card import public, reading_notes
from llava_kd.models.files.checkpoint import load_stock, save_stock
from llava_kd.models.files.export import export
from llava_kd.models.files.older_tools import rope_of_transformers_4, tokenizer_of_transformers_4

KILLED = """
import os, sys
from llava_kd.models.files import export as it
def killed(*words): os._exit(9)
setattr(it, sys.argv[3], killed)
it.export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["make_portable", "_check_logits", "model_card"])
def test_an_export_that_is_killed_leaves_nothing_and_the_same_command_makes_it(
    tmp_path: Path, student_dir: Path, moment: str
) -> None:
    out = tmp_path / "out"
    words = [KILLED, str(student_dir), str(out), moment]
    killed = ranks.Ranks(words, tmp_path / "logs", function=ranks.execute).wait()
    assert killed.codes == (9,), killed.log
    shutil.rmtree(tmp_path / "logs")
    assert not out.exists()
    export(student_dir, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "already: nothing to do" in export(student_dir, out)[0]


def test_no_file_of_a_model_names_a_folder_of_the_machine(tmp_path: Path, stage: Callable[..., Path]) -> None:
    """The provenance stays, by name: in the run's card, the export's, and that of an export of it."""
    home = tmp_path / "home of somebody" / "deep"
    home.mkdir(parents=True)
    tower, text = make_tower("siglip", home / "tower"), make_language_model("qwen2", home / "text")
    config = load(stage("run", distilled=False, max_steps=1), [f"--output_dir={home / 'first'}"])
    first = replace(config, student=StudentConfig(vision_tower=tower, language_model=str(text)))
    assert train(first) is None
    second = replace(config, output_dir=str(home / "second"))
    second = replace(second, student=StudentConfig(checkpoint=str(home / "first" / "model")))
    assert train(second) is None
    export(home / "second" / "model", home / "export", dtype=torch.bfloat16)
    export(home / "export", home / "again", dtype=torch.float16)
    for folder in ("first/model", "second/model", "export", "again"):
        for path in (home / folder).iterdir():
            content = path.read_bytes()
            for name in (b"somebody", b"deep", str(tmp_path).encode(), tmp_path.name.encode()):
                assert name not in content, (path, name)
        assert "| started from |" in (home / folder / "README.md").read_text()
    assert "tower and text" in (home / "first" / "model" / "README.md").read_text()
    for folder in ("second/model", "export", "again"):
        card = (home / folder / "README.md").read_text()
        assert "| started from | first |" in card
        assert "Stages before it: first." in card
        settings = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
        assert settings["student"]["checkpoint"] == "first"


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("/home/me/models/siglip", "siglip"),
        ("/home/my self/models/siglip", "siglip"),
        ("~/models/siglip", "siglip"),
        ("../secret/siglip", "siglip"),
        ("runs/mine/stage1/model", "model"),
        ("C:\\Users\\me\\siglip", "siglip"),
        ("timm:/home/me/vit?depth=2", "timm:vit?depth=2"),
        ("open_clip:ViT-B-32?pretrained=/home/me/w.bin", "open_clip:ViT-B-32?pretrained=w.bin"),
        ("/data/shards/{000..999}.tar", "{000..999}.tar"),
        ("google/siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("chatml", "chatml"),
    ],
)
def test_a_setting_is_shown_by_name(setting: str, shown: str) -> None:
    assert public(setting) == shown
    assert public(f"a: 1\nb: {setting}").endswith(shown) or " " in setting or "\\" in setting


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    tied = load_stock(str(make_tiny_llava(tmp_path / "tied", tied=True, layers=1)))
    for dtype in (None, torch.bfloat16):
        save_stock(tied, tmp_path / f"out{dtype}", dtype=dtype)
        export(tmp_path / "tied", tmp_path / f"export{dtype}", dtype=dtype)
        for folder in (f"out{dtype}", f"export{dtype}"):
            with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as stream:
                assert [name for name in stream.keys() if "lm_head" in name] == []  # noqa: SIM118
            again = load_stock(str(tmp_path / folder)).stock
            assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("words", [[], ["--student.lora={rank: 2}"]], ids=["whole", "adapters"])
def test_what_a_run_and_an_export_write_is_each_weight_once(
    tmp_path: Path, stage: Callable[..., Path], words: list[str]
) -> None:
    """At a head of most of the weights, as small language models have it: 1.6 times as much with two."""
    if words:
        pytest.importorskip("peft", reason="the lora extra is not installed")
    student = make_tiny_llava(tmp_path / "student", hidden=32, vocab_size=6000, tied=True)
    config = stage("run", distilled=False, max_steps=1)
    assert main(["train", str(config), f"--student.checkpoint={student}", *words]) == 0
    export(tmp_path / "run" / "model", tmp_path / "export")
    stock = load_stock(str(student)).stock
    once = sum(parameter.nbytes for parameter in stock.parameters())  # each one once
    assert stock.lm_head.weight.nbytes > 0.6 * once
    for directory in (tmp_path / "run" / "model", tmp_path / "export"):
        written = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        assert 0.85 * once < written < 1.05 * once, directory  # an export leaves a SigLIP tower's pooler out


def test_a_card_says_where_two_first_tokens_would_come_from(tmp_path: Path) -> None:
    text = make_language_model("llama", tmp_path / "text", vocab_size=700)
    llama_like().save_pretrained(text)
    student = StudentConfig(vision_tower=make_tower("siglip", tmp_path / "tower"), language_model=str(text))
    parts = student_parts(student, template="vicuna", seed=0)
    save_stock(parts, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    assert "add_special_tokens=False" in (tmp_path / "out" / "README.md").read_text()
    rendered = parts.processor.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
    bos = parts.processor.tokenizer.bos_token_id
    assert parts.processor.tokenizer(rendered)["input_ids"][:2] == [bos, bos]  # what the card warns of
    assert parts.processor.tokenizer(rendered, add_special_tokens=False)["input_ids"].count(bos) == 1
    parts.processor.chat_template = "{{ messages[0]['content'] }}"
    assert reading_notes(parts.processor) == []


def test_positions_stand_where_transformers_4_has_them() -> None:
    assert rope_of_transformers_4(None) == {}
    plain = {"rope_theta": 1e6, "rope_type": "default"}
    assert rope_of_transformers_4(plain) == {"rope_theta": 1e6}
    assert rope_of_transformers_4({**plain, "partial_rotary_factor": 0.4})["partial_rotary_factor"] == 0.4
    linear = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    assert rope_of_transformers_4(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    nested = {"full_attention": plain, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    assert rope_of_transformers_4(nested) == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}


def test_an_exports_tokenizer_is_of_a_class_that_both_know(tmp_path: Path, student_dir: Path) -> None:
    export(student_dir, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    assert isinstance(saved["additional_special_tokens"], list)
    assert isinstance(saved["extra_special_tokens"], dict)
    assert not {"backend", "is_local"} & set(saved)
    listed = tokenizer_of_transformers_4({"extra_special_tokens": ["<a>"], "backend": "tokenizers"})
    assert (listed["additional_special_tokens"], listed["extra_special_tokens"]) == (["<a>"], {})
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "SiglipImageProcessor"
    assert load_stock(str(tmp_path / "out")).processor.tokenizer.get_vocab() == (
        load_stock(str(student_dir)).processor.tokenizer.get_vocab()
    )
