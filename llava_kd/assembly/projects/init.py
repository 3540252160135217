"""`llava-kd init`: a project folder from a user's pictures, a table and the names of the models."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from string import Template

import transformers
import yaml
from transformers import LlavaForConditionalGeneration

from llava_kd.assembly.parts.models import student_in
from llava_kd.assembly.planning.estimate import ModelSizes
from llava_kd.assembly.planning.machine import GB, Machine
from llava_kd.assembly.projects.filling import fill
from llava_kd.assembly.projects.own_data import OwnData, refuse_taken, write_splits
from llava_kd.assembly.projects.sizing import Sizing, max_length, micro_batch, too_large
from llava_kd.assembly.settings import load
from llava_kd.assembly.stage import few_steps
from llava_kd.config.trees import parse_override
from llava_kd.data.sources.conversation import IMAGE_PLACEHOLDER, read_record
from llava_kd.data.text.template_choice import AUTO, choose
from llava_kd.data.text.template_table import TEMPLATES
from llava_kd.durable import replacing_folder
from llava_kd.models.files.checkpoint import load_config, load_processor
from llava_kd.models.reading import existing
from llava_kd.models.towers.vision_tower import text_config

RECIPE = Path(__file__).parents[2] / "recipes" / "small"
FEATURES = ("vision_feature_layer", "vision_feature_select_strategy")
LAUNCHER = (
    "python -m llava_kd.assembly.runs.supervise python -m llava_kd.assembly.runs.torchrun --standalone "
    "--nproc-per-node {} -m llava_kd.cli train"
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Directories or hub ids; None is what the recipe names, for the teacher the folder `teacher`.

    `student` is a whole one, which needs no stage that composes it.
    """

    teacher: str | None = None
    student: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None

    def checked(self) -> Models:
        """With absolute paths. Raises ValueError for a path that is not there."""
        if self.student and (self.vision_tower or self.language_model):
            raise ValueError("--student names a whole model; leave out --vision_tower and --language_model")
        named = {
            "teacher": "the LLaVA checkpoint",
            "student": "the LLaVA checkpoint",
            "vision_tower": "the vision tower",
            "language_model": "the language model",
        }
        return Models(**{key: _checked(getattr(self, key), what) for key, what in named.items()})


def _checked(name: str | None, what: str) -> str | None:
    if name is None:
        return None
    found = name if name.startswith(("timm:", "open_clip:")) else existing(os.path.expanduser(name), what)
    return str(Path(found).absolute()) if Path(found).is_dir() else found


def begin(
    directory: str,
    data: OwnData,
    models: Models,
    overrides: Sequence[str] = (),
    machine: Machine | None = None,
) -> list[str]:
    """Write the project; lines that say what was found, what to look out for, and what comes next.

    `overrides` go into every stage file whose recipe has their section. Raises ValueError for a directory
    that is not empty, for models that are not there, and for settings that do not load; nothing is left
    behind then.
    """
    target = Path(directory).absolute()
    refuse_taken(target)
    models = models.checked()
    machine = machine or Machine.here()
    try:
        with replacing_folder(target) as scratch:
            project = _Project(scratch, target, data, models, machine, [parse_override(o) for o in overrides])
            lines = project.write()
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written ({error}); name a folder that you can write to"
        ) from error
    return lines


