"""Members of a WebDataset tar → image rows, each with what is kept of its sidecars.

A sample's images wait for its sidecars, which may come behind them. Whoever packs frames as `clip.0001.jpg` makes one sample of
the whole tar: where nothing is kept no image waits, and else no more than SAMPLE_BYTES of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipeline.cut import IMAGE_SUFFIXES
from pipeline.errors import JobError
from pipeline.rows import Failure
from pipeline.tar import Member, Stream, members

SAMPLE_BYTES = 256 * 2**20  # no sample of one thing seen is as large; a reader holds it beside its 40 MiB
_LINK = "a link, whose bytes stand elsewhere; pack the tar with --dereference --hard-dereference"

Row = dict[str, object]


def image_rows(stream: Stream, keep: tuple[str, ...], max_bytes: int, imageless: Counter[str]) -> Iterator[Row]:
    """One row per image member. Members of one sample (same path up to the first dot of the name) stand together, sidecars before
    or after their image. `a.jpg` has key `a`; `a.left.jpg` is an image too, with key `a.left`, so no image vanishes.

    In the end `imageless` hears how many samples have no image at all, by the suffix of their first member. Raises ShardError,
    and JobError for a sidecar whose image could not wait for it."""
    seen, sample = set[str](), _Sample("", keep)
    kinds, with_images = dict[str, str](), set[str]()
    for member in members(stream):
        folder, _, base = member.name.rpartition("/")
        if base.startswith("._"):  # what macOS adds
            continue
        stem = (f"{folder}/" if folder else "") + base.partition(".")[0]
        if stem != sample.name:
            yield from sample.rows()
            sample = _Sample(stem, keep)
        bare, dot, suffix = base.rpartition(".")
        if bare or not dot:  # a hidden file is no sample
            kinds.setdefault(stem, suffix.lower() if dot else "")
        if dot and suffix.lower() in IMAGE_SUFFIXES:
            if sample.size >= SAMPLE_BYTES or not keep:
                yield from sample.rows()
            key = member.name.rpartition(".")[0] if bare else member.name
            sample.add(_row(member, key, seen, max_bytes))
            seen.add(key)
            with_images.add(stem)
        elif member.size is not None and (suffix in keep or member.name[len(stem) + 1 :] in keep):
            sample.add_sidecar(member)
    yield from sample.rows()
    imageless.update(kind for stem, kind in kinds.items() if stem not in with_images)


def _row(member: Member, key: str, seen: set[str], max_bytes: int) -> Row:
    row: Row = {"key": key, "source": member.stream.item.uri}
    if key in seen:
        return row | {"error_class": Failure.DUPLICATE_KEY, "error": f"{member.name}: the shard has this key already"}
    if member.size is None:
        return row | {"error_class": Failure.NULL_IMAGE, "error": f"{member.name}: {_LINK}"}
    return row | (too_large(member.size, max_bytes) or {"bytes": member.read()})


def too_large(size: int | None, max_bytes: int) -> Row:
    """What such an image's row says; empty for one that may be read."""
    if size is None or size <= max_bytes:
        return {}
    return {"error_class": Failure.TOO_LARGE, "error": f"{size:,} bytes, limits.max_bytes is {max_bytes:,}"}


class _Sample:
    """Images that wait, and the sidecars so far."""

    def __init__(self, name: str, keep: tuple[str, ...]) -> None:
        self.name, self.size = name, 0
        self._keep = keep
        self._images: list[Row] = []
        self._sidecars: dict[str, str] = {}
        self._missed: set[str] = set()

    def add(self, row: Row) -> None:
        self._images.append(row)
        data = row.get("bytes")
        self.size += len(data) if isinstance(data, memoryview) else 0

    def add_sidecar(self, member: Member) -> None:
        if member.name in self._missed:
            got = (
                f"{member.stream.item.uri}: {member.name} comes after more than {SAMPLE_BYTES >> 20} MiB of images of its sample"
            )
            do = "Name the images apart up to their first dot, or leave the sidecar out of input.keep"
            raise JobError(got, need="sidecars beside their images", do=do)
        self._sidecars[member.name] = bytes(member.read()).decode("utf-8", "replace").strip("\r\n")

    def rows(self) -> Iterator[Row]:
        """The images that waited, which wait no longer: each with its own sidecars, or those of the whole sample."""
        images, self._images, self.size = self._images, [], 0
        for row in images:
            for name in self._keep:
                for place in (f"{row['key']}.{name}", f"{self.name}.{name}"):
                    if place in self._sidecars:
                        row[name] = self._sidecars[place]
                        break
                    self._missed.add(place)
            yield row
