"""The photographs that the benchmarks measure with: a folder of WebDataset tars, and what is made of it."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

DEFAULT_PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"


def add_photos(parser: argparse.ArgumentParser) -> None:
    """The option --photos, a folder that is there."""
    parser.add_argument("--photos", type=_folder, default=str(DEFAULT_PHOTOS), help="a folder of WebDataset tars")


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is absent; required: a folder of WebDataset tars. Name one")
    return Path(text)


def read_tar(path: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member."""
    from pipeline.disk import Disk
    from pipeline.tar import Stream, members

    store = Disk()
    with Stream(store, store.head(str(path))) as stream:
        return [(member.name, bytes(member.read())) for member in members(stream)]


def photographs(folder: Path, most: int | None = None) -> list[bytes]:
    """The encoded images of a folder of tars, the first `most` of them."""
    found = (data for tar in sorted(folder.glob("*.tar")) for name, data in read_tar(tar) if name.endswith(".jpg"))
    return list(itertools.islice(found, most))


def repeated(photos: Path, copies: int, change: Callable[[bytes], bytes] = bytes) -> Iterator[tuple[str, bytes, int]]:
    """Every tar `copies` times under other keys, its images changed: (file name, tar, images in it)."""
    from shards import tar_bytes

    for tar in sorted(photos.glob("*.tar")):
        inside = read_tar(tar)
        for copy in range(copies):
            members = {f"c{copy}-{name}": change(data) if name.endswith(".jpg") else data for name, data in inside}
            yield f"{copy}-{tar.name}", tar_bytes(members), sum(name.endswith(".jpg") for name in members)


def copy_tars(photos: Path, folder: Path, copies: int) -> int:
    """Writes them into a new folder; the number of images."""
    folder.mkdir()
    images = 0
    for name, data, count in repeated(photos, copies):
        (folder / name).write_bytes(data)
        images += count
    return images