class _Project:
    """What is written into `scratch`, to be moved to `target` when it is whole."""

    def __init__(
        self,
        scratch: Path,
        target: Path,
        data: OwnData,
        models: Models,
        machine: Machine,
        overrides: Sequence[tuple[str, object]],
    ) -> None:
        self._scratch, self._target = scratch, target
        self._data, self._models, self._machine = data, models, machine
        self._overrides = overrides
        self._ranks = max(1, len(machine.gpus))
        sizing = Sizing.of(data.num_records, self._ranks)
        self._sizing = sizing.changed(data.num_records, dict(overrides))
        self._teacher = models.teacher or str(target / "teacher")
        self._template = _template_of(self._teacher)
        self._needs: list[float] = []
        self._stock: LlavaForConditionalGeneration | None = None

    def write(self) -> list[str]:
        write_splits(self._data, self._scratch / "data")
        names = self._stage_names()
        sizes = self._student_sizes(names)
        tokens = {} if sizes is None else {"tokens_per_image": sizes.tokens_per_image}
        length = max_length(self._data.longest, self._data.images_of_one, **tokens)
        for before, name in zip([None, *names], names, strict=False):
            values = self._values(name, before, length)
            self._write_stage(name, values, is_sized=sizes is not None)
        stages = [{"config": name} for name in names]
        pipeline = {"command": None if self._ranks == 1 else LAUNCHER.format(self._ranks), "stages": stages}
        recipe = (RECIPE / "pipeline.yaml").read_text()
        comment = "".join(line for line in recipe.splitlines(True) if line.startswith("#"))
        (self._scratch / "pipeline.yaml").write_text(comment + yaml.safe_dump(pipeline, sort_keys=False))
        warnings = self._warnings(is_sized=sizes is not None)
        (self._scratch / "README.md").write_text(self._readme(names, warnings), encoding="utf-8")
        size = self._sizing
        return [
            *self._data.notes,
            f"sized for {self._machine}: {size.global_batch_size} records per step, {size.epochs} epochs, "
            f"{size.steps} steps per stage",
            *(f"warning: {line}" for line in warnings),
            f"{self._target}: {', '.join(names)}, pipeline.yaml, README.md, data/",
            f"next: cd {self._target} && llava-kd run pipeline.yaml",
        ]

    def _stage_names(self) -> list[str]:
        """Those of the recipe; a whole student needs none that composes one."""
        found = sorted(path.name for path in RECIPE.glob("stage*.yaml"))
        if self._models.student is None:
            return found
        return [name for name in found if "checkpoint" in _tree(name)["student"]]

    def _values(self, name: str, before: str | None, length: int) -> dict[str, object]:
        """What the recipe's stage is filled with, what the user set last."""
        tree, size, on_gpu = _tree(name), self._sizing, bool(self._machine.gpus)
        values: dict[str, object] = {
            "data.template": self._template,
            "output_dir": str(self._target / "runs" / Path(name).stem),
            "data.path": self._split("train"),
            "data.images": str(self._data.images),
            "data.max_length": length,
            "data.num_workers": min(4, max(0, self._machine.cores // self._ranks - 2)),
            "global_batch_size": size.global_batch_size,
            "micro_batch_size": 1,
            "epochs": size.epochs,
            "engine.precision": "bf16" if on_gpu else "fp32",
            "engine.activation_checkpointing": on_gpu,
            "checkpoint.every": max(10, size.steps // 4),
            "log.every": max(1, min(10, size.steps // 20)),
        }
        if before is not None:
            values["student.checkpoint"] = str(self._target / "runs" / Path(before).stem / "model")
        elif self._models.student is not None:
            values["student.checkpoint"] = self._models.student
        else:
            values |= self._composed()
        if "teacher" in tree:
            values["teacher.checkpoint"] = self._teacher
            values["teacher.dtype"] = "bfloat16" if on_gpu else "float32"
        if "evaluate" in tree:
            values |= self._evaluation(tree)
        own = {key: value for key, value in self._overrides if _fits(key, tree)}
        return {key: value for key, value in values.items() if key not in own} | own

    def _composed(self) -> dict[str, object]:
        """Of a new student; it takes the teacher's features, where the teacher is here."""
        named = {
            "student.vision_tower": self._models.vision_tower,
            "student.language_model": self._models.language_model,
        }
        values: dict[str, object] = {key: name for key, name in named.items() if name is not None}
        config = Path(self._teacher) / "config.json"
        if config.is_file():
            held = json.loads(config.read_text(encoding="utf-8"))
            for key in FEATURES:
                if isinstance(held.get(key), int | str):
                    values[f"student.{key}"] = held[key]
        return values

    def _evaluation(self, tree: Mapping) -> dict[str, object]:
        if "validation" not in self._data.splits:
            return {"evaluate": None, "checkpoint.best": None, "checkpoint.export": "last"}
        (name,) = tree["evaluate"]["losses"]
        held = {"path": self._split("validation"), "images": str(self._data.images)}
        return {"evaluate.every": max(1, self._sizing.steps // 6), "evaluate.losses": {name: held}}

    def _split(self, name: str) -> str:
        return str(self._target / "data" / f"{name}.json") if self._data.splits else str(self._data.path)

    def _student_sizes(self, names: Sequence[str]) -> ModelSizes | None:
        """None where a model is not on this machine; nothing is downloaded."""
        parts = (self._models.vision_tower, self._models.language_model)
        whole = self._models.student
        if not _is_here(self._teacher) or not (_is_here(whole) if whole else all(map(_is_here, parts))):
            return None
        if whole is not None:
            return ModelSizes.of_directory(whole)
        path = self._scratch / names[0]
        path.write_text(fill((RECIPE / names[0]).read_text(), self._values(names[0], None, 2048)))
        transformers.logging.disable_progress_bar()
        self._stock = student_in(load(path)).stock
        return ModelSizes.of(self._stock)

    def _write_stage(self, name: str, values: dict[str, object], *, is_sized: bool) -> None:
        path = self._scratch / name
        text = fill((RECIPE / name).read_text(), values)
        path.write_text(text, encoding="utf-8")
        config = load(path)
        if not is_sized:
            return
        student = (
            ModelSizes.of_directory(self._models.student or "", config)
            if self._stock is None
            else ModelSizes.of(self._stock, config)
        )
        teacher = None if config.teacher is None else ModelSizes.of_directory(self._teacher)
        chosen, need = micro_batch(config, student, teacher, self._machine, self._ranks)
        self._needs.append(need)
        if "micro_batch_size" not in dict(self._overrides):
            path.write_text(fill(text, {"micro_batch_size": chosen}), encoding="utf-8")

    def _warnings(self, *, is_sized: bool) -> list[str]:
        said = [few_steps(self._sizing.steps), too_large(max(self._needs, default=0.0), self._machine)]
        if not is_sized:
            said.append(
                "teacher or student is not on this machine, so memory was not estimated and "
                "micro_batch_size is 1: run `llava-kd check` for an estimate once they are here"
            )
        return [line for line in said if line is not None]

    def _readme(self, names: Sequence[str], warnings: Sequence[str]) -> str:
        model = f"runs/{Path(names[-1]).stem}/model"
        images = shlex.quote(str(self._data.images))
        commands = [
            "# TinyLLaVA teacher: llava-kd convert DIR --out teacher; stock LLaVA teacher: copy it to "
            "teacher/",
            f"llava-kd check {names[0]}  # checks models, a sample of the records, memory",
            "llava-kd run pipeline.yaml  # trains every stage; after a stop, run it again to continue",
            "llava-kd watch runs  # in another terminal: losses, speed, time left",
            f"llava-kd eval --model {model} --data data/test.json --images {images} --out scores",
            f"llava-kd chat --model {model} --image PICTURE {shlex.quote(self._question())}",
            f"llava-kd export {model} --out exported  # checks the model and writes a model card",
        ]
        if self._models.teacher is not None:
            del commands[0]
        if "test" not in self._data.splits:
            commands = [line for line in commands if " eval " not in line]
        needs = f"{max(self._needs) / GB:.1f} GB estimated at most" if self._needs else "not estimated"
        return Template((RECIPE / "README.md.in").read_text()).substitute(
            name=self._target.name,
            records=self._data.num_records,
            images=self._data.images,
            stages="\n".join(f"| `{name}` | {_first_sentence(name)} |" for name in names),
            machine=self._machine,
            global_batch_size=self._sizing.global_batch_size,
            epochs=self._sizing.epochs,
            steps=self._sizing.steps,
            needs=needs,
            warnings="".join(f"\n**{line}**\n" for line in warnings),
            commands="\n".join(commands),
        )

    def _question(self) -> str:
        """That of the first record."""
        for entry in self._data.splits.get("train", []):
            turns = read_record(entry, 0).turns
            asked = next((turn.text for turn in turns if turn.role == "user"), "")
            if words := asked.replace(IMAGE_PLACEHOLDER, "").strip():
                return words.splitlines()[0]
        return "What is this?"


def _tree(name: str) -> dict:
    return yaml.safe_load((RECIPE / name).read_text())


def _is_here(name: str | None) -> bool:
    return name is not None and (Path(name) / "config.json").is_file()


def _fits(key: str, tree: Mapping) -> bool:
    """Whether a stage has what the setting is of: its teacher, or a term."""
    parts = key.split(".")
    if parts[0] in ("teacher", "evaluate"):
        return parts[0] in tree
    if parts[0] == "objective" and len(parts) > 1:
        return parts[1] in tree["objective"]
    is_of_new = parts[0] == "student" and "checkpoint" in tree["student"]
    return not (is_of_new and parts[-1] in ("vision_tower", "language_model", *FEATURES))


def _template_of(teacher: str) -> str:
    """The one of the package that the teacher speaks; `auto` where it is not here, or has another."""
    if not _is_here(teacher):
        return AUTO
    processor = load_processor(teacher)
    chosen = choose(
        AUTO,
        tokenizer=processor.tokenizer,
        model_type=text_config(load_config(teacher)).model_type,
        chat_template=processor.chat_template,
        is_trained=True,
    )
    return chosen.template.name if chosen.template.name in TEMPLATES else AUTO


def _first_sentence(name: str) -> str:
    """Its first sentence."""
    lines = (RECIPE / name).read_text().splitlines()
    said = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return said.partition(". ")[0].rstrip(".")
