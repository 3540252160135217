"""GGUF files against what they were made of: weights, graphs computed by hand, tokenizers, chat templates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from data_samples import llama_like, qwen_like
from tiny_llava import make_tiny_llava, tiny_tokenizer
from tiny_towers import make_language_model, make_tower
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_kd.assembly.parts.models import student_parts
from llava_kd.cli import main
from llava_kd.config import StudentConfig
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.models.files.checkpoint import Parts, load_stock, save_stock
from llava_kd.models.files.served import served_processor
from llava_kd.models.projectors.from_teacher import with_teacher_projector

pytest.importorskip("gguf", reason="the gguf extra is not installed")
import gguf_by_hand as by_hand

from llava_kd.models.files.gguf.exporting import LANGUAGE, VISION, export_gguf
from llava_kd.models.files.gguf.language import as_neighbours
from llava_kd.models.files.gguf.ollama import modelfile
from llava_kd.models.files.gguf.pictures import template_with_marks
from llava_kd.models.files.gguf.tokens import KNOWN_RULES, name_for_vocabulary, read_vocabulary, rule_hash
from llava_kd.models.files.gguf.writing import KINDS

TEXT = "The blue circle is left of the 12 triangles, isn't it?\n\nYes  no"
LLAMA3_ROPE = {
    **{"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
# By name: kind of language model, tower and strategy, tokenizer, template, and settings.
STUDENTS: dict[str, tuple[str, str, str, Callable[[], PreTrainedTokenizerFast], str, dict]] = {
    "qwen2": ("qwen2", "siglip", "full", qwen_like, "chatml", {}),
    "llama": ("llama", "clip", "default", llama_like, "vicuna", {}),
    "llama3": ("llama", "siglip", "full", qwen_like, "chatml", {"rope_parameters": LLAMA3_ROPE}),
    "gemma": ("gemma", "siglip", "full", llama_like, "vicuna", {}),
}


def make_student(root: Path, name: str) -> Path:
    """A random student whose pictures matter as much as its words."""
    kind, tower, strategy, tokenizer, template, more = STUDENTS[name]
    text = make_language_model(kind, root / "text", vocab_size=900, **more)
    tokenizer().save_pretrained(text)
    student = StudentConfig(
        vision_tower=make_tower(tower, root / "tower"),
        language_model=str(text),
        vision_feature_select_strategy=strategy,
    )
    parts = student_parts(student, template=template, seed=0)
    with torch.no_grad():
        for k, parameter in enumerate(parts.stock.model.multi_modal_projector.parameters()):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(k))
    save_stock(parts, root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    return {name: make_student(root / name, name) for name in STUDENTS}


def stock_features(parts: Parts, pixels_ICPP: Tensor) -> Tensor:
    found = parts.stock.eval().model.get_image_features(pixel_values=pixels_ICPP)
    return torch.stack(list(found.pooler_output))


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_the_vision_file_gives_the_features_of_training(
    tmp_path: Path, students: dict[str, Path], name: str
) -> None:
    export_gguf(students[name], tmp_path / "out", dtype="float32")
    parts = load_stock(str(students[name]))
    pixels_ICPP = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = by_hand.picture_tokens(tmp_path / "out" / VISION, pixels_ICPP)
    if name == "gemma":  # llama.cpp multiplies what it gets by the root of the width there
        found = found * parts.stock.config.get_text_config().hidden_size ** 0.5
    torch.testing.assert_close(found, stock_features(parts, pixels_ICPP), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "llama", "llama3"])
def test_the_language_file_gives_the_logits_of_training(
    tmp_path: Path, students: dict[str, Path], name: str
) -> None:
    """With an untied head, and Llama's queries and keys in llama.cpp's order."""
    export_gguf(students[name], tmp_path / "out", dtype="float32")
    parts = load_stock(str(students[name]))
    ids = parts.processor.tokenizer(TEXT)["input_ids"]
    expected_TV = parts.stock.eval()(input_ids=torch.tensor([ids])).logits[0]
    found_TV = by_hand.logits(tmp_path / "out" / LANGUAGE, ids)
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-3, atol=1e-3)
    assert ("output.weight" in by_hand.types(tmp_path / "out" / LANGUAGE)) == (name != "qwen2")


def test_products_of_turned_queries_and_keys_are_kept() -> None:
    """Neighbours turned, as llama.cpp turns them, against halves turned by transformers."""
    generator = torch.Generator().manual_seed(0)
    weights_RD = [torch.randn(4 * 8, 16, generator=generator) for _ in range(2)]
    x_TD = torch.randn(5, 16, generator=generator)
    angles_TK = torch.arange(5)[:, None] / 10 ** torch.linspace(0, 2, 4)
    cos_TK, sin_TK = (f(torch.cat([angles_TK, angles_TK], -1)) for f in (torch.cos, torch.sin))
    halves_HTK = [(x_TD @ w.T).unflatten(-1, (4, 8)).transpose(0, 1) for w in weights_RD]
    q, k = apply_rotary_pos_emb(*halves_HTK, cos_TK, sin_TK, unsqueeze_dim=0)
    beside_HTK = []
    for weight_RD in weights_RD:
        pairs = (x_TD @ as_neighbours(weight_RD, 4).T).unflatten(-1, (4, 4, 2)).transpose(0, 1)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(5, 4), angles_TK)
        beside_HTK.append(torch.view_as_real(turned).flatten(-2))
    torch.testing.assert_close(beside_HTK[0] @ beside_HTK[1].mT, q @ k.mT)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [
        ("float32", 0),
        ("bfloat16", 2**-8),
        ("float16", 2**-11),
        ("q8_0", 1 / 254 + 2**-11),
        ("q4_0", 1 / 8 + 2**-11),  # 16 steps from -8 to 7: one of the two signs ends a step early
    ],
)
def test_every_weight_is_there_once_and_as_close_as_its_type_allows(
    tmp_path: Path, students: dict[str, Path], dtype: str, share: float
) -> None:
    """`share`: the largest error, of the largest number of a row's block of 32, whose scale is a float16."""
    export_gguf(students["qwen2"], tmp_path / "out", dtype=dtype)
    state = load_stock(str(students["qwen2"])).stock.model.language_model.state_dict()
    found, types = (f(tmp_path / "out" / LANGUAGE) for f in (by_hand.tensors, by_hand.types))
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in state.values())
    pairs = {
        "token_embd": "embed_tokens",
        "blk.1.attn_k": "layers.1.self_attn.k_proj",
        "blk.0.ffn_up": "layers.0.mlp.up_proj",
    }
    for theirs, ours in pairs.items():
        written, weight = found[f"{theirs}.weight"], state[f"{ours}.weight"]
        blocks = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
        assert ((written - weight).abs() <= share * 1.01 * blocks + 1e-7).all()
        eight = (theirs, dtype) == ("token_embd", "q4_0")
        assert types[f"{theirs}.weight"] == ("Q8_0" if eight else KINDS[dtype])
    torch.testing.assert_close(found["blk.1.attn_norm.weight"], state["layers.1.input_layernorm.weight"])
    assert types["blk.1.attn_norm.weight"] == "F32"


