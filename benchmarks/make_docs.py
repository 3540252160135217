"""Write docs/performance.md from benchmarks/results/, and docs/settings.md from the types of the settings.

python benchmarks/make_docs.py            # write
python benchmarks/make_docs.py --check    # exit 1 if a page is not what it is made from
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from _common import Row, Value, markdown_table

from llava_kd.assembly.settings import stage
from llava_kd.config.describe.pages import markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
HEADERS = {
    "ratio_to_gemms": "x products",
    "ratio_to_ours": "x ours",
    "peak_extra_bytes": "peak MB",
    "peak_temporary_bytes": "peak MB less gradients",
    "dx_error": "dX error",
    "dw_error": "dW error",
    "dh_error": "dH error",
    "row_error": "value error",
    "kl": "KL",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a result that have a figure in the first of `figures`, by the columns given."""

    columns: tuple[str, ...]
    figure: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says of one benchmark; without tables, every column."""

    script: str
    title: str
    text: str
    tables: tuple[Table, ...] = ()
    on_gpu: bool = True


PEAKS = ("peak_extra_bytes", "peak_temporary_bytes")
ERRORS = ("row_error", "dh_error", "dw_error")
STEP = ("case", "impl", "seconds", "samples_per_s", "ratio_to_ours", "mfu", "peak_gb")


HEAD = """The time of forward and backward of cross-entropy and KL from hidden states, compared with the
matrix products alone. The products are the lower limit for every implementation that computes
each of them once. `less gradients` does not count the dX and dW that every implementation
returns. Errors are relative distances of the gradient from fp64, for bf16 inputs.

The CPU table is older than the changes that followed from its profile. The profile shows the time
outside the products (one thread, the same heads, 272 rows, CPU seconds, medians of three rounds
in turn, load 10): products alone 5.67, ours in two chunks 6.85 (1.21 times), with the rows as
they are now 6.51 (1.15), and in one chunk 6.16 (1.09). So most of it comes from the chunks: each
reads both heads again, and reads and writes the whole dW. The rows of logits take 0.2 s. Tried:

- chunks of 240 MB of logits in place of 160 (4 in place of 6 for 793 rows): 1.08 times the
  products, was 1.13 (400 rows, two rounds), with 253 MB less gradients, 0.117 of naive PyTorch's.
  Kept; the goal of 0.125 allows no more. Chunks of 64 rows: 1.39 times.
- rows of logits from softmaxes, one exponential a column in place of two: 0.56 ms a row, was
  0.75. Kept. Their sums are taken in pairs: over 151,936 columns the gradient is off by 9e-8 of
  itself, was 8e-6.
- the same in place, over the logits: 0.56 ms, and a value off by 7e-5. Two log-softmaxes with
  exponentials in place: 0.64 ms. `exp` of logits less their largest: 0.64 ms.
- `torch.compile` of a row: 0.42 ms. Not kept: 0.04 s of 5.8 are too little gain for a compiler at
  the start of a run.

Compiled naive PyTorch holds all rows at once and so reads the heads once; ours in one chunk does
as well."""
LOADER = """Images and text for both models. The exact resize is an optional part in C. It uses Pillow's
weights as 16-bit halves, which AVX2 multiplies and adds without rounding. It is faster than
PyTorch's vectorised kernel for bytes, which is not exact, so `quick` is useful only if there was
no compiler. The goal was four times the rate of transformers' processor. With this part it is
reached, all on the CPU and with pixels equal to Pillow's. Half of the remaining time is the JPEG
decoder's. Pillow's own loops are faster than the same sums as matrix products, banded or dense,
and the JPEG decoder's own scaling is slower than decoding whole.

