"""The project from Python, in a script or a notebook: what the commands do, as functions (docs/python.md).

`import llava_kd` alone loads nothing heavy: these names are imported when they are first used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from llava_kd.config import TrainConfig
    from llava_kd.evaluation.runner import Summary

NAMES = ("Chat", "Run", "evaluate", "load", "report", "train")


def load(recipe: str | Path, settings: Mapping[str, object] | None = None) -> TrainConfig:
    """The settings of a stage: a YAML file, and changes by their dotted names, such as {"optim.lr": 1e-4}.

    None is YAML's null. Raises ValueError, with the place and what must hold, for a setting that does not
    exist or does not fit; FileNotFoundError for a file that is not there.
    """
    from llava_kd.assembly.settings import load as read

    return read(recipe, [f"--{name}={_word(value)}" for name, value in (settings or {}).items()])


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stage that was trained: its directory, and the signal that stopped it; None if it is finished."""

    directory: Path
    stopped: str | None = None

    @property
    def model(self) -> Path:
        """The student as a stock LLaVA directory. FileNotFoundError while the stage is not finished."""
        path = self.directory / "model"
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{self.directory} has no finished student yet; call train with the same settings to go on"
            )
        return path

    def metrics(self) -> list[dict[str, float]]:
        """The figures logged so far, one dictionary for each logged step."""
        return list(_lines(self.directory / "metrics.jsonl"))


def train(settings: TrainConfig) -> Run:
    """Train a stage to its end in this process, or resume it. For a finished stage it does nothing.

    An interrupt (Ctrl-C, or a notebook's stop button) finishes the step, saves a checkpoint, and returns a
    `Run` with `stopped` set; before the first step it raises KeyboardInterrupt. Under torchrun every rank
    calls it. Raises ValueError for settings that do not fit the models, the data or the machine.
    """
    from llava_kd.assembly.train import train as run

    return Run(stopped=run(settings), directory=Path(settings.output_dir))


def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    noise: Sequence[float] = (),
) -> Summary:
    """Evaluate a model on every question of a LLaVA JSON file; `out` keeps the answers and the summary.

    `images` is the image root (None: the folder of the file), `max_new_tokens` None is 32, `noise` lists
    levels of picture noise that are evaluated too (docs/methods/noise.md). After an interruption, the same
    call continues. Raises ValueError if `out` holds the answers of another model, file or setting.
    """
    from llava_kd.evaluation.runner import Asking
    from llava_kd.evaluation.runner import evaluate as ask

    asking = Asking(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit, noise=noise)
    return ask(model, data, out, image_root=images, asking=asking)


class Chat:
    """A conversation about images; the turns before a question are its context."""

    def __init__(
        self, model: str | Path, images: str | Path | Sequence[str | Path] = (), *, max_new_tokens: int = 256
    ) -> None:
        """Raises ValueError for a directory that is no stock LLaVA, or an image that cannot be read."""
        from llava_kd.evaluation.generation.chat import Chat as Talk

        paths = [images] if isinstance(images, str | Path) else images
        self._talk = Talk.load(str(model), [str(path) for path in paths], max_new_tokens=max_new_tokens)

    def ask(self, question: str) -> str:
        """The greedy answer."""
        return "".join(self.stream(question)).strip()

    def stream(self, question: str) -> Iterator[str]:
        """The same answer piece by piece, as it is generated."""
        return self._talk.stream(question)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages so far, each with role and content."""
        return list(self._talk.turns)


def report(*directories: str | Path, out: str | Path | None = None) -> Path:
    """Write a page about runs, finished or not, or about a comparison like the quickstart's; return its path.

    Each directory is a run directory, or holds some; `out` None is report.html in the first.
    """
    from llava_kd.assembly.settings import labels
    from llava_kd.evaluation.report.entry import report_on

    return report_on(directories, terms=labels(), out=out)[0]


def _word(value: object) -> str:
    """As an override writes it: YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Whole lines; the last may be half-written while the run goes on."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)
