"""A damaged or cut tar file is named, whatever bit and wherever: `tarfile` takes it for a shorter one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from llava_kd.data.sources.tar_walk import walk

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture(params=FORMATS)
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "whole.tar", "w", format=request.param) as archive:
        for number in range(60):
            data = rng.bytes(int(rng.integers(0, 1500)))
            member = tarfile.TarInfo(f"{number // 2:04d}.{'json' if number % 2 else 'jpg'}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "whole.tar"


def places(path: Path) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset_data, member.size) for member in walk(path)]


def test_a_whole_file_is_read_as_tarfile_reads_it(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        assert places(shard) == [(m.name, m.offset_data, m.size) for m in archive]


def test_every_flipped_bit_of_a_header_is_named(shard: Path) -> None:
    rng, whole = np.random.default_rng(1), shard.read_bytes()
    headers = [offset - tarfile.BLOCKSIZE for _, offset, _ in places(shard)]
    anywhere = [int(rng.choice(headers) + rng.integers(tarfile.BLOCKSIZE)) for _ in range(300)]
    of_checksum = [headers[9] + byte for byte in range(148, 156) for _ in range(8)]  # which covers not itself
    for number, place in enumerate([*anywhere, *of_checksum]):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << number % 8
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"whole\.tar is not a whole.* after byte \d+: "):
            places(shard)


def test_every_cut_is_named_or_loses_nothing(shard: Path) -> None:
    rng, whole, expected = np.random.default_rng(2), shard.read_bytes(), places(shard)
    end = expected[-1][1] + -(-expected[-1][2] // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    for stop in rng.integers(0, len(whole), 300).tolist():
        shard.write_bytes(whole[:stop])
        if stop >= end + 2 * tarfile.BLOCKSIZE:  # cut within the padding behind the end
            assert places(shard) == expected
            continue
        with pytest.raises(ValueError, match=r"whole\.tar is not a whole.* after byte \d+: "):
            places(shard)