`worker` is the same from files through one worker process, whose CPU time counts; ours includes
the text of the records and the transfer through shared memory. `beside a GPU` does not count the
work of the trainer's process after that. There the largest single cost was new memory pages for
the normalised pixels; these pages are now reused. A worker as a thread of the trainer saves the
transfer, and shows the most that a ring of shared memory could save. It is not used, because text
and collation would hold the interpreter that starts the GPU's kernels."""
SECTIONS = (
    Section(
        script="loss_head",
        title="The loss head",
        text=HEAD,
        tables=(
            Table(figure="seconds", columns=("case", "terms", "impl", "seconds", "ratio_to_gemms", *PEAKS)),
            Table(figure="dx_error", columns=("case", "impl", "kl", "dx_error", "dw_error")),
        ),
    ),
    Section(
        script="relation",
        title="The relation loss",
        text="""Forward and backward with the heads' Gram matrices, compared with forming the logits of visual
tokens. A frozen head's Gram matrix is computed once; a moving head's at every step, with its gradient.""",
        tables=(Table(figure="seconds", columns=("case", "impl", "seconds", "speedup", PEAKS[0], *ERRORS)),),
    ),
    Section(
        script="step",
        title="A whole distillation step",
        text="""Tower once, teacher forward, student forward and backward, losses, optimiser; random weights.
The table compares it with each switch of ours turned off in turn, and with the plain loop over two
transformers models, which runs one sample at a time and materialises logits.""",
        tables=(Table(figure="seconds", columns=STEP),),
    ),
    Section(
        script="teacher_cache",
        title="The teacher from a cache",
        text="""A step of the quickstart's stage 3 that reads the teacher's predictions, compared with the
step that runs the teacher, in CPU seconds of one thread. The floor has no teacher and its batch is already
loaded: if the student takes most of the step, no cache can halve it. `loss_difference` is relative. The k
largest logits give a lower bound of the divergence, so their difference is not an error.""",
        on_gpu=False,
    ),
    Section(
        script="loader",
        title="The loader",
        text=LOADER,
        tables=(Table(figure="value", columns=("part", "what", "value", "unit", "ratio")),),
        on_gpu=False,
    ),
    Section(script="generation", title="Answering", text="Greedy answers in batches, and one at a time."),
    Section(
        script="on_policy",
        title="Answers of the student's own",
        text="""The cost for a step of the quickstart's stage 3 if the student first answers the questions of
its 32 records: at once, one by one (each prompt read from its beginning), and one record at a time with its
keys and values kept (`alone`). It is compared with the step that then learns from the answers, in CPU seconds
of one thread.""",
        on_gpu=False,
    ),
    Section(script="scoring", title="Scoring", text="The VQA rules over many answers.", on_gpu=False),
)
INTRODUCTION = """# Performance

This page shows speed and memory measurements of the package's parts. `python benchmarks/make_docs.py` makes
it from the JSON in `benchmarks/results/`. Each measurement has its date, commit (`+`: with changes not yet
committed), hardware, load and versions. What was not measured is marked "not measured", with the command that
measures it; nothing is estimated.
"""
FP16 = """## fp16 logits

`head_loss(..., logits_dtype=torch.float16)` stores the logits of a chunk in 16 bits: half the memory, and an
eighth of the rounding error of bf16. fp32 is the default and what training uses. A logit beyond 65,504 does
not fit. There is no fallback, because the check would cost a host synchronisation in every step: the call
**refuses** the row. Its loss, and with it the total and the gradient, become NaN. This also holds if only a
negative logit overflowed, which a softmax would hide. The trainer stops on a NaN loss and names the records
of the batch.
"""
TARGETS = """## Figures to reach

| figure | to reach | reached |
| --- | --- | --- |
"""