def test_four_bits_are_the_language_models_layers_alone(tmp_path: Path, students: dict[str, Path]) -> None:
    """The tower and its projector are in the eight bits of q8_0, number by number."""
    for dtype in ("q4_0", "q8_0"):
        export_gguf(students["llama"], tmp_path / dtype, dtype=dtype)
    assert set(by_hand.types(tmp_path / "q4_0" / LANGUAGE).values()) == {"Q4_0", "Q8_0", "F16", "F32"}
    assert by_hand.settings(tmp_path / "q4_0" / LANGUAGE)["general.file_type"] == 2  # MOSTLY_Q4_0
    assert (tmp_path / "q4_0" / VISION).read_bytes() == (tmp_path / "q8_0" / VISION).read_bytes()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_rows_that_are_no_blocks_are_left_and_it_says_so(
    tmp_path: Path, students: dict[str, Path], dtype: str
) -> None:
    notes = export_gguf(students["qwen2"], tmp_path / "out", dtype=dtype)  # its MLP is 48 wide
    types = by_hand.types(tmp_path / "out" / LANGUAGE)
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert any("stay in float16" in note and f"[48] wide, and {dtype} cuts" in note for note in notes)
    assert "stay in float16" in (tmp_path / "out" / "README.md").read_text()


def test_a_dtype_is_kept(tmp_path: Path, students: dict[str, Path]) -> None:
    save_stock(load_stock(str(students["qwen2"])), tmp_path / "model", dtype=torch.bfloat16)
    export_gguf(tmp_path / "model", tmp_path / "out")
    assert by_hand.types(tmp_path / "out" / LANGUAGE)["token_embd.weight"] == "BF16"


