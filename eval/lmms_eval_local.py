"""Write a task file that makes lmms-eval read a benchmark from disk instead of from the Hub.

    /path/to/lmms/bin/python eval/lmms_eval_local.py --task mme --dataset DIR --out tasks

DIR is what `datasets.DatasetDict.save_to_disk` wrote (download it once with
`datasets.load_dataset("lmms-lab/MME").save_to_disk(DIR)`). The new task is called `mme_local`;
eval/lmms_eval.sh finds it in the --out folder. Run with the Python of the environment that has lmms-eval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lmms_eval


def built_in(task: str) -> Path:
    """The file of lmms-eval that defines a task."""
    folder = Path(lmms_eval.__file__).parent / "tasks"
    wanted = (f"task: {task}", f'task: "{task}"', f"task: '{task}'")
    for path in sorted(folder.rglob("*.yaml")):
        if any(line.strip() in wanted for line in path.read_text(encoding="utf-8").splitlines()):
            return path
    raise SystemExit(f"lmms-eval has no task {task!r}; `python -m lmms_eval --tasks list` lists them")


def local_task(task: str, dataset: Path) -> str:
    """The task file: everything from the built-in one, but the data from disk."""
    # lmms-eval resolves `include` by absolute path; `token` would ask the Hub for one.
    return (
        f"include: {built_in(task)}\n"
        f"task: {task}_local\n"
        f"dataset_path: {dataset.resolve()}\n"
        "dataset_name: null\n"
        "dataset_kwargs:\n"
        "  load_from_disk: true\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="a task of lmms-eval, for example mme")
    parser.add_argument("--dataset", required=True, type=Path, help="folder written by save_to_disk")
    parser.add_argument("--out", required=True, type=Path, help="folder for the task file")
    arguments = parser.parse_args()
    if not (arguments.dataset / "dataset_dict.json").is_file():
        raise SystemExit(
            f"{arguments.dataset} holds no DatasetDict (dataset_dict.json); write it with save_to_disk"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.task}_local.yaml"
    path.write_text(local_task(arguments.task, arguments.dataset), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
