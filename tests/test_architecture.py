"""The house rules: who imports whom, sizes, and no stage in library code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from llava_kd.moved import MOVED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_kd"
ROOMS = {
    "bar": set(),
    "batch": set(),
    "checksums": set(),
    "config": set(),
    "durable": set(),
    "losses": set(),
    "moved": set(),
    "plugin_file": set(),
    "relative": set(),
    "tensor_files": {"durable"},
    "models": {"batch", "durable", "relative", "tensor_files"},
    "data": {"bar", "batch", "checksums", "durable", "plugin_file", "relative", "tensor_files"},
    "parallel": {"batch", "models"},
    "distill": {"batch", "losses", "models"},
    "training": {"batch", "checksums", "distill", "durable", "parallel", "tensor_files"},
    "evaluation": {"bar", "batch", "data", "durable", "models"},
    "curation": {"batch", "data", "durable", "evaluation", "models"},
    "search": {"config", "durable", "evaluation"},
    "assembly": {
        *("batch", "config", "data", "distill", "evaluation", "losses", "models", "parallel", "training"),
        *("checksums", "curation", "durable", "plugin_file", "relative", "search", "tensor_files"),
    },
    "__main__": {"cli"},
    "cli": {"assembly", "config", "curation", "data", "evaluation", "search"},
    "api": {"assembly", "config", "evaluation"},
}
# Inside a room the arrows go down; "" are the files that stand in it beside its sub-rooms.
FLOORS: dict[str, dict[str, set[str]]] = {
    "config": {"describe": {""}, "teaching": {""}, "": {"teaching"}},
    "data": {
        "pixels": set(),
        "sources": {"pixels"},
        "shapes": set(),
        "text": {"sources"},
        "teacher_store": {"text"},
        "foreign": {"sources", "text"},
        "batches": {"foreign", "pixels", "sources", "teacher_store", "text"},
        "": {"batches", "pixels", "sources", "text"},
    },
    "distill": {"teaching": {""}, "terms": {""}, "": {"teaching", "terms"}},
    "models": {
        "attention": {""},
        "projectors": {"", "files", "towers"},
        "towers": {""},
        "": {"attention", "heads", "projectors", "towers"},
        "files": {"", "projectors", "towers"},
        "foreign": {"", "files", "heads", "towers"},
        "heads": set(),
        "words": set(),
    },
    "evaluation": {
        "scorers": {""},
        "generation": {""},
        "report": {"", "generation", "scorers"},
        "demo": {"", "generation"},
        "": {"generation", "scorers"},
        "benchmarks": {"", "generation", "report", "scorers"},
    },
    "losses": {
        "kernels": {""},
        "targets": {""},
        "cross": {"", "kernels"},
        "inner": {""},
        "tuning": {"", "kernels"},
        "": {"kernels"},
    },
    "curation": {"elicit": {""}, "rationale": {"", "elicit"}, "": set()},
    "search": {
        "grids": set(),
        "findings": {"grids"},
        "running": {"findings", "grids"},
        "store": {"findings", "grids", "running"},
        "proposing": {"findings", "grids", "store"},
        "recommending": {"findings", "proposing", "store"},
        "": set(),
    },
    "assembly": {
        "asking": set(),
        "curating": {"", "parts", "runs"},
        "parts": {"", "asking", "runs"},
        "planning": {"", "parts", "runs"},
        "projects": {"", "parts", "planning"},
        "runs": {""},
        "searching": {"", "parts", "runs"},
        "served": {"", "asking", "parts", "runs"},
        "watching": set(),
        "": {"parts", "planning", "runs"},
    },
}
MAX_PARAMETERS = 8
# Formulas of the losses read two models' rows, heads and biases: grouped, each would take them apart again.
MANY_PARAMETERS = {
    "losses/checks.py": {"check_head_inputs"},
    "losses/dbild.py": {"dbild_loss"},
    "losses/head_loss.py": {"head_loss"},
    "losses/kernels/row_torch.py": {"torch_rows"},
    "losses/kernels/row_triton.py": {"triton_rows"},
    "losses/kernels/row_kernel.py": {"gradient", "mixture", "statistics"},
    "losses/kernels/row_std.py": {"along", "spread"},
    "losses/kernels/row_tail.py": {"tail"},
    "losses/reference.py": {"dbild_loss", "head_loss", "relation_rows"},
    "losses/reference_top_k.py": {"top_k_head_loss"},
    "losses/relation.py": {"relation_rows"},
    "losses/top_k.py": {"top_k_head_loss"},
    "losses/tuning/information.py": {"conditional_information_by_chunk"},
}
MAX_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Modules that a file imports, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.names[0].name != "*", f"line {node.lineno}: no star imports"
            found.append((node.module or "", node.lineno))
            if node.module == "llava_kd":
                found += [(f"llava_kd.{a.name}", node.lineno) for a in node.names if a.name[0] != "_"]
    return found


def _first_line(function: ast.FunctionDef) -> int:
    """A Triton kernel's two dozen pointers and strides, one a line, are not counted."""
    is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
    return function.body[0].lineno if is_kernel else function.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    room = room_of(path)
    assert text.isascii(), f"{path}: ASCII only"
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines; split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or 0) - _first_line(node) + 1
            assert size <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {size} lines; split it"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            stages = {"dpt", "sft", "dft"} & set(node.value.lower().split())
            assert not stages, f"{path}:{node.lineno} names a stage {stages}; stages are YAML files"
    if room == "__init__":
        return
    for module, line in imports(tree):
        assert module not in MOVED, f"{path}:{line}: {module} is now {MOVED[module]}"
        if module.startswith("llava_kd."):
            other = module.split(".")[1]
            allowed = ROOMS[room] | {room}
            assert other in allowed, f"{path}:{line} imports {other}; {room} may import {sorted(allowed)}"
        top = module.split(".")[0]
        assert top != "draccus" or room == "config", f"{path}:{line}: only config imports draccus"
        if room == "losses":
            known = {"torch", "triton", "llava_kd", *sys.stdlib_module_names}
            assert top in known, f"{path}:{line}: losses import only torch and triton, not {top}"


