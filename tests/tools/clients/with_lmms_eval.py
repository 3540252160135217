"""lmms-eval's `llava_hf` over a task of local files, by its own command."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from protocol import NEW_TOKENS, Answers, Question, last_error, work

TASK = """task: students
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.opened
doc_to_messages: !function utils.messages
doc_to_text: id
doc_to_target: id
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
process_results: !function utils.scored
metric_list: [{{metric: is_answered, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """import json

from PIL import Image


def messages(doc):
    return [
        {"role": message["role"], "content": [part(one) for one in message["content"]]}
        for message in json.loads(doc["messages"])
    ]


def part(one):
    return one if one["type"] == "text" else {"type": "image", "url": Image.open(one["path"]).convert("RGB")}


def opened(doc):
    return [one["url"] for message in messages(doc) for one in message["content"] if one["type"] == "image"]


def scored(doc, results):
    return {"is_answered": float(bool(results[0]))}
"""


@contextlib.contextmanager
def opened(directory: str) -> Iterator[Answers]:
    def answers(questions: Sequence[Question], batch: int) -> list[str]:
        if batch != 1:
            raise ValueError("llava_hf asks one question at a time")
        with tempfile.TemporaryDirectory() as folder:
            return _run(directory, questions, Path(folder))

    yield answers


def _run(directory: str, questions: Sequence[Question], root: Path) -> list[str]:
    docs = [{"id": str(k), "messages": json.dumps(question)} for k, question in enumerate(questions)]
    DatasetDict({"test": Dataset.from_list(docs)}).save_to_disk(root / "data")
    (root / "task").mkdir()
    (root / "task" / "students.yaml").write_text(TASK.format(data=root / "data", tokens=NEW_TOKENS))
    (root / "task" / "utils.py").write_text(UTILS)
    words = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1", "--log_samples"]
    words += ["--model_args", f"pretrained={directory},device=cpu,dtype=float32,device_map=cpu"]
    words += ["--tasks", "students", "--include_path", str(root / "task"), "--output_path", str(root / "out")]
    made = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    found = list((root / "out").rglob("*samples*.jsonl"))
    if made.returncode or len(found) != 1:
        raise RuntimeError(f"lmms_eval ended with {made.returncode}: {last_error(made.stderr)}")
    lines = [json.loads(line) for line in found[0].read_text().splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    return [line["filtered_resps"] for line in lines]  # `resps` is left out where it is the same


if __name__ == "__main__":
    work(opened, "lmms-eval", "transformers", "torch")
