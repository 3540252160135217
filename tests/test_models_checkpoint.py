"""Stock directories in and out: equal logits, whole or absent; and students composed of parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_batches import inputs, record
from tiny_llava import IMAGE_TOKEN, make_tiny_llava, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.batch import Inputs
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import Parts, compose, load_stock, save_stock
from llava_kd.models.mllm import MLLM


def our_logits(parts: Parts, batch: Inputs) -> Tensor:
    model = MLLM(parts.stock)
    with torch.no_grad():
        prediction = model(batch, model.image_features(batch))
        return prediction.hidden_BTD @ prediction.head_VD.T


def stock_logits(directory: Path, batch: Inputs) -> Tensor:
    """What somebody without our code gets."""
    stock = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return stock(input_ids=batch.input_ids_BT, pixel_values=batch.pixels_ICHW).logits


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tower", "strategy"), [("siglip", "full"), ("clip", "default")])
def test_a_saved_student_reloads_as_stock_with_our_logits(
    tmp_path: Path, tied: bool, tower: str, strategy: str
) -> None:
    make = {"tower": tower, "strategy": strategy, "tied": tied, "layers": 1}
    parts = load_stock(str(make_tiny_llava(tmp_path / "start", **make)))  # type: ignore[arg-type]
    batch = inputs(record(1), record(2))
    model = MLLM(parts.stock, trainable=("multi_modal_projector", "language_model"))
    with torch.no_grad():  # what training would do
        for parameter in {*model.parameters()}:
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_stock(parts, tmp_path / "out")
    torch.testing.assert_close(
        stock_logits(tmp_path / "out", batch), our_logits(parts, batch), rtol=1e-5, atol=1e-5
    )
    names = {name for file in (tmp_path / "out").glob("*.safetensors") for name in keys(file)}
    assert any("lm_head" in name for name in names) == (not tied)
    assert not list((tmp_path / "out").glob("*.bin"))


def keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stream:
        return list(stream.keys())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gathered_weights_replace_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    """A sharded engine hands weights over by their name in the MLLM; the module itself is not written."""
    parts = load_stock(str(make_tiny_llava(tmp_path / "start", tied=tied, layers=1)))
    model = MLLM(parts.stock, trainable=("multi_modal_projector", "language_model"))
    trained = {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    if tied:  # an engine has the shared weight once
        del trained["lm_head.weight"]
    save_stock(parts, tmp_path / "out", trained=trained)
    written = load_stock(str(tmp_path / "out"))
    for name, value in MLLM(written.stock).state_dict().items():
        if name in trained:
            assert torch.equal(value, trained[name]), name
    head, embedding = written.stock.lm_head.weight, written.stock.get_input_embeddings().weight
    assert torch.equal(head, embedding) == tied


def test_an_unknown_gathered_weight_is_refused(tmp_path: Path, student_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"the model has no weight 'model\.projector\.weight'"):
        save_stock(load_stock(str(student_dir)), tmp_path / "o", trained={"projector.weight": torch.zeros(1)})


def test_weights_are_cast_on_the_way_out_and_the_config_says_so(tmp_path: Path, student_dir: Path) -> None:
    save_stock(load_stock(str(student_dir)), tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"]} == {"bfloat16"}
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}


def test_the_processor_survives_the_trip(tmp_path: Path, student_dir: Path) -> None:
    parts = load_stock(str(student_dir))
    parts.processor.chat_template = "{{ messages[0]['content'] }}!"
    save_stock(parts, tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(again, LlavaProcessor)
    assert again.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
    assert again.tokenizer.get_vocab() == parts.processor.tokenizer.get_vocab()
    assert again.image_processor.to_dict() == parts.processor.image_processor.to_dict()


@pytest.mark.parametrize("step", ["weights", "processor", "sync"])
def test_a_write_that_fails_leaves_the_old_directory_whole(
    tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    parts = load_stock(str(student_dir))
    out = tmp_path / "out"
    save_stock(parts, out)
    before = contents(out)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        parts.stock.lm_head.weight.add_(1)
    target = {
        "weights": (type(parts.stock), "save_pretrained"),
        "processor": (LlavaProcessor, "save_pretrained"),
    }
    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr("os.fsync", full_disk)
        else:
            patch.setattr(*target[step], full_disk)
        with pytest.raises(OSError, match=r"No space left"):
            save_stock(parts, out)
    assert contents(out) == before
    save_stock(parts, out)  # the half-written one is not in the way
    assert contents(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "nothing", "does not exist; give a model directory or a hub id"),
        (lambda d: (d / "empty").mkdir() or d / "empty", "has no config.json: it is not a model directory"),
        (lambda d: text_model(d / "text"), "is a 'qwen2' model; a LLaVA checkpoint must be 'llava'"),
    ],
    ids=["missing", "empty", "no LLaVA"],
)
def test_what_is_no_llava_directory_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load_stock(str(make(tmp_path)))


def test_a_directory_without_its_processor_or_weights_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    (directory / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read: .*model\.safetensors"):
        load_stock(str(directory))
    whole = (tmp_path / "kept").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read"):
        load_stock(str(directory))
    (directory / "model.safetensors").write_bytes(whole)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (directory / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"the processor of .* cannot be read"):
        load_stock(str(directory))


def test_a_checkpoint_that_lacks_a_weight_is_refused_and_not_filled_at_random(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    state = load_file(directory / "model.safetensors")
    del state["multi_modal_projector.linear_2.bias"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of a LlavaFor.*multi_modal_projector\.linear_2\.bias"
    ):
        load_stock(str(directory))


def test_a_checkpoint_whose_parts_do_not_fit_names_the_weight(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "m", layers=1)
    state = load_file(directory / "model.safetensors")
    (name,) = (name for name in state if "multi_modal_projector.linear_1.weight" in name)
    state[name] = torch.zeros(48, 7)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not fit together: .*linear_1\.weight is \(48, 7\) where .* needs \(48, 32\)"
    ):
        load_stock(str(directory))


def test_an_unknown_id_comes_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = str(tower_model(tmp_path / "tower", "siglip"))
    (tmp_path / "hub" / "models--my-lab--my-tower").mkdir(parents=True)
    monkeypatch.setattr("llava_kd.models.reading.HF_HUB_CACHE", str(tmp_path / "hub"))
    for line, llm, near in (
        (
            "google/siglip-so400m-patch14-385",
            "Qwen/Qwen2.5-0.5B",
            r"siglip-so400m-patch14-385 is no directory here"
            r".*did you mean google/siglip-so400m-patch14-384",
        ),
        ("my-lab/my-towel", "Qwen/Qwen2.5-0.5B", r"did you mean my-lab/my-tower"),
        (
            tower,
            "Qwen/Qwen2.5-0.6B",
            r"Qwen/Qwen2.5-0.6B is no directory here.*did you mean Qwen/Qwen2.5-0.5B",
        ),
    ):
        with pytest.raises(ValueError, match=near):
            compose(vision_tower=line, language_model=llm)
    with pytest.raises(ValueError, match=r"Qwen/Qwen2.5-0.5B is no directory here") as known:
        compose(vision_tower=tower, language_model="Qwen/Qwen2.5-0.5B")
    assert "did you mean" not in str(known.value)


# Composition ----


def plain_tokenizer(*, with_image: bool) -> PreTrainedTokenizerFast:
    if with_image:
        return tiny_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def text_model(directory: Path, *, rows: int = 300, tied: bool = False, with_image: bool = False) -> Path:
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    plain_tokenizer(with_image=with_image).save_pretrained(directory)
    return directory


def tower_model(directory: Path, kind: str) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    edge = {"height": 32, "width": 32}
    build: dict[str, Callable] = {
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**vision)),
        "siglip, both towers": lambda: SiglipModel(SiglipConfig(vision_config=vision, text_config=text)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**vision)),
        "clip, both towers": lambda: CLIPModel(CLIPConfig(vision_config=vision, text_config=text)),
    }
    build[kind]().save_pretrained(directory)
    if kind.startswith("siglip"):
        SiglipImageProcessor(size=edge).save_pretrained(directory)
    else:
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=edge).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("siglip", "full"),
        ("siglip, both towers", "full"),
        ("clip", "default"),
        ("clip, both towers", "default"),
    ],
)
def test_a_composed_student_has_the_weights_of_its_parts(
    tmp_path: Path, kind: str, strategy: str, tied: bool
) -> None:
    tower = tower_model(tmp_path / "tower", kind)
    text = text_model(tmp_path / "text", tied=tied)
    parts = compose(
        vision_tower=str(tower),
        language_model=str(text),
        vision_feature_select_strategy=strategy,  # type: ignore[arg-type]
    )
    assert parts.tokens_per_image == 16
    causal = Qwen2ForCausalLM.from_pretrained(text)
    ids = torch.randint(250, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(parts.stock(input_ids=ids).logits, causal(input_ids=ids).logits)
    vision_class = SiglipVisionModel if kind.startswith("siglip") else CLIPVisionModel
    for name, value in vision_class.from_pretrained(tower).state_dict().items():
        assert torch.equal(value, parts.stock.model.vision_tower.state_dict()[name]), name
    save_stock(parts, tmp_path / "out")
    batch = inputs(record(1))
    image_id = parts.stock.config.image_token_id
    batch.input_ids_BT[batch.visual_BT] = image_id
    assert parts.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == image_id
    torch.testing.assert_close(
        stock_logits(tmp_path / "out", batch), our_logits(parts, batch), rtol=1e-5, atol=1e-5
    )
    head, embedding = parts.stock.lm_head.weight, parts.stock.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert not any(parameter.is_meta for parameter in parts.stock.parameters())


@pytest.mark.parametrize(
    ("with_image", "rows", "expected_rows"),
    [(False, 300, 300), (False, 258, 258), (False, 257, 258), (True, 260, 260), (True, 300, 300)],
    ids=["padding row", "last padding row", "no row left", "has its own", "has its own and padding"],
)
def test_the_vocabulary_grows_only_where_it_must(
    tmp_path: Path, with_image: bool, rows: int, expected_rows: int
) -> None:
    text = text_model(tmp_path / "text", rows=rows, with_image=with_image)
    original = plain_tokenizer(with_image=with_image).get_vocab()
    tower = tower_model(tmp_path / "tower", "siglip")
    parts = compose(vision_tower=str(tower), language_model=str(text))
    tokenizer = parts.processor.tokenizer
    assert tokenizer.get_vocab() == original | {IMAGE_TOKEN: len(original) - int(with_image)}
    assert tokenizer(f"a{IMAGE_TOKEN}b")["input_ids"].count(parts.stock.config.image_token_id) == 1
    assert tokenizer.pad_token_id is not None
    assert parts.stock.get_input_embeddings().weight.shape[0] == expected_rows
    assert parts.stock.lm_head.weight.shape[0] == expected_rows
    assert parts.stock.config.text_config.vocab_size == expected_rows
    before = Qwen2ForCausalLM.from_pretrained(text).lm_head.weight
    assert torch.equal(parts.stock.lm_head.weight[:rows], before[:rows])


def test_the_projector_is_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    text, tower = text_model(tmp_path / "text"), tower_model(tmp_path / "tower", "siglip")

    def projector(seed: int) -> Tensor:
        torch.manual_seed(torch.seed())
        parts = compose(vision_tower=str(tower), language_model=str(text), seed=seed)
        return torch.cat([p.flatten() for p in parts.stock.model.multi_modal_projector.parameters()])

    assert torch.equal(projector(1), projector(1))
    assert not torch.equal(projector(1), projector(2))


def test_parts_that_are_missing_or_of_another_kind_are_named(tmp_path: Path) -> None:
    text, tower = text_model(tmp_path / "text"), tower_model(tmp_path / "tower", "siglip")
    with pytest.raises(ValueError, match=r"the vision tower .*/none does not exist"):
        compose(vision_tower=str(tmp_path / "none"), language_model=str(text))
    with pytest.raises(ValueError, match=r"the language model .*/none does not exist"):
        compose(vision_tower=str(tower), language_model=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"is a 'qwen2' model; stock LLaVA needs one of"):
        compose(vision_tower=str(text), language_model=str(text))
    with pytest.raises(ValueError, match=r"the language model .* is a"):
        compose(vision_tower=str(tower), language_model=str(tower))


def test_no_path_of_the_machine_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage) -> None:
    """Neither in a config nor in its parts, nor in the card of a run whose settings have relative paths."""
    text, tower = text_model(tmp_path / "text"), tower_model(tmp_path / "tower", "siglip")
    parts = compose(vision_tower=str(tower), language_model=str(text))
    parts.stock.config._name_or_path = str(text)
    parts.stock.config.vision_config._name_or_path = str(tower)
    assert str(tmp_path) in json.dumps(parts.stock.config.to_dict())
    save_stock(parts, tmp_path / "out", dtype=torch.bfloat16)
    save_stock(load_stock(str(tmp_path / "out")), tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    config = load(stage("run", distilled=False, max_steps=1), ["--output_dir=run"])
    student = StudentConfig(vision_tower="tower", language_model="text")
    assert train(replace(config, student=student)) is None
    assert "tower and text" in (tmp_path / "run" / "model" / "README.md").read_text()
    for folder in ("out", "again", "run/model"):
        for path in (tmp_path / folder).iterdir():
            if path.suffix in (".json", ".jinja"):
                assert str(tmp_path) not in path.read_text(), path
