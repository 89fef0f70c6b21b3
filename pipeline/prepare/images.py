"""Images to train on: held encoded, decoded and changed at random on every visit, so a random crop has the whole picture.

What a visit draws depends on (seed, epoch, image) and on nothing else: not on how many workers or loaders there are, nor on
whether the training was killed and goes on. The price: every worker has all of its data set on a `shelf`, 110 kB a photograph,
100,000 photographs in 11 GB, and no more than that, for a split is two lists of positions; and a decode of 1.4 ms for each visit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, TensorDataset

from pipeline.decode import decode
from pipeline.errors import JobError
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.augment import Augmentation
from pipeline.prepare.data import (
    MAX_PIXELS,
    NO_LABEL,
    LeftOut,
    class_index,
    has_labels,
    image_rows,
    known_labels,
    label_texts,
    with_failures,
)
from pipeline.prepare.shelf import IN_MEMORY, Found, Place, Shelf
from pipeline.preprocess import Prepare
from pipeline.spec import Input

_PRIME = 1_000_003


@dataclass(frozen=True)
class Images:
    """Sound images, encoded, and their classes: int64 [N], NO_LABEL where there is none. `where` are their positions in
    `encoded`, int64 [N], all of it when absent; so images that are dealt out in two are in memory once."""

    encoded: pa.ChunkedArray
    labels: np.ndarray
    where: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> memoryview:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return memoryview(self.encoded[index if self.where is None else int(self.where[index])].as_buffer())

    def take(self, where: np.ndarray) -> Images:
        """The images at the positions `where`."""
        return Images(self.encoded, self.labels[where], where if self.where is None else self.where[where])


def read_images(
    wanted: Input,
    *,
    label: str | None,
    label_key: str | None = None,
    classes: tuple[str, ...] = (),
    unlabelled: bool = False,
    shelf: Shelf = IN_MEMORY,
) -> Found:
    """Every sound image of `wanted`, put on the `shelf`, or found there. One that cannot be decoded is left out, and without
    `unlabelled` one without a label is too. `label` None: there are none to look for; `classes` empty: any will do. As many
    processes look at them as torch has threads.

    Raises InputError for an input that cannot be read, JobError for a label that is none of the `classes`, when nothing is left,
    and when the shelf has not room for all.
    """
    if (standing := shelf.standing()) is not None:
        return standing
    if label is not None and unlabelled and not has_labels(wanted, label):
        label = None
    with shelf.place(wanted) as place:
        found = place.found(_put(wanted, place, label=label, label_key=label_key, classes=classes, unlabelled=unlabelled))
        if not found.texts:
            what = "sound image" if unlabelled else "sound image with a label"
            got = f"{', '.join(wanted.uris)}: no {what}" + (f"; left out: {found.left_out}" if found.left_out.counts else "")
            where = f", their labels in {label}" + (f" under {label_key}" if label_key else "") if label else ""
            need = "images to train on" + where
            raise JobError(got, need=need, do="Check the URI and the label's name")
    return found


def _put(
    wanted: Input, place: Place, *, label: str | None, label_key: str | None, classes: tuple[str, ...], unlabelled: bool
) -> LeftOut:
    """All that are to be had in their place; which are not."""
    left_out = LeftOut()
    for table in with_failures(image_rows(wanted, label=label, label_key=label_key), processes=torch.get_num_threads()):
        left_out.add_failed(table)
        sound = table.filter(pc.is_null(table["error_class"]))
        texts: list[str | None] = label_texts(sound[label]) if label else [None] * sound.num_rows
        if label and classes:
            class_index(sound, label, classes, key=label_key)
        if not unlabelled:
            named = pa.array([text is not None for text in texts], pa.bool_())
            left_out.add("NO_LABEL", sound["key"].filter(pc.invert(named)).to_pylist())
            sound, texts = sound.filter(named), [text for text in texts if text is not None]
        place.add(table["source"][0].as_py(), sound["bytes"], texts)
    return left_out


def find_classes(texts: list[str | None], given: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    """The classes of labels: those `given`, or the labels found, numbers by size and names by alphabet. Raises JobError for one
    class only, and for JSON objects."""
    found = {text for text in texts if text is not None}
    if not given and (objects := [text for text in found if text.startswith("{")]):  # of img2dataset and its like: all differ
        do = "Set data.label_key to the key of the class in it"
        raise JobError(f"{where}: a label is {min(objects)[:60]}", need="the name of a class, or its number", do=do)
    numeric = all(text.isascii() and text.isdigit() for text in found)
    classes = given or tuple(sorted(found, key=lambda text: (int(text), text) if numeric else (0, text)))
    if len(found) == 1:
        raise JobError(f"{where}: every label is {min(found)}", need="two classes or more", do="Add images of other classes")
    return classes


def fitting(texts: list[str | None], classes: tuple[str, ...]) -> tuple[str, ...]:
    """`classes` when the labels are those and all of those, by name or by number; else none."""
    known = known_labels(classes)
    found = {known.get(text, NO_LABEL) for text in texts if text is not None}
    return classes if found == {*range(len(classes))} else ()


def labelled(found: Found, classes: tuple[str, ...]) -> Images:
    """The images with the numbers of their classes, all of which are known."""
    known = known_labels(classes)
    return Images(found.encoded, np.array([NO_LABEL if text is None else known[text] for text in found.texts], dtype=np.int64))


def split(images: Images, share: float, *, seed: int) -> tuple[Images, Images]:
    """(training, validation) images, disjoint, at random; of every class about `share` goes to validation, but not its last one,
    and at least one image in all; what is rounded off one class is the next one's. Images without a label are all to train on,
    unless not one has a label.

    The lot is drawn from an image's own bytes. So hardly one moves when shards come or go or are packed anew, and who trains on
    from last week's model does not validate with what that has learned; and copies of an image are on one side."""
    key = seed.to_bytes(4)
    lots = np.array([_lot(images[row], key) for row in range(len(images))], dtype=np.uint64)
    order = np.argsort(lots, kind="stable")
    labels, lots = images.labels[order], lots[order]
    if (labels == NO_LABEL).all():
        labels = np.zeros_like(labels)
    held = np.zeros(len(order), dtype=bool)
    seen = due = 0
    for value in np.unique(labels[labels != NO_LABEL]):
        mine = np.flatnonzero(labels == value)
        seen += len(mine)
        count = min(round(seen * share) - due, len(mine) - 1)
        due += count
        held[mine[: np.searchsorted(lots[mine], lots[mine[count]])]] = True  # but no copy of the first one that stays
    if not held.any():
        held[np.flatnonzero(labels != NO_LABEL)[:1]] = True
    return images.take(np.sort(order[~held])), images.take(np.sort(order[held]))