def load(script: str) -> list[dict]:
    """Results of one benchmark, CPU before GPU."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{script}*.json"))]
    return sorted(found, key=lambda result: result["meta"]["device"] != "cpu")


def section_text(section: Section) -> str:
    results = load(section.script)
    parts = [f"## {section.title}\n\n{section.text}\n"]
    for result in results:
        parts.append(f"{_where(result['meta'])}\n")
        for table in section.tables or (_every_column(result["rows"]),):
            rows = [_shown(row) for row in result["rows"] if table.figure in row or "note" in row]
            shown = [column for column in table.columns if any(row.get(column) is not None for row in rows)]
            shown += ["note"] if any("note" in row for row in rows) else []
            if any(row.get(table.figure) is not None for row in rows):
                parts.append(_table(rows, shown) + "\n")
    if section.on_gpu and not any(result["meta"]["device"] == "cuda" for result in results):
        script = f"benchmarks/{section.script}.py"
        target = f"benchmarks/results/{section.script}_cuda.json"
        parts.append(f"On a GPU: **not measured**. `python {script} --device cuda --json {target}`\n")
    elif not results:
        parts.append(f"**Not measured.** `python benchmarks/{section.script}.py`\n")
    return "\n".join(parts)


def _every_column(rows: list[Row]) -> Table:
    columns = tuple(dict.fromkeys(column for row in rows for column in row if column != "note"))
    return Table(columns=columns, figure=columns[-1])


def _shown(row: Row) -> Row:
    """Bytes as megabytes."""
    return {k: round(v / 2**20) if k.endswith("_bytes") and isinstance(v, int) else v for k, v in row.items()}


def _table(rows: list[Row], columns: list[str]) -> str:
    renamed: list[Row] = [{HEADERS.get(c, c): row.get(c) for c in columns} for row in rows]
    return markdown_table(renamed, [HEADERS.get(c, c) for c in columns])


def _where(meta: dict[str, Value | dict[str, str]]) -> str:
    versions = meta["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    load = f", load {meta['load_average']}" if "load_average" in meta else ""
    return f"{meta['date']}, commit {meta['commit']}, {meta['hardware']}{load}, {named}: `{meta['command']}`"


def _row(script: str, device: str, **wanted: Value) -> Row | None:
    """The one measured row of a benchmark that has these values; None where there is none."""
    for result in load(script):
        for row in result["rows"]:
            if result["meta"]["device"] == device and all(row.get(k) == v for k, v in wanted.items()):
                return row
    return None


def _ratio(above: Row | None, below: Row | None, key: str) -> str:
    if above is None or below is None or above.get(key) is None or not below.get(key):
        return "not measured"
    return f"{float(above[key]) / float(below[key]):.2f}"  # pyright: ignore[reportArgumentType]


def _figure(row: Row | None, key: str) -> str:
    value = None if row is None else row.get(key)
    return "not measured" if value is None else f"{value:.3g}"


def targets_text() -> str:
    """The figures that were set, beside those of the results."""
    head = {"script": "loss_head", "device": "cpu", "case": "1 image, 64 response tokens"}
    ours, naive = (_row(**head, impl=impl) for impl in ("ours, fp32 logits", "naive PyTorch"))
    gram = {"script": "relation", "device": "cpu", "impl": "Gram"}
    frozen, moving = (_row(**gram, case=f"1 x 729 tokens, {which} head") for which in ("frozen", "moving"))
    paper = {"script": "loss_head", "device": "cuda", "case": "8 images, 8232 rows", "terms": "ce+kl"}
    single, half = (_row(**paper, impl=f"ours, {dtype} logits") for dtype in ("fp32", "fp16"))
    step = _row("step", "cuda", impl="ours")
    batch = max(
        (row for result in load("generation") for row in result["rows"] if result["meta"]["device"] == "cpu"),
        key=lambda row: row["times_the_loop"],
        default=None,
    )
    alone, through = "ours, all on the CPU, equal to Pillow", "our loader, equal to Pillow"
    written = [row for result in load("on_policy") for row in result["rows"]]
    slowest = min(written, key=lambda row: row["speedup"], default=None)
    dearest = max(written, key=lambda row: row["of_the_step"], default=None)
    images, worker = (_row("loader", "cpu", what=what) for what in (alone, through))
    errors = ", ".join(_figure(moving, error) for error in ERRORS[:2])
    memory = "CPU, loss head: peak memory over naive, beyond inputs and returned gradients"
    lines = (
        (memory, "<= 0.125", _ratio(ours, naive, "peak_temporary_bytes")),
        ("the same with the returned gradients", "-", _ratio(ours, naive, "peak_extra_bytes")),
        ("CPU, loss head: time over naive", "<= 1", _ratio(ours, naive, "seconds")),
        ("CPU, relation, frozen head: times faster", ">= 20", _figure(frozen, "speedup")),
        ("CPU, relation, moving head: times faster", ">= 2", _figure(moving, "speedup")),
        ("CPU, relation: error of value, of dH", "<= 1e-5", errors),
        ("CPU, answering in batches: times the loop", ">= 3", _figure(batch, "times_the_loop")),
        ("CPU, own answers at once: times one by one", ">= 5", _figure(slowest, "speedup")),
        ("CPU, own answers: times the step that they feed", "<= 2", _figure(dearest, "of_the_step")),
        ("CPU, exact images: times transformers with Pillow", ">= 3.2", _figure(images, "ratio")),
        ("the same from files, through a worker process", ">= 2.5", _figure(worker, "ratio")),
        ("GPU, loss head, fp32 logits: time over products", "<= 1.30", _figure(single, "ratio_to_gemms")),
        ("GPU, loss head, fp16 logits: time over products", "<= 1.20", _figure(half, "ratio_to_gemms")),
        ("GPU, whole step, Qwen2.5-3B to 0.5B: samples/s", ">= 36", _figure(step, "samples_per_s")),
        ("the same: share of the peak arithmetic", ">= 0.40", _figure(step, "mfu")),
    )
    return TARGETS + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    return "\n".join([INTRODUCTION, targets_text(), *map(section_text, SECTIONS), FP16])


def pages() -> dict[Path, str]:
    return {DOCS / "performance.md": page(), DOCS / "settings.md": markdown(stage())}


def main() -> None:
    flags = argparse.ArgumentParser(description="Write the pages of docs/ that are made from something else.")
    flags.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is old")
    if flags.parse_args().check:
        old = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
        sys.exit(f"out of date: {', '.join(old)}; run benchmarks/make_docs.py" if old else 0)
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
