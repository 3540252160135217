"""The stage files that are installed with the package, and copies of them to be changed."""

from __future__ import annotations

import re
from pathlib import Path

from llava_kd.durable import replacing_folder, write_text

FOLDER = Path(__file__).parents[2] / "recipes"
# In a checkout the files of all but `small` are links to those in scripts/, of which a wheel holds the text.
RECIPES = {
    "paper": "LLaVA-KD's three stages at the paper's sizes: 558k captions, 665k instructions",
    "small": "the same three stages for 200 to 20,000 records of your own; `llava-kd init` fills them in",
    "on_policy": "a third stage in which the teacher also corrects the student's own answers (GKD)",
    "peer": "two students that teach each other; no teacher is needed",
    "other_tokenizers": "a third stage with a teacher of another model family",
    "teacher_tuning": "tunes a teacher before it teaches (MCMI)",
}
_IN_CHECKOUT = r"scripts/(?:methods/\w+/)?({names})\b"


def listed() -> list[str]:
    """A line for every recipe: its name and what it is for."""
    wide = max(map(len, RECIPES))
    return [f"{name:<{wide}}  {what}" for name, what in RECIPES.items()]


def copy(name: str, directory: str | Path) -> list[str]:
    """Write the files of a recipe into a new `directory`, whole or not at all; what to do next, in lines.

    Where a comment names one of the files, it names the copy. Raises ValueError for an unknown name, and for
    a directory that is not empty.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    out = Path(directory)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a new directory for the recipe")
    sources = {path.name: path.read_text(encoding="utf-8") for path in files(name)}
    named = re.compile(_IN_CHECKOUT.format(names="|".join(map(re.escape, sources))))
    with replacing_folder(out) as scratch:
        for file, text in sources.items():
            write_text(scratch / file, named.sub(lambda found: str(out / found[1]), text))
    stages = [file for file in sources if file.endswith(".yaml") and file != "pipeline.yaml"]
    run = f"run {out / 'pipeline.yaml'}" if "pipeline.yaml" in sources else f"train {out / stages[0]}"
    return [
        f"{out}: {', '.join(sources)}",
        f"next: write your teacher, student and data into {', '.join(stages)}",
        f"then: llava-kd check {out / stages[0]}, and llava-kd {run}",
    ]


def files(name: str) -> list[Path]:
    """Of a recipe, in the order of their names; templates that only `init` can fill in are left out."""
    return sorted(path for path in (FOLDER / name).iterdir() if path.suffix in (".yaml", ".sh"))