def overlap(train: Images, held: Images) -> int:
    """How many images of `held` are among `train` too, byte for byte; 0.14 ms of a core for each photograph of both."""
    seen = {_lot(train[row]) for row in range(len(train))}
    return sum(_lot(held[row]) in seen for row in range(len(held)))


def _lot(image: memoryview, key: bytes = b"") -> int:
    return int.from_bytes(blake2b(image, digest_size=8, key=key).digest())


class EpochDataset(Dataset[tuple[Tensor, int]]):
    """Item (epoch, index) is (pixels uint8 [3, S, S] as `augmentation` makes them in that epoch, class)."""

    def __init__(self, images: Images, augmentation: Augmentation, *, seed: int) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed

    def __getitem__(self, visit: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = visit
        image = decode(self.images[index], max_pixels=MAX_PIXELS)
        with seeded(self.seed, epoch, index):
            return self.augmentation(image), int(self.images.labels[index])


class AtWork(Dataset[tuple[Tensor, int]]):
    """Item (index) is (pixels uint8 [3, S, S] as labelling sees them, class)."""

    def __init__(self, images: Images, preprocessing: Preprocessing) -> None:
        self.images, self.size, self.prepare = images, preprocessing.size, Prepare(preprocessing, MAX_PIXELS)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.prepare(self.images[index])[0]), int(self.images.labels[index])


def in_memory(images: AtWork) -> TensorDataset:
    """The same, decoded once."""
    pixels = torch.empty((len(images), 3, images.size, images.size), dtype=torch.uint8)
    for row in range(len(images)):
        pixels[row] = images[row][0]
    return TensorDataset(pixels, torch.from_numpy(images.images.labels))


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of the visits of one worker: all images in an order of the epoch's own, dealt out to `world` workers; those
    that fill no last step, of `step` images a worker, are other ones in every epoch. The trainer calls `set_epoch`."""

    def __init__(self, count: int, *, step: int, seed: int, rank: int, world: int) -> None:
        self.count, self.step, self.seed, self.rank, self.world = count, step, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.step * self.world) * self.step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)[: len(self) * self.world]
        return ((self.epoch, int(index)) for index in order[self.rank :: self.world])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """torch's random numbers on the CPU as these numbers say, and afterwards as they were."""
    seed = 0
    for number in numbers:
        seed = (seed * _PRIME + number) % 2**63
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
