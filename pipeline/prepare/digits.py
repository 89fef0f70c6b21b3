"""scikit-learn's 1,797 handwritten digits as WebDataset shards: half to train on, half to label, with broken images among them.

The digits ship inside scikit-learn, so a first run needs no network and no account. 8 × 8 pixels of 17 greys are scaled up to
32 × 32 and stored as people store images: grey and colour JPEG, and PNG. The broken ones carry no truth; each is one way in which
a collection of files goes wrong, named by the failure class it must end in. The same seed gives the same bytes, as long as
Pillow's encoders stay the same. The price: importing scikit-learn takes 9 s of a core.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.rows import Failure

CLASSES = tuple("0123456789")
EDGE = 32  # pixels; four times the original, so a JPEG block is not one pixel of the digit
_TRAIN_SHARDS, _LABEL_SHARDS = 2, 6
_FORMATS = ("grey.jpg", "colour.jpg", "png")

Member = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Digits:
    """What was packed, and where. `broken` says the failure class of each broken image by its key."""

    train: Path
    label: Path
    train_images: int
    label_images: int
    broken: Mapping[str, Failure]


def pack_digits(folder: Path, *, seed: int = 0) -> Digits:
    """Write `train/` and `label/` below `folder`: tars of `<key>.jpg` or `.png` and, but for broken images, `<key>.cls`.

    `label_images` counts the broken ones too. The same seed gives the same bytes.
    """
    greys, truth = _load_digits()
    order = np.random.default_rng(seed).permutation(len(greys))
    half = len(order) // 2
    train, label = ([_sample(int(i), greys[i], int(truth[i])) for i in part] for part in (order[:half], order[half:]))
    broken = list(_broken(greys[order[0]]))
    step = len(label) // len(broken)
    for number, (key, suffix, _, data) in enumerate(broken):  # one or two in every shard
        label.insert(number * (step + 1) + step // 2, [(f"{key}.{suffix}", data)])
    _write_shards(folder / "train", train, shards=_TRAIN_SHARDS)
    _write_shards(folder / "label", label, shards=_LABEL_SHARDS)
    failures = {key: failure for key, _, failure, _ in broken}
    return Digits(folder / "train", folder / "label", len(train), len(label), failures)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] of 0..255, and the digits int [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def _sample(number: int, grey: np.ndarray, digit: int) -> list[Member]:
    """Image and truth of one digit; the formats take turns."""
    key, kind = f"{number:04d}", _FORMATS[number % len(_FORMATS)]
    return [(f"{key}.{kind.rpartition('.')[2]}", _encode(grey, kind)), (f"{key}.cls", CLASSES[digit].encode())]


def _encode(grey: np.ndarray, kind: str) -> bytes:
    image = Image.fromarray(grey).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    if kind == "png":
        image.save(sink, "PNG")
    else:
        image.convert("RGB" if kind == "colour.jpg" else "L").save(sink, "JPEG", quality=95)
    return sink.getvalue()


def _broken(grey: np.ndarray) -> Iterator[tuple[str, str, Failure, bytes]]:
    """(key, suffix, failure class, content) of images that must not get a label."""
    jpeg, png = _encode(grey, "grey.jpg"), _encode(grey, "png")
    scan = jpeg.index(b"\xff\xda") + 10  # the pixels start here
    middle = (scan + len(jpeg)) // 2
    yield "broken-empty", "jpg", Failure.NOT_AN_IMAGE, b""
    yield "broken-cut", "jpg", Failure.TRUNCATED, jpeg[:middle]
    yield "broken-page", "jpg", Failure.NOT_AN_IMAGE, b"<!DOCTYPE html><title>404 Not Found</title>\n"
    yield "broken-flipped", "png", Failure.CORRUPT, _flipped(png, png.index(b"IDAT") + 12, 16)
    yield "broken-huge", "png", Failure.TOO_LARGE, _claims(png, 60_000)
    yield "broken-vector", "png", Failure.UNSUPPORTED_FORMAT, b'<svg xmlns="http://www.w3.org/2000/svg"/>\n'


def _flipped(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start : start + count]) + data[start + count :]


def _claims(png: bytes, edge: int) -> bytes:
    """The PNG with a sound header that says edge × edge pixels: a decompression bomb by its look."""
    header = b"IHDR" + struct.pack(">II", edge, edge) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _write_shards(folder: Path, samples: Sequence[Sequence[Member]], *, shards: int) -> None:
    """Samples in their order, spread evenly over `shards` tars; owner, times and modes fixed so that bytes repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [len(samples) * shard // shards for shard in range(shards + 1)]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in (member for sample in samples[bounds[shard] : bounds[shard + 1]] for member in sample):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
