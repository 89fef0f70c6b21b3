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
from pipeline.prepare.data import MAX_PIXELS, NO_LABEL, LeftOut, class_index, has_labels, image_rows, judged, label_texts
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
    unlabelled: bool = False,
    shelf: Shelf = IN_MEMORY,
    name: str = "train",
) -> Found:
    """Every sound image of `wanted`, put on the `shelf` under a `name`, or found there. One that cannot be decoded is left out,
    and without `unlabelled` one without a label is too. `label` None: there are none to look for. As many processes look at them
    as torch has threads.

    Raises InputError for an input that cannot be read, JobError when nothing is left, and when the shelf has not room for all.
    """
    if (standing := shelf.standing(name)) is not None:
        return standing
    with shelf.place(name, wanted) as place:
        found = place.found(_put(wanted, place, label=label, label_key=label_key, unlabelled=unlabelled))
        if not found.texts:
            what = "sound image" if unlabelled else "sound image with a label"
            got = f"{', '.join(wanted.uris)}: no {what}" + (f"; left out: {found.left_out}" if found.left_out.counts else "")
            where = f", their labels in {label}" + (f" under {label_key}" if label_key else "") if label else ""
            need = "images to train on" + where
            raise JobError(got, need=need, do="Check the URI and the label's name")
    return found


def _put(wanted: Input, place: Place, *, label: str | None, label_key: str | None, unlabelled: bool) -> LeftOut:
    """All that are to be had in their place; which are not."""
    if label is not None and unlabelled and not has_labels(wanted, label):
        label = None
    left_out = LeftOut()
    for table in judged(image_rows(wanted, label=label, label_key=label_key), processes=torch.get_num_threads()):
        left_out.add_failed(table)
        keep = pc.is_null(table["error_class"]).to_numpy()
        named = label_texts(table[label]) if label else [None] * table.num_rows
        if not unlabelled:
            bare = keep & [text is None for text in named]
            left_out.add("NO_LABEL", table["key"].filter(pa.array(bare)).to_pylist())
            keep &= ~bare
        texts = [named[number] for number in np.flatnonzero(keep).tolist()]
        place.add(table["source"][0].as_py(), table["bytes"].filter(pa.array(keep)), texts)
    return left_out


def find_classes(texts: list[str | None], given: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    """The classes of labels: those `given`, or the labels found, numbers by size and names by alphabet. Raises JobError for one
    class only, for a label outside of those given, and for JSON objects."""
    found = {text for text in texts if text is not None}
    if given:
        class_index(sorted(found), given, where=where)
    elif objects := [text for text in found if text.startswith("{")]:  # of img2dataset and its like; each is another one
        do = "Set data.label_key to the key of the class in it"
        raise JobError(f"{where}: a label is {min(objects)[:60]}", need="the name of a class, or its number", do=do)
    numeric = all(text.isascii() and text.isdigit() for text in found)
    classes = given or tuple(sorted(found, key=lambda text: (int(text), text) if numeric else (0, text)))
    if len(found) == 1:
        raise JobError(f"{where}: every label is {min(found)}", need="two classes or more", do="Add images of other classes")
    return classes


def fitting(texts: list[str | None], classes: tuple[str, ...]) -> tuple[str, ...]:
    """`classes` when the labels are those and all of those, by name or by number; else none."""
    try:
        found = class_index(sorted({text for text in texts if text is not None}), classes, where="")
    except JobError:
        return ()
    return classes if len(np.unique(found)) == len(classes) else ()


def labelled(found: Found, classes: tuple[str, ...], *, where: str) -> Images:
    """The images with the numbers of their classes. Raises JobError for a label outside `classes`."""
    return Images(found.encoded, class_index(found.texts, classes, where=where))


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


def _lot(image: memoryview, key: bytes) -> int:
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
