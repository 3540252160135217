"""The command that shows the settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llava_kd.cli.words import Commands, add_plugins, command, show


def add(commands: Commands) -> None:
    what = "show all settings with type, default, range and help, or the settings of a stage"
    show = command(commands, "config", _config, what, takes_settings=True)
    which = "a setting such as optim.lr, or a stage's YAML file with settings after it (default: all)"
    show.add_argument("of", nargs="?", metavar="KEY_OR_FILE", help=which)
    add_plugins(show, "terms, whose settings are shown too")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json_schema", action="store_true", help="print a JSON Schema, for editors")
    form.add_argument("--markdown", action="store_true", help="print the page docs/settings.md")


def _config(arguments: argparse.Namespace) -> int:
    """A stage is shown as YAML that loads, with comments where it is not the default."""
    from llava_kd.config import TrainConfig
    from llava_kd.config.describe.tree import branch
    from llava_kd.config.reading import check_early

    if arguments.of is not None and arguments.of.endswith((".yaml", ".yml")):
        check_early(arguments.of, arguments.overrides)
    elif arguments.of is not None and not arguments.of.startswith("objective"):
        branch(TrainConfig, arguments.of)  # an unknown name is told before the terms are imported
    from llava_kd.assembly.settings import load, stage
    from llava_kd.config.describe.json_schema import json_schema
    from llava_kd.config.describe.pages import markdown, marked, text
    from llava_kd.config.describe.tree import walk

    of = arguments.of
    is_whole = arguments.json_schema or arguments.markdown
    if is_whole and (of or arguments.overrides):
        raise ValueError(
            f"--json_schema and --markdown print all settings; leave out {of or 'the other arguments'}"
        )
    if of is not None and (of.endswith((".yaml", ".yml")) or Path(of).is_file()):
        show(marked(load(of, arguments.overrides)))
        return 0
    if arguments.overrides:
        raise ValueError(
            f"settings must follow a stage's YAML file; got only {' '.join(arguments.overrides)}: name the "
            "file before them"
        )
    section = stage(arguments.plugin)
    if arguments.json_schema:
        show(json.dumps(json_schema(section), indent=2))
    elif arguments.markdown:
        show(markdown(section).removesuffix("\n"))
    else:
        show(text(walk(section) if of is None else branch(section, of)))
    return 0