def test_names_of_an_export_and_of_a_run_give_one_file(tmp_path: Path, students: dict[str, Path]) -> None:
    assert main(["export", str(students["llama"]), "--out", str(tmp_path / "hf")]) == 0
    for source, out in ((students["llama"], "a"), (tmp_path / "hf", "b")):
        export_gguf(source, tmp_path / out)
    for name in (LANGUAGE, VISION):
        first, second = (by_hand.tensors(tmp_path / out / name) for out in "ab")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@torch.no_grad()
def test_the_teachers_projector_is_folded_even_where_it_is_wider(tmp_path: Path) -> None:
    """Stock LLaVA has no room for it; llama.cpp's two layers have."""
    sizes = {"student": 32, "teacher": 64}
    paths = [make_tiny_llava(tmp_path / name, hidden=size, layers=1) for name, size in sizes.items()]
    student, teacher = (load_stock(str(path)) for path in paths)
    parts = with_teacher_projector(student, teacher, seed=0)
    parts.stock.model.multi_modal_projector.width_map.bias.normal_(generator=torch.Generator().manual_seed(2))
    save_stock(parts, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out", dtype="float32")
    pixels_ICPP = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = by_hand.picture_tokens(tmp_path / "out" / VISION, pixels_ICPP)
    torch.testing.assert_close(found, stock_features(parts, pixels_ICPP), rtol=1e-4, atol=1e-4)


def test_merged_adapters_are_in_the_files(tmp_path: Path, stage: Callable[..., Path]) -> None:
    pytest.importorskip("peft", reason="the lora extra is not installed")
    config = stage("run", distilled=False, max_steps=2)
    assert main(["train", str(config), "--student.lora={rank: 2}", "--trainable=[language_model]"]) == 0
    export_gguf(tmp_path / "run" / "model", tmp_path / "out", dtype="float32")
    name = "layers.0.self_attn.v_proj.weight"
    merged = load_stock(str(tmp_path / "run" / "model")).stock.model.language_model.state_dict()[name]
    assert torch.equal(by_hand.tensors(tmp_path / "out" / LANGUAGE)["blk.0.attn_v.weight"], merged)


def test_scores_join_pieces_as_merges_did(tmp_path: Path, students: dict[str, Path]) -> None:
    export_gguf(students["gemma"], tmp_path / "out")
    tokenizer = llama_like()
    for text in (TEXT, "triangles are there, é☃ and USER: 12"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert by_hand.sentencepiece(tmp_path / "out" / LANGUAGE, text) == expected
    said = by_hand.settings(tmp_path / "out" / LANGUAGE)
    assert said["tokenizer.ggml.add_bos_token"] is True
    kinds = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[piece] for piece in ("<unk>", "<s>", "<0x0A>", "[PAD899]")] == [2, 3, 6, 5]


@pytest.mark.parametrize(("make", "rule"), [(qwen_like, "qwen2"), (tiny_tokenizer, "gpt-2")])
def test_the_rule_is_found_by_its_hash(make: Callable[[], PreTrainedTokenizerFast], rule: str) -> None:
    assert read_vocabulary(make(), 900, "it").rule == rule


def test_rules_that_differ_in_a_digit_or_in_whole_words_are_others() -> None:
    tree = json.loads(qwen_like().backend_tokenizer.to_str())["pre_tokenizer"]
    text = json.dumps(tree).replace("p{N}|", "p{N}{1,3}|")
    names = [
        KNOWN_RULES.get(rule_hash(json.loads(text), ignores_merges=ignores)) for ignores in (True, False)
    ]
    assert names == ["llama-bpe", "dbrx"]
    assert rule_hash(json.loads(text.replace("{1,3}", "{1,2}")), ignores_merges=False) not in KNOWN_RULES
    assert len(KNOWN_RULES) >= 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_become_pictures_where_training_has_them(teacher_dir: Path, name: str) -> None:
    """A client's picture after its question too: it stands first, and on a line of its own."""
    processor = load_stock(str(teacher_dir)).processor
    template = TEMPLATES[name].chat_template_for(processor.tokenizer)
    processor.chat_template = template
    wrapped = template_with_marks(processor)
    assert wrapped is not None
    talk = [{"role": "user", "content": "What is it?<__media_x__>"}]
    stock = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}]
    found = processor.apply_chat_template(talk, chat_template=wrapped, tokenize=False)
    expected = processor.apply_chat_template(stock, chat_template=template, tokenize=False)
    assert found == expected.replace("<image>", "<__media_x__>") != expected


