"""Draw the pictures and write the records: captions, instructions, text, and two test files.

python examples/emoji/make_data.py --cache DIR --out DIR --things 60 --size 84 [--licences all]

    OUT/captions.json       a caption a drawing, of the artists and things to train on
    OUT/instructions.json   questions about them
    OUT/text.json           questions without a picture
    OUT/test.json           the same things, drawn by an artist that no training sees
    OUT/new_things.json     things that no training sees, by all artists
    OUT/facts.json          counts, and what did not render
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from draw import draw
from fetch import Package, read_packages
from talk import captions, questions, split, texts
from things import Thing, chosen, held_out, read_artist, read_things


def _folders(cache: Path, packages: list[Package], role: str) -> list[tuple[str, Path]]:
    found = [(p.name.rpartition("/")[2], cache / p.folder) for p in packages if p.role == role]
    return [(name, folder) for name, folder in found if folder.is_dir()]


def read_cache(cache: Path, licences: str) -> tuple[list[Thing], list, str]:
    """Things, artists (the one to test on last) and that one's name."""
    packages = read_packages(licences=licences)
    names = _folders(cache, packages, "names")
    tests = _folders(cache, packages, "test_artist")
    if not names or not tests:
        raise ValueError(f"{cache} lacks the names or the drawings to test on: run fetch.py first")
    words = [folder / "package/dist/emoji-en-US.json" for _, folder in _folders(cache, packages, "keywords")]
    things = read_things(names[0][1] / "package/data-by-emoji.json", words[0] if words else None)
    sets = [*_folders(cache, packages, "artist"), *tests]
    return things, [read_artist(folder, name) for name, folder in sets], tests[0][0]


def make(cache: Path, out: Path, *, count: int, size: int, licences: str, seed: int) -> dict[str, object]:
    """Write everything; the facts. What two calls with the same arguments write is the same."""
    things, artists, test_artist = read_cache(cache, licences)
    picked = chosen(things, artists, count)
    unseen = held_out(picked)
    drawings, faults = draw(picked, artists, out, size)
    parts = split(drawings, test_artist, unseen)
    rng = random.Random(seed)
    names = {thing.name for thing in unseen}
    files = {
        "captions": captions(parts.train),
        "instructions": questions(parts.train, (), rng, yes_and_no=True),
        "text": texts([thing for thing in picked if thing.name not in names], unsaid=names),
        "test": questions(parts.new_artist, parts.train, rng, yes_and_no=False),
        "new_things": questions(parts.new_things, (), rng, yes_and_no=False),
    }
    files["new_things"] = [r for r in files["new_things"] if r["type"] != "name"]
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    facts: dict[str, object] = {
        "artists": [artist.name for artist in artists],
        "test artist": test_artist,
        "things": len(picked),
        "unseen things": sorted(names),
        "pictures": len(drawings),
        "records": {name: len(records) for name, records in files.items()},
        "not rendered": faults,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", type=int, default=60)
    parser.add_argument("--size", type=int, default=84)
    parser.add_argument("--licences", choices=["permissive", "all"], default="permissive")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    try:
        facts = make(a.cache, a.out, count=a.things, size=a.size, licences=a.licences, seed=a.seed)
    except ValueError as error:
        sys.exit(f"{error}")
    faults = facts.pop("not rendered")
    assert isinstance(faults, list)
    print(json.dumps(facts))
    print(f"{len(faults)} drawings left out" + "".join(f"\n  {line}" for line in faults))


if __name__ == "__main__":
    main()
