"""A quick look at a LLaVA dataset: the records that point into each image folder, and whether it is there.

    python data/check_layout.py llava-665k/llava_v1_5_mix665k.json llava-665k/images

For a whole check, that decodes every image, run `llava-kd data verify`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path, PurePosixPath

MANIFEST = Path(__file__).parent / "manifest.json"
SAMPLED = 20


def folder_of(image: str, folders: list[str]) -> str:
    """The known folder that an image lies in, or else its first folder."""
    for folder in folders:
        if image.startswith(f"{folder}/"):
            return folder
    parts = PurePosixPath(image).parts
    return parts[0] if len(parts) > 1 else "."


def check(path: Path, root: Path) -> list[str]:
    """Problems found; prints a line for each folder."""
    known = json.loads(MANIFEST.read_text()).get(path.name)
    expected: dict[str, int] = {} if known is None else known["records"]
    folders = [folder for names in expected for folder in names.split(", ")]
    counts: Counter[str] = Counter()
    samples: dict[str, list[str]] = {}
    for entry in json.loads(path.read_bytes()):
        image = entry.get("image")
        folder = folder_of(image, folders) if isinstance(image, str) else "no image"
        counts[folder] += 1
        if isinstance(image, str) and len(samples.setdefault(folder, [])) < SAMPLED:
            samples[folder].append(image)
    problems = []
    for folder, count in sorted(counts.items()):
        missing = [image for image in samples.get(folder, []) if not (root / image).is_file()]
        print(
            f"{folder:24} {count:>9,} records" + (f", {len(missing)} of the first missing" if missing else "")
        )
        problems += [f"{folder}: {image} is missing" for image in missing[:1]]
    for names, number in expected.items():
        found = sum(counts[folder] for folder in names.split(", "))
        if found != number:
            problems.append(f"{names}: {found:,} records, but the published file has {number:,}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="LLaVA JSON file")
    parser.add_argument("images", type=Path, help="image root")
    arguments = parser.parse_args()
    problems = check(arguments.data, arguments.images)
    for problem in problems:
        print(f"problem: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