def sub_room_of(module: str, room: str) -> str:
    """Of `llava_kd.room.sub_room.file`; "" for a file that stands in the room itself."""
    parts = module.split(".")[2:]
    return parts[0] if parts and parts[0] in FLOORS[room] else ""


@pytest.mark.parametrize("room", FLOORS)
def test_arrows_inside_a_room_go_down(room: str) -> None:
    found = {p.name for p in (PACKAGE / room).iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert found == FLOORS[room].keys() - {""}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        own = sub_room_of(".".join(path.relative_to(ROOT).parts), room)
        for module, line in imports(ast.parse(path.read_text())):
            if module.startswith(f"llava_kd.{room}."):
                other = sub_room_of(module, room)
                allowed = FLOORS[room][own] | {own}
                where = f"{path}:{line} imports from {other or room}"
                assert other in allowed, f"{where}; {own or room} may from {allowed}"


# Files that write, move or sync past the one writer: what is made in a folder that is put in place as a
# whole, what is moved aside to be removed, what is made anew, and a file that its reader opens at once.
PAST_THE_WRITER = {
    "assembly/ablate.py": {"write_text"},
    "assembly/projects/init.py": {"write_text"},
    "assembly/projects/own_data.py": {"write_text"},
    "assembly/runs/run_dir.py": {"rename"},
    "assembly/searching/search.py": {"write_text"},
    "data/shapes/writing.py": {"write_bytes", "write_text"},
    "data/sources/cache.py": {"rename", "write_text"},
    "durable.py": {"fsync", "rename", "replace"},
    "models/files/checkpoint.py": {"write_text"},
    "models/files/export.py": {"write_text"},
    "models/files/gguf/exporting.py": {"write_text"},
    "models/files/gguf/writing.py": {"fsync"},
    "models/files/older_tools.py": {"replace", "write_text"},
    "training/checkpoint.py": {"rename", "write_text"},
}


def writes(tree: ast.AST) -> set[str]:
    """Methods that put a file in its place; `replace` of a text has two arguments."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        is_move = name == "replace" and owner != "dataclasses" and (owner == "os" or len(node.args) == 1)
        if is_move or name in ("fsync", "rename", "write_bytes", "write_text"):
            found.add(name)
    return found


def test_there_is_one_writer_of_files_that_must_last() -> None:
    found = {str(path.relative_to(PACKAGE)): writes(ast.parse(path.read_text())) for path in FILES}
    assert {file: names for file, names in found.items() if names} == PAST_THE_WRITER


def test_a_folder_is_no_heap() -> None:
    for folder in {path.parent for path in FILES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MAX_FILES, f"{folder} has {len(files)} files; give some a room of their own"


def wide_functions(tree: ast.AST) -> set[str]:
    """Public functions, methods and constructors with too many parameters."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([name for name in names if name not in ("self", "cls")]) > MAX_PARAMETERS:
            found.add(node.name)
    return found


def test_no_public_function_takes_many_parameters_and_no_exception_is_left_over() -> None:
    found = {str(path.relative_to(PACKAGE)): wide_functions(ast.parse(path.read_text())) for path in FILES}
    assert {file: names for file, names in found.items() if names} == MANY_PARAMETERS
    assert all(file.startswith("losses/") for file in MANY_PARAMETERS)


def test_a_planted_wide_constructor_is_found() -> None:
    many = ", ".join("abcdefghi")
    tree = ast.parse(f"class A:\n    def __init__(self, {many}): ...\n    def _own(self, {many}): ...")
    assert wide_functions(tree) == {"__init__"}


@pytest.mark.parametrize("folder", ["data", "eval"])
def test_top_level_script_folders_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_stage_scripts_carry_no_hyperparameter() -> None:
    for script in sorted((ROOT / "scripts").glob("stage*.sh")):
        text = script.read_text()
        assert f"{script.stem}.yaml" in text
        assert not any(word in text for word in ("lr", "batch", "weight")), script


def test_a_planted_back_import_is_found() -> None:
    tree = ast.parse("from llava_kd.training.trainer import Trainer")
    assert [module for module, _ in imports(tree)] == ["llava_kd.training.trainer"]
    assert "training" not in ROOMS["losses"]
