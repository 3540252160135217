"""Seconds to score VQA answers, ten human answers each, on one core."""

from __future__ import annotations

import random
import time

from _common import Row, meta, parser, print_table, write_json

from llava_kd.evaluation.scorers.vqa_text import (
    normalise_m4c,
    normalise_vqa,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)

COMMON = (
    "yes",
    "no",
    "1",
    "2",
    "red",
    "a man",
    "two",
    "the tennis racket",
    "on the table",
    "don't know",
    "3:18",
)


def answers(count: int, *, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Predictions with ten humans; a third of the texts are rare ones, as in VQAv2."""
    draw = random.Random(seed)

    def text() -> str:
        if draw.random() < 0.67:
            return draw.choice(COMMON)
        return f"{draw.choice(COMMON)}, {draw.randrange(50_000)}/{draw.randrange(9)} people's"

    return [(text(), [text() for _ in range(10)]) for _ in range(count)]


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--count", type=int, default=200_000)
    arguments = flags.parse_args()
    given = answers(arguments.count)
    rows: list[Row] = []
    for name, rule in (("VQAv2", vqa_accuracy), ("TextVQA", textvqa_accuracy), ("VizWiz", vizwiz_accuracy)):
        normalise_vqa.cache_clear()
        normalise_m4c.cache_clear()
        start = time.process_time()
        total = sum(rule(prediction, humans) for prediction, humans in given)
        seconds = time.process_time() - start
        rows.append({"rule": name, "answers": len(given), "cpu_s": seconds, "mean": total / len(given)})
    print_table(rows, list(rows[0]))
    if arguments.json:
        write_json(arguments.json, meta=meta(device="cpu"), rows=rows)


if __name__ == "__main__":
    main()
