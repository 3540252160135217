"""What the settings say of themselves: help and ranges of each, the pages made of them, the JSON Schema."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import pytest
import yaml
from annotated_types import Ge, Gt, Interval, Le, MinLen
from typing_extensions import Doc

from llava_kd.assembly.settings import load, stage
from llava_kd.cli import main
from llava_kd.config.checks import check_section
from llava_kd.config.describe.json_schema import Node, json_schema
from llava_kd.config.describe.pages import markdown, marked, text
from llava_kd.config.describe.tree import branch, walk
from llava_kd.config.ranges import check_number

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "scripts").rglob("*.yaml") if path.name != "pipeline.yaml")
STAGE = stage()
SCHEMA = json_schema(STAGE)
WITHOUT_RANGE = {
    "student.vision_feature_layer": "counts from either end; the tower that is loaded knows its depth",
    "peer.vision_feature_layer": "counts from either end; the tower that is loaded knows its depth",
}
Path_ = tuple[str, ...]


def faults(section: type) -> list[str]:
    found = []
    for setting in walk(section):
        if not 0 < len(setting.doc) <= 100:
            found.append(f"{setting.key}: {len(setting.doc)} characters of help")
        is_number = "number" in setting.value
        if is_number and not any(word in setting.value for word in ("more than", "at least")):
            found += [] if setting.key in WITHOUT_RANGE else [f"{setting.key}: a number without a range"]
    return found


def test_every_setting_has_a_line_of_help_and_every_number_a_range() -> None:
    assert faults(STAGE) == []
    assert WITHOUT_RANGE.keys() <= {setting.key for setting in walk(STAGE)}


def test_a_setting_without_help_or_range_is_found() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Below:
        silent: str = "a"
        talkative: Annotated[bool, Doc("a" * 101)] = False
        unbounded: Annotated[dict[str, float], Doc("Rates.")]

    assert faults(Below) == [
        "silent: 0 characters of help",
        "talkative: 101 characters of help",
        "unbounded: a number without a range",
    ]


# The tree as text


def test_a_branch_is_what_it_is_asked_for() -> None:
    (lr,) = branch(STAGE, "optim.lr")
    assert text([lr]).startswith("optim.lr: a number, more than 0; no default\n    ")
    keys = [setting.key for setting in branch(STAGE, "evaluate.slices")]
    assert keys == [
        "evaluate.slices",
        *(f"evaluate.slices.NAME.{name}" for name in ("data", "images", "num_questions")),
    ]
    with pytest.raises(ValueError, match=r"no setting `optim.lrr` \(did you mean `optim.lr`\?\)"):
        branch(STAGE, "optim.lrr")


def test_values_are_told_in_words() -> None:
    told = {setting.key: (setting.value, setting.default) for setting in walk(STAGE)}
    assert told["optim.betas"] == ("a list of 2, each a number, at least 0, less than 1", "[0.9, 0.999]")
    assert told["student.quantize"] == ("one of 4bit, 8bit, or null", "null")
    assert told["max_steps"] == ("a whole number, more than 0, or null", "null")
    assert told["engine"] == ("a section", "")
    assert told["output_dir"] == ("text", None)
    assert told["optim.lr_by_part"] == ("a number, more than 0 under each name", "{}")


def test_the_page_is_made_of_the_settings() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    assert page == markdown(STAGE), "run python benchmarks/make_docs.py"
    for setting in walk(STAGE):
        above, _, name = setting.key.rpartition(".")
        table = page.split(f"## `{above}`\n" if above else "## A stage\n")[1].split("\n## ")[0]
        assert f"| `{name}` | {setting.value} |" in table, setting.key
        assert setting.doc in table


# A stage beside the defaults


def differing(config: object, prefix: str = "") -> set[str]:
    """Dotted names of the settings that are not what a section without them would have."""
    assert is_dataclass(config)
    found = set()
    for field in fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        factory = cast(object, field.default_factory)
        default = factory() if callable(factory) else field.default
        if default != value and not is_dataclass(default):
            found.add(key)
        if is_dataclass(value):
            found |= differing(value, f"{key}.")
    return found


def marks(page: str) -> set[str]:
    found, above = set(), [""]
    for line in page.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        above = [*above[: depth + 1], f"{above[depth]}{name}."]
        if "  # " in line:
            found.add(f"{above[depth]}{name}")
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--optim.lr_by_part.language_model=1e-6", "--trainable=[language_model]", "--engine.device=cpu"),
        ("--profile={steps: [3, 4]}", "--seed=1", "--log.wandb_project='a: b'"),
    ],
    ids=["as it is", "rates", "odd text"],
)
def test_a_shown_stage_loads_back_and_its_marks_are_true(
    recipe: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    config = load(recipe, overrides)
    page = marked(config)
    (tmp_path / "shown.yaml").write_text(page)
    assert load(tmp_path / "shown.yaml") == config
    assert marks(page) == differing(config)


def test_mixtures_and_named_sections_are_shown(tmp_path: Path) -> None:
    odd = [
        "--data.path=null",
        "--data.images=null",
        "--data.sources=[{path: a.json, weight: 2}, {path: 'b: c.json'}]",
        "--evaluate={every: 5, slices: {'a b': {data: x.json}, 'null': {data: y.json}}}",
    ]
    config = load(RECIPES[-1], odd)
    (tmp_path / "shown.yaml").write_text(marked(config))
    assert load(tmp_path / "shown.yaml") == config


def test_the_command_shows_all_a_branch_and_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        assert main(["config", *words]) == 0
        return capsys.readouterr().out

    assert shown() == text(walk(STAGE)) + "\n"
    assert shown("optim.lr").count("\n") == 2
    assert shown(str(RECIPES[0]), "--seed=5") == marked(load(RECIPES[0], ["--seed=5"])) + "\n"
    assert json.loads(shown("--json_schema")) == json.loads(json.dumps(SCHEMA))
    assert shown("--markdown") == markdown(STAGE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr"], "no setting `optim.lrr` (did you mean `optim.lr`?)"),
        (["nothing.yaml"], "no config file nothing.yaml"),
        (["--optim.lr=1"], "settings must follow a stage's YAML file; got only --optim.lr=1"),
        (["optim.lr", "--json_schema"], "print all settings; leave out optim.lr"),
    ],
)
def test_words_that_it_cannot_show_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_room_needs_no_pytorch() -> None:
    code = "import llava_kd.config.describe.pages, llava_kd.config.describe.json_schema, sys\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The schema against the loader


def leaves(node: Node, path: Path_ = ()) -> Iterator[tuple[Path_, Node]]:
    """Nodes of what holds nothing, with null left out; a list's item under `[]`, or `[2]` of a list of 2."""
    if "anyOf" in node:
        node = cast(list[Node], node["anyOf"])[0]
    if node.get("type") == "object":
        below = node["additionalProperties"]
        if below is not False:
            yield from leaves(cast(Node, below), (*path, "NAME"))
        for name, child in cast(dict[str, Node], node.get("properties", {})).items():
            yield from leaves(child, (*path, name))
    elif node.get("type") == "array":
        parts = cast(list[Node], node.get("prefixItems", [node["items"]]))
        yield from leaves(parts[0], (*path, f"[{len(parts)}]" if "prefixItems" in node else "[]"))
    else:
        yield path, node


