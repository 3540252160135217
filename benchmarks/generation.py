"""Answers per second: batched generation beside the one-question-at-a-time loop that users write today.

Both read the same files with the same processor and decode greedily; `same` is the share of equal answers.
The loop is the usual script: open the image, call the processor, call `model.generate`, decode, next.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import Row, meta, parser, print_table, write_json
from PIL import Image

from llava_kd.evaluation.answers import read_all
from llava_kd.evaluation.generation.generate import Generator, generate
from llava_kd.evaluation.generation.prompt import render_prompt
from llava_kd.evaluation.generation.questions import Question, read_llava_json


def one_at_a_time(generator: Generator, questions: Sequence[Question]) -> dict[str, str]:
    """The loop of the LLaVA scripts, with the stock classes alone."""
    model, processor = generator.model, generator.processor
    answers = {}
    for question in questions:
        path = question.images[0]
        assert isinstance(path, Path)
        prompt = render_prompt(processor, question.text)
        with Image.open(path) as image:
            inputs = processor(text=prompt, images=image.convert("RGB"), return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            ids_BT = model.generate(
                **inputs, do_sample=False, use_cache=True, max_new_tokens=generator.max_new_tokens
            )
        new_BN = ids_BT[:, inputs["input_ids"].shape[1] :]
        answers[question.id] = generator.decode(new_BN)[0]
    return answers


def batched(generator: Generator, questions: Sequence[Question], batch_size: int) -> dict[str, str]:
    """What `llava-kd eval` runs, the writing of answers.jsonl included."""
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder)
        generate(generator, questions, out_dir=out_dir, batch_size=batch_size, progress=False)
        return {name: answer["answer"] for name, answer in read_all(out_dir).items()}


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--model", required=True, help="stock LLaVA directory")
    flags.add_argument("--data", required=True, help="LLaVA JSON test file")
    flags.add_argument("--questions", type=int, default=256)
    flags.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    flags.add_argument("--max_new_tokens", type=int, default=16)
    flags.add_argument("--repeats", type=int, default=3)
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    questions = read_llava_json(arguments.data)[: arguments.questions]
    generator = Generator.load(
        arguments.model, device=torch.device(arguments.device), max_new_tokens=arguments.max_new_tokens
    )
    calls: dict[str, Callable[[], dict[str, str]]] = {
        "one at a time": lambda: one_at_a_time(generator, questions)
    }
    for size in arguments.batch_sizes:
        calls[f"batches of {size}"] = lambda size=size: batched(generator, questions, size)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers = {}
    for call in calls.values():  # warm-up
        call()
    for _ in range(arguments.repeats):  # in turn, so that a slow moment of the machine meets all
        for name, call in calls.items():
            start = time.perf_counter()
            answers[name] = call()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    loop = answers["one at a time"]
    rows: list[Row] = [
        {
            "generation": name,
            "questions_per_s": len(questions) / best[name],
            "times_the_loop": best["one at a time"] / best[name],
            "same": sum(answers[name][k] == loop[k] for k in loop) / len(loop),
        }
        for name in calls
    ]
    print_table(rows, list(rows[0]))
    if arguments.json:
        write_json(
            arguments.json,
            meta=meta(device=arguments.device, questions=len(questions), model=Path(arguments.model).name),
            rows=rows,
        )


if __name__ == "__main__":
    main()
