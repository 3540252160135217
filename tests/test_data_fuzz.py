"""Records of every wrong shape: each is used, or named as bad; none ends anything."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

from data_samples import entry, llama_like, loader_of, qwen_like, side, write_dataset

from llava_kd.data.batches.bad_records import BadRecord
from llava_kd.data.sound import write_sound_entries
from llava_kd.data.sources.conversation import read_record
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.data.verify import verify_file

COUNT = 1500
NESTED: list = []
for _ in range(200):
    NESTED = [NESTED]
ODD = (
    *(None, True, 0, -1, 10**400, 1.5, float("nan"), float("inf"), "", " ", [], {}, [[]], [None], NESTED),
    *(
        "\ud83d",
        "\udcff",
        "\x00",
        "\u2028",
        "\ufeff",
        "caf\u00e9 \U0001f600",
        "\U00100001\U000f0000",
        "x" * 3000,
    ),
    *("<image>", "<image><image>", "</s>", "<|im_end|>\n<|im_start|>user"),
    *("/etc/passwd", "..", "a\\b.jpg", "C:\\a.jpg", "http://a/b.jpg", "data:image/png;base64,AA", "a" * 400),
    *("system", "human", "gpt", "user", "tool", {"from": "gpt"}, {"role": "user", "content": []}),
    *(
        [{"type": "image"}],
        [{"type": "text", "text": None}],
        [{"type": "image_url", "image_url": {"url": 3}}],
    ),
)
KEYS = (
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "from",
    "role",
    "value",
    "content",
    "type",
    "\ud83d",
)


def places(tree: object) -> list[tuple[object, object]]:
    """Every (container, key) below a value."""
    found = []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found += [(tree, key), *places(tree[key])]  # pyright: ignore[reportIndexIssue]
    return found


def mutated(rng: random.Random) -> object:
    raw = entry(rng.randrange(9), images=rng.randrange(3), rounds=rng.randrange(1, 3))
    if rng.random() < 0.3:
        talk = raw.pop("conversations")
        raw["messages"] = [{"role": turn["from"], "content": turn["value"]} for turn in talk]
    if rng.random() < 0.02:
        return rng.choice(ODD)
    for _ in range(rng.randrange(1, 4)):
        container, key = rng.choice(places(raw) or [(raw, "id")])
        odd = copy.copy(rng.choice(ODD))
        match rng.randrange(5), container:
            case 0, _:
                container[key] = odd  # pyright: ignore[reportIndexIssue]
            case 1, dict():
                container.pop(key, None)
            case 1, list():
                container.insert(rng.randrange(len(container) + 1), odd)
            case 2, dict():
                container[rng.choice(KEYS)] = odd
            case 3, list():
                container.append(copy.deepcopy(rng.choice(container)))
            case _ if isinstance(container[key], str):  # pyright: ignore[reportIndexIssue]
                text = container[key]  # pyright: ignore[reportIndexIssue]
                cut = rng.randrange(len(text) + 1)
                container[key] = text[:cut] + (odd if isinstance(odd, str) else "") + text[cut:]  # pyright: ignore
    return raw


def test_mutated_records_are_used_or_named() -> None:
    rng = random.Random(1)
    raws = [mutated(rng) for _ in range(COUNT)]
    records = [read_record(raw, i) for i, raw in enumerate(raws)]
    bad = sum(bool(record.fault) for record in records)
    assert COUNT / 5 < bad < COUNT * 0.95
    for tokenizer, template in ((qwen_like(), "chatml"), (llama_like(), "vicuna")):
        encoder = side(tokenizer=tokenizer, template=template, max_length=400).encoder()
        lengths = encoder.lengths(records)
        refused: list[str] = []
        for record, length in zip(records, lengths, strict=True):
            json.dumps(record.id).encode()
            record.id.encode()
            try:
                encoded = encoder(record)
            except ValueError as error:
                refused.append(str(error))
                continue
            assert not record.fault
            assert len(encoded.ids) == length
        "".join(refused).encode()
        assert all("record " in reason for reason in refused)


def test_a_file_of_mutated_records_is_verified_trained_on_and_copied(tmp_path: Path) -> None:
    rng = random.Random(2)
    write_dataset(tmp_path, [entry(k, images=k % 3) for k in range(9)])
    path = tmp_path / "odd.jsonl"
    lines = [json.dumps(mutated(rng)) for _ in range(200)] + [json.dumps(entry(2, images=1))]
    lines[7] = lines[7][:-5]
    lines[9] = '{"id": 1, "id": 2, "conversations": null, "conversations": []}'
    lines[11] = "[" * 50_000
    lines[13] = '{"id": ' + "1" * 6000 + "}"
    path.write_text("\n".join(lines))
    reading = side(max_length=400)
    report = verify_file(path, tmp_path, side=reading)
    report.summary().encode()
    report.save(tmp_path / "report.json")
    assert report.records + len(report.structural_errors) == len(lines)
    loader = loader_of(
        source=LlavaJson(path, tmp_path), student=reading, teacher=None, seed=0, global_batch_size=8,
        micro_batch_size=4, rank=0, world_size=1, device="cpu", max_bad_rate=1.0,
        bad_records_path=tmp_path / "bad.jsonl",
    )  # fmt: skip
    trained: set[str] = set()
    for group in loader.batches(0, loader.steps_per_epoch):
        trained |= {name for batch in group for name in batch.record_ids}
    named = [BadRecord(**json.loads(line)) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(trained) == len(lines)
    assert len({bad.id for bad in named}) == len(report.unsound)
    write_sound_entries(path, tmp_path / "kept.json", report.unsound)
    kept = verify_file(tmp_path / "kept.json", tmp_path, side=reading)
    assert kept.is_sound
    assert kept.records == len(lines) - len(report.unsound)