def refusal(path: Path_, value: object) -> str | None:
    """What the loader says of one value, if it is about this setting."""
    where, tree = "", value
    for name in path:
        where += "[0]" if name[0] == "[" else f".{name}" if where else name
    for name in reversed(path):
        if name[0] == "[":
            tree = [tree] * int(name.strip("[]") or 1)
        else:
            tree = {name: tree}
    try:
        check_section(tree, STAGE, "")
    except ValueError as error:
        said = str(error)
    else:
        return None
    if said.endswith("is missing"):
        return None
    assert f"`{where}`" in said
    return said


LEAVES = dict(leaves(SCHEMA))
NUMBERS = {path: node for path, node in LEAVES.items() if node.get("type") in ("integer", "number")}


def next_to(node: Node, end: float, direction: int) -> float:
    if node["type"] == "integer":
        return int(end) + direction
    return math.nextafter(end, direction * math.inf)


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_the_ends_of_a_range_are_those_of_the_loader(path: Path_) -> None:
    node = NUMBERS[path]
    ends = 0
    for word, outward in (("inimum", -1), ("aximum", 1)):
        closed, open_ = (cast(float | None, node.get(name)) for name in (f"m{word}", f"exclusiveM{word}"))
        assert (closed is None) != (open_ is None)
        if closed is not None:
            assert refusal(path, closed) is None
            assert refusal(path, next_to(node, closed, outward)) is not None
        elif open_ is not None:
            assert refusal(path, open_) is not None
            assert refusal(path, next_to(node, open_, -outward)) is None
        ends += 1
    assert ends == 2


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
WRONG = [True, 3, 2.5, "word", " ", [], {}, ["word"], {"word": 1}, None]


def allows(node: Node, value: object) -> bool:
    """Whether the keywords of a leaf that are not of numbers allow a value."""
    if "enum" in node:
        return any(value == one and type(value) is type(one) for one in cast(list, node["enum"]))
    is_type = isinstance(value, TYPES[cast(str, node["type"])])
    is_type = is_type and (isinstance(value, bool) == (node["type"] == "boolean"))
    return is_type and not ("pattern" in node and isinstance(value, str) and not value.strip())


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_what_the_loader_refuses_of_a_type_the_schema_refuses(path: Path_) -> None:
    node = LEAVES[path]
    allowed = [value for value in WRONG if allows(node, value)]
    for value in WRONG:
        takes_null = value is None and refusal(path, None) is None
        out_of_range = node.get("type") in ("integer", "number") and value in allowed
        if not takes_null and not out_of_range:
            said = refusal(path, value)
            assert said is None or value not in allowed, (path, value)
            # The schema is as wide, but for numbers where a text stands.
            is_number_for_text = node.get("type") == "string" and isinstance(value, int | float)
            assert said is not None or value in allowed or is_number_for_text, (path, value)


