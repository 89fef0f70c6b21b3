"""Makes small inputs: encoded images, tars, Parquet files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, *, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """A smooth coloured picture, different for every number."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rng = np.random.default_rng(number)
    pixels = np.stack([np.abs(np.sin(3 * (a * x + b * y))) * 255 for a, b in rng.uniform(-2, 2, (3, 2))], axis=-1)
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, kind, quality=90)
    return sink.getvalue()


def is_decoded(data: bytes, *, max_pixels: int = 10**8) -> bool:
    """Does our decoder take it?"""
    from pipeline.decode import BadImage, decode

    try:
        decode(data, max_pixels=max_pixels)
    except BadImage:
        return False
    return True


#: What a clone has in the place of a file until somebody runs `git lfs pull`.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 110000\n" % (b"4d" * 32)


def tar_bytes(members: dict[str, bytes], *, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def write_tars(folder: Path, *, shards: int, images: int, first: int = 0) -> list[str]:
    """`shards` tars of `images` pictures with a .cls sidecar each; the keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    for shard in range(first, first + shards):
        names = [f"{shard:03d}-{number:04d}" for number in range(images)]
        members: dict[str, bytes] = {}
        for number, name in enumerate(names):
            members |= {f"{name}.jpg": picture(1000 * shard + number), f"{name}.cls": b"%d" % (number % 3)}
        (folder / f"{shard:03d}.tar").write_bytes(tar_bytes(members))
        keys += names
    return keys


def write_parquet(path: Path, images: list[bytes | None], *, keys: list[str] | None = None, rows_per_group: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = keys if keys is not None else [f"k{number}" for number in range(len(images))]
    table = pa.table({"key": keys, "image": pa.array(images, pa.binary()), "label": list(range(len(images)))})
    pq.write_table(table, path, row_group_size=rows_per_group)
