"""How level a thousand ranks are in tokens: the data plan of one epoch, simulated; no model, no device.

A LLaVA-like mixture (729 places an image, lognormal text, cut at 2,048), which is assumed: the distribution
of the real 665k records was not at hand. `busiest` and `idlest` are a rank's tokens over the mean of all
ranks, less one: over the epoch, and at the median and the worst step.
"""

from __future__ import annotations

import time

import numpy as np
from _common import Row, meta, parser, print_table, write_json
from loader import NUM_RECORDS, llava_like

from llava_kd.data.batches.packing import Packing
from llava_kd.data.batches.plan import Plan


def simulated(num_ranks: int, max_tokens: int | None, rows_of_rank: int) -> Row:
    """One epoch's whole steps; `max_tokens` None is one record a row."""
    sizes = llava_like(NUM_RECORDS)
    packs = num_ranks * rows_of_rank
    packing = None if max_tokens is None else Packing(max_tokens=max_tokens, packs_per_step=packs)
    started = time.process_time()
    plan = Plan(
        num_records=NUM_RECORDS,
        seed=0,
        global_batch_size=packs,
        world_size=num_ranks,
        packing=packing,
        sizes=None if packing is None else sizes,
    )
    steps = plan.steps_per_epoch - 1
    planned = time.process_time() - started
    tokens_SR = np.zeros((steps, num_ranks))
    for step in range(steps):
        for rank in range(num_ranks):
            for row in plan.rows(step, rank):
                tokens_SR[step, rank] += sizes.tokens[list(row)].sum()
    of_epoch_R = tokens_SR.sum(0) / tokens_SR.sum(0).mean() - 1
    of_step_SR = tokens_SR / tokens_SR.mean(1, keepdims=True) - 1
    return {
        "rows": "one record" if max_tokens is None else f"packs of {max_tokens}",
        "rows of a rank": rows_of_rank,
        "steps": steps,
        "busiest, epoch": float(of_epoch_R.max()),
        "idlest, epoch": float(of_epoch_R.min()),
        "busiest, median step": float(np.median(of_step_SR.max(1))),
        "busiest, worst step": float(of_step_SR.max()),
        "idlest, median step": float(np.median(of_step_SR.min(1))),
        "planning, CPU s": planned,
    }


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--ranks", type=int, default=1024)
    flags = arguments.parse_args()
    cases = [(None, 1), (None, 8), (4096, 1), (4096, 4), (8192, 1), (8192, 4)]
    rows = [simulated(flags.ranks, max_tokens, number) for max_tokens, number in cases]
    print_table(rows, list(rows[0]))
    if flags.json:
        write_json(flags.json, meta=meta(device="cpu", ranks=flags.ranks), rows=rows)


if __name__ == "__main__":
    main()