def objects(node: Node) -> Iterator[Node]:
    if node.get("type") == "object":
        yield node
    for child in node.values():
        for one in child if isinstance(child, list) else child.values() if isinstance(child, dict) else ():
            if isinstance(one, dict):
                yield from objects(one)
        if isinstance(child, dict):
            yield from objects(child)


def test_no_section_takes_a_key_that_it_does_not_know() -> None:
    sections = [node for node in objects(SCHEMA) if "properties" in node]
    assert len(sections) > 15
    assert all(node["additionalProperties"] is False for node in sections)
    properties = cast(dict[str, Node], SCHEMA["properties"])
    assert properties.keys() == {field.name for field in fields(STAGE)}
    assert SCHEMA["required"] == [
        *("output_dir", "student", "data", "objective", "optim", "trainable"),
        *("global_batch_size", "micro_batch_size"),
    ]
    assert all("description" in node for node in properties.values())


def keys(tree: object, path: Path_ = ()) -> Iterator[tuple[Path_, object]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from keys(value, (*path, name))
    else:
        yield path, tree


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_names_only_what_the_schema_knows(recipe: Path) -> None:
    for path, value in keys(yaml.safe_load(recipe.read_text())):
        node: Node = SCHEMA
        for name in path:
            node = cast(list[Node], node["anyOf"])[0] if "anyOf" in node else node
            named = cast(dict[str, Node], node.get("properties", {}))
            node = named[name] if name in named else cast(Node, node["additionalProperties"])
            assert node is not False, path
        node = cast(list[Node], node["anyOf"])[0] if "anyOf" in node and value is not None else node
        if "type" in node and node["type"] in TYPES:
            assert allows(node, float(value) if node["type"] == "number" else value), (path, value)


# Any section: containers, groups of ends, lengths


@dataclass(frozen=True, kw_only=True)
class Mixed:
    rates: Annotated[dict[str, Annotated[float, Gt(0)]], Doc("Rates.")]
    layers: Annotated[list[Annotated[int, Interval(ge=-9, lt=9)]] | None, MinLen(2), Doc("Layers.")] = None
    pair: Annotated[tuple[Annotated[float, Gt(1)], str], Doc("Pair.")] = (2.0, "a")
    outer: Annotated[int | None, Ge(2), Le(5), Doc("Outer.")] = None
    open: Annotated[float, Interval(gt=0, lt=1), Doc("Open.")] = 0.5
    stage: Annotated[Literal[1, 2] | None, Doc("Stage.")] = None


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"rates": {"a": 0}}, "`x.rates.a` must be more than 0; got 0"),
        ({"rates": {"every": -1.0}}, "`x.rates.every` must be more than 0; got -1"),
        ({"layers": [1, 9]}, "`x.layers[1]` must be below 9; got 9"),
        ({"layers": [1, 10]}, "`x.layers[1]` must be from -9 to 9; got 10"),
        ({"layers": [1]}, "`x.layers` must hold at least 2; got [1]"),
        ({"pair": [1, "b"]}, "`x.pair[0]` must be more than 1; got 1"),
        ({"pair": [2, True]}, "`x.pair[1]` must be text; got True"),
        ({"outer": 1}, "`x.outer` must be at least 2; got 1"),
        ({"outer": 6}, "`x.outer` must be at most 5; got 6"),
        ({"open": 1}, "`x.open` must be between 0 and 1; got 1"),
        ({"stage": True}, "`x.stage` must be one of 1, 2; got True"),
        ({"outer": 10**400}, "`x.outer` must be finite; got inf"),
        ({}, "`x.rates` is missing"),
        ({"rates": {}, "layers": [-9, 8], "pair": [1.5, "b"], "outer": None, "open": "1e-4"}, None),
    ],
)
def test_the_ranges_of_any_section_are_held(tree: dict, said: str | None) -> None:
    if said is None:
        check_section(tree, Mixed, "x")
    else:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared
            check_section(tree, Mixed, "x")
        assert str(caught.value) == said


def test_a_whole_number_is_compared_without_rounding() -> None:
    most = 2**63 - 1
    check_number(most, (Le(most),), "seed")
    with pytest.raises(ValueError, match="`seed` must be at most"):
        check_number(most + 1, (Le(most),), "seed")