def test_a_template_that_cannot_take_marks_is_written_as_it_is(
    tmp_path: Path, students: dict[str, Path]
) -> None:
    """One that counts the messages that it gets as they are: it must not be bent."""
    shutil.copytree(students["qwen2"], tmp_path / "model")
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if messages[0]['content'] is string %}!{% endif %}")
    notes = export_gguf(tmp_path / "model", tmp_path / "out")
    said = by_hand.settings(tmp_path / "out" / LANGUAGE)
    assert said["tokenizer.chat_template"] == path.read_text()
    assert any("pictures stand where the client puts them" in note for note in notes)


def test_ollama_gets_the_conversation(teacher_dir: Path) -> None:
    processor = served_processor(load_stock(str(teacher_dir)).processor)
    text = modelfile(processor, LANGUAGE, VISION)
    turn = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    system = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    assert f'TEMPLATE """{system}{turn}"""' in text
    assert text.startswith(f"FROM ./{LANGUAGE}\nFROM ./{VISION}\n")
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_name_says_phi_3_where_special_tokens_swallow_spaces_and_nowhere_else() -> None:
    tokenizer = llama_like()
    assert name_for_vocabulary("my-Phi3-student", tokenizer) == "my-phi 3-student"
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    ends = {"id": 700, "content": "<|endoftext|>", "special": True, "normalized": False}
    ends |= {"single_word": False, "lstrip": False, "rstrip": False}
    tree["added_tokens"] += [ends, {**ends, "id": 701, "content": "<|end|>", "rstrip": True}]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(tree))
    swallowing = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert name_for_vocabulary("student", swallowing) == "student (phi-3 tokens)"
    assert name_for_vocabulary("Phi-3-student", swallowing) == "Phi-3-student"


KILLED = """
import os, sys
from llava_kd.models.files.gguf import exporting as it
def killed(*words, **more): os._exit(9)
name = sys.argv[3]
setattr(it if hasattr(it, name) else os, name, killed)
it.export_gguf(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["vision_entries", "modelfile", "_card", "_digest", "fsync"])
def test_an_export_that_is_killed_leaves_nothing_and_the_same_command_makes_it(
    tmp_path: Path, students: dict[str, Path], moment: str
) -> None:
    out, source = tmp_path / "out", students["qwen2"]
    words = [KILLED, str(source), str(out), moment]
    killed = ranks.Ranks(words, tmp_path / "logs", function=ranks.execute).wait()
    assert killed.codes == (9,), killed.log
    shutil.rmtree(tmp_path / "logs")
    assert not out.exists()
    assert main(["export", str(source), "--out", str(out), "--format", "gguf"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "already: nothing to do" in export_gguf(source, out)[0]


# The peak is the kernel's, of this program alone: that of getrusage begins with the one that started it.
MEASURED = """
import sys, time
from pathlib import Path
from llava_kd.models.files.gguf.exporting import export_gguf
start = time.monotonic(), time.process_time()
export_gguf(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(time.monotonic() - start[0], time.process_time() - start[1], int(peak) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0", "q4_0"])
def test_half_a_billion_weights_in_a_minute_and_two_gigabytes(tmp_path: Path, dtype: str) -> None:
    """A random student of the sizes of Qwen2.5-0.5B, in a program of its own; a minute of one processor."""
    more = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    text = make_language_model(
        "qwen2", tmp_path / "text", num_attention_heads=14, num_key_value_heads=2, **more
    )
    student = StudentConfig(vision_tower=make_tower("siglip", tmp_path / "tower"), language_model=str(text))
    save_stock(student_parts(student, template="chatml", seed=0), tmp_path / "model", dtype=torch.bfloat16)
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "model"), str(tmp_path / "out"), dtype]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    passed, computed, gigabytes = (float(word) for word in done.stdout.split()[-3:])
    print(f"{dtype}: {passed:.1f} s, {computed:.1f} s of a processor, {gigabytes:.2f} GiB")
    assert computed < 60
    assert gigabytes < 2
