"""Images to train on: what is read and left out, who validates, and that a visit's changes follow from its numbers alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import poison
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raylets import below
from seaweed import Seaweed
from shards import tar_bytes
from test_preprocess import MAX_PIXELS, table
from trainings import SMALL, picture, write_shards

from pipeline.careful import CarefulLimits
from pipeline.decode import decode
from pipeline.disk import Disk
from pipeline.errors import (
    InputError,
    InputMissing,
    JobError,
    NightlabelError,
    PermissionDenied,
    StoreError,
    Temporary,
    Unidentified,
)
from pipeline.job.training import Augment, Data
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.augment import Augmentation
from pipeline.prepare.data import NO_LABEL, LeftOut, class_index, has_labels, image_rows
from pipeline.prepare.dataset import read_data, read_taught
from pipeline.prepare.images import (
    EpochDataset,
    EpochSampler,
    Images,
    find_classes,
    fitting,
    labelled,
    read_images,
    seeded,
    split,
)
from pipeline.prepare.look import looked_at
from pipeline.prepare.shelf import Shelf
from pipeline.spec import Input
from pipeline.storage import open_store

STILL = Augment(crop=(1, 1), flip=False)


def picture_of_noise() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (24, 24, 3), dtype=np.uint8)


def some(folder: Path, count: int, *, classes: int = 2) -> Images:
    found = read_images(Input(uri=write_shards(folder, count, classes=classes)), label="cls")
    return labelled(found, tuple(str(number) for number in range(classes)))


def test_what_is_left_out_is_counted_and_listed(tmp_path: Path):
    members = {f"{n}.{suffix}": data for n in range(3) for suffix, data in (("png", picture(n)), ("cls", b" 1\n"))}
    members |= {"3.png": picture(3)}
    members |= {"page.jpg": b"<html>", "page.cls": b"1", "empty.png": b""}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    found = read_images(Input(uri=str(tmp_path)), label="cls")
    assert found.texts == ["1", "1", "1"]
    assert found.left_out.counts == {"NOT_AN_IMAGE": 2, "NO_LABEL": 1}
    assert found.left_out.keys == {"NOT_AN_IMAGE": ["page", "empty"], "NO_LABEL": ["3"]}
    assert str(found.left_out) == "2 NOT_AN_IMAGE (page, empty), 1 NO_LABEL (3)"
    assert [bytes(image.as_buffer()) for image in found.encoded] == [picture(n) for n in range(3)]
    with_unlabelled = read_images(Input(uri=str(tmp_path)), label="cls", unlabelled=True)
    assert with_unlabelled.texts == ["1", "1", "1", None]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_kills_its_decoder_is_left_out_and_its_neighbours_are_not(tmp_path: Path, monkeypatch, threads: int):
    """In whichever process it is looked at; the order stays, and no child is left."""
    poison_of = {7: b"abort", 70: b"hang", 71: b"exit"}
    members = {
        f"{n:03d}.{suffix}": data
        for n in range(200)
        for suffix, data in (("png", poison_of.get(n) or picture(n)), ("cls", b"%d" % n))
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    monkeypatch.setattr("pipeline.prepare.data.see", poison.see)
    monkeypatch.setattr("pipeline.prepare.data._PATIENCE", CarefulLimits(6.0, 2**30))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = read_images(Input(uri=str(tmp_path)), label="cls")
    assert found.texts == [str(n) for n in range(200) if n not in poison_of]
    assert found.left_out.keys == {"DECODER_CRASH": ["007", "071"], "DECODE_TIMEOUT": ["070"]}
    assert not [child for child in below(os.getpid()) if b"pipeline.careful" in Path(f"/proc/{child}/cmdline").read_bytes()]


def shards_of_one_class(folder: Path, sizes: list[int]) -> Input:
    for number, size in enumerate(sizes):
        members = {
            f"{number}_{row}.{name}": data for row in range(size) for name, data in (("png", picture(0)), ("cls", b"%d" % number))
        }
        (folder / f"{number:03d}.tar").write_bytes(tar_bytes(members))
    return Input(uri=str(folder))


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([9, 9, 9, 9], 8, {"0": 2, "1": 2, "2": 2, "3": 2}),
        ([9, 1, 9, 9], 8, {"0": 3, "1": 1, "2": 2, "3": 2}),  # what a small one lacks
        ([2, 2, 2, 2], 100, {"0": 2, "1": 2, "2": 2, "3": 2}),
        ([9, 9, 9, 9], 2, {"0": 1, "2": 1}),
        ([1] * 40, 24, None),
        ([4] * 40, 32, {str(number): 2 for number in [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]}),
    ],
)
def test_a_number_of_images_comes_from_many_shards(tmp_path: Path, sizes: list[int], most: int, expected: dict[str, int] | None):
    wanted = shards_of_one_class(tmp_path, sizes)
    labels = [label for table in image_rows(wanted, label="cls", most=most) for label in table["cls"].to_pylist()]
    assert len(labels) == min(most, sum(sizes))
    assert expected is None or Counter(labels) == expected


def test_a_number_of_loose_images_is_taken_from_the_first_to_the_last(tmp_path: Path):
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    tables = image_rows(Input(uri=str(tmp_path), format="images"), most=5)
    assert [key for table in tables for key in table["key"].to_pylist()] == ["0.png", "2.png", "4.png", "6.png", "8.png"]


def test_loose_images_have_the_label_of_the_folder_that_they_lie_in(tmp_path: Path, s3: Seaweed):
    bucket = f"s3://{s3.bucket()}"
    store = open_store(bucket, s3.options)
    for number, name in enumerate(["rose/a/1.png", "rose/b/1.png", "tulip/1.png", "tulip/2.png", "tulip/broken.jpg"]):
        data = b"hello" if "broken" in name else picture(number)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        assert store.create(f"{bucket}/{name}", data)
    places = {"uri": str(tmp_path)}, {"uri": f"{bucket}/", "s3": s3.options}, {"uri": [f"{tmp_path}/rose", f"{tmp_path}/tulip"]}
    for place in places:
        found = read_images(Input(format="images", **place), label="folder")
        assert (found.texts, found.left_out.counts) == (["a", "b", "tulip", "tulip"], {"NOT_AN_IMAGE": 1}), place
    assert find_classes(found.texts, (), where="x") == ("a", "b", "tulip")


def test_nothing_to_train_on_and_broken_shards_are_one_sentence(tmp_path: Path):
    uri = write_shards(tmp_path / "a", 4, label="none")
    with pytest.raises(
        JobError, match=r"no sound image with a label; left out: 4 NO_LABEL \(0000, 0001, 0002, …\); required: images"
    ):
        read_images(Input(uri=uri), label="cls")
    shard = tmp_path / "a" / "0000.tar"
    shard.write_bytes(shard.read_bytes()[:1100])
    with pytest.raises(InputError, match=r"0000\.tar"):
        read_images(Input(uri=uri), label="cls")


def test_labels_are_found_under_a_key_of_json_objects_and_structs(tmp_path: Path):
    told = [{"class": " cat "}, {"class": 7, "url": "x"}, {"class": None}, {"url": "y"}, {"class": True}, {"class": "Köln"}]
    expected = ["cat", "7", "true", "Köln"]
    members = {}
    for number, each in enumerate(told):
        members |= {f"{number}.png": picture(number), f"{number}.json": json.dumps(each).encode()}
    (tmp_path / "a.tar").write_bytes(tar_bytes({**members, "none.png": picture(9)}))
    found = read_images(Input(uri=str(tmp_path / "a.tar")), label="json", label_key="class")
    assert (found.texts, found.left_out.keys) == (expected, {"NO_LABEL": ["2", "3", "none"]})
    columns = {"key": ["a", "b", "c"], "image": [picture(number) for number in range(3)]}
    meta = pa.array([{"class": 3, "x": "a"}, None, {"class": 4, "x": "b"}])
    pq.write_table(pa.table({**columns, "meta": meta}), tmp_path / "b.parquet")
    found = read_images(Input(uri=str(tmp_path / "b.parquet"), format="parquet"), label="meta", label_key="class")
    assert (found.texts, found.left_out.keys) == (["3", "4"], {"NO_LABEL": ["b"]})
    with pytest.raises(JobError, match=r"no sound image with a label.* their labels in json under clas"):
        read_images(Input(uri=str(tmp_path / "a.tar")), label="json", label_key="clas")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"cat", "is no object"),
        (b"7", "is no object"),
        (b"", "is no object"),
        (b'{"class": "c', "is no object"),
        (b"\xff\xd8", "is no object"),
        (b"[" * 100_000, "is no object"),
        (b'{"class": 1.5}', "has 1.5 as class"),
        (b'{"class": ["cat"]}', r"has \['cat'\] as class"),
    ],
)
def test_a_label_without_its_key_is_one_sentence(tmp_path: Path, content: bytes, what: str):
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.png": picture(0), "a.json": content}))
    need = r"; required: a JSON object or a struct with a name or a number as class\. Correct it, or data\.label_key"
    with pytest.raises(JobError, match=rf"a\.tar: json of a {what}{need}"):
        read_images(Input(uri=str(tmp_path)), label="json", label_key="class")


@pytest.mark.parametrize("error", [Temporary, PermissionDenied, Unidentified, StoreError, InputMissing])
def test_what_the_store_does_is_no_fault_of_the_images(tmp_path: Path, error: type[NightlabelError], monkeypatch):
    """Kubernetes tries what is temporary again, and nothing else."""

    class Away(Disk):
        def read(self, uri: str, **_: Any) -> bytes:
            raise error(f"{uri}: slow down")

    monkeypatch.setattr("pipeline.prepare.data.open_input", lambda _: Away())
    with pytest.raises(NightlabelError, match=r"0000\.tar: slow down") as caught:
        read_images(Input(uri=write_shards(tmp_path, 4)), label="cls")
    assert caught.value.exit_code == error.exit_code


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (pa.array([["a"], ["b"]]), "is list<"),
        (pa.array([{"a": 1}, {"a": 2}]), "is struct<"),
        (pa.array([b"\xff\xd8", b"b"]), "is not UTF-8"),
        (pa.array([b"\xff\xd8", b"b"]).cast(pa.binary()).view(pa.string()), "is not UTF-8"),
    ],
)
def test_labels_that_are_no_text_are_one_sentence(tmp_path: Path, labels: pa.Array, what: str):
    pq.write_table(pa.table({"key": ["a", "b"], "image": [picture(0), picture(1)], "side": labels}), tmp_path / "a.parquet")
    with pytest.raises(JobError) as caught:
        read_images(Input(uri=str(tmp_path), format="parquet"), label="side")
    assert str(caught.value).startswith(f"{tmp_path}/a.parquet: column side {what}")
    assert "; required: labels as text or numbers. Name another column as data.label, or " in str(caught.value)
    assert str(caught.value).endswith(
        "name a key of this one as data.label_key." if "struct" in what else "write this one as text."
    )


@pytest.mark.parametrize("key", [None, "side"])
def test_labels_may_be_of_other_types_from_file_to_file(tmp_path: Path, key: str | None):
    types = [pa.int64(), pa.int32(), pa.string(), pa.null(), pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.int8()]
    for number, kind in enumerate([*types, *types]):
        text = None if kind == pa.null() else str(number % 2) if kind not in {pa.int8(), pa.int32(), pa.int64()} else number % 2
        labels = pa.array([text], kind)
        meta = labels if key is None else pa.StructArray.from_arrays([labels, pa.array([number])], [key, f"more{number}"])
        columns = {"key": [str(number)], "image": [picture(number)], "label": meta}
        pq.write_table(pa.table(columns), tmp_path / f"{number:02d}.parquet")
    wanted = Input(uri=str(tmp_path), format="parquet")
    found = read_images(wanted, label="label", label_key=key)
    assert found.texts == [str(number % 2) for number in range(14) if number % 7 != 3]
    assert found.left_out.keys == {"NO_LABEL": ["3", "10"]}
    assert sum(table.num_rows for table in image_rows(wanted, label="label", label_key=key, most=9)) == 9


def test_classes_are_found_by_size_or_alphabet_and_given_ones_keep_their_order():
    assert find_classes(["10", "9", None, "10"], (), where="x") == ("9", "10")
    assert find_classes(["cow", "ant"], (), where="x") == ("ant", "cow")
    assert find_classes(["cow", "ant"], ("cow", "bee", "ant"), where="x") == ("cow", "bee", "ant")
    with pytest.raises(JobError, match=r"x: every label is cat; required: two classes or more\. Add images of other classes"):
        find_classes(["cat", "cat"], (), where="x")
    with pytest.raises(
        JobError, match=r'x: a label is {"id": 1}; required: the name of a class, or its number\. Set data\.label_key'
    ):
        find_classes(['{"id": 2}', '{"id": 1}'], (), where="x")


def test_classes_are_those_given_else_the_models_if_they_fit_else_those_found(tmp_path: Path):
    two, three = (Input(uri=write_shards(tmp_path / str(n), 40, classes=n, label="name")) for n in (2, 3))
    known = ("right", "left")
    for wanted, named, classes in (
        (two, (), known),
        (three, (), ("left", "right", "top")),
        (two, ("left", "right"), ("left", "right")),
        (two, ("left", "right", "top"), ("left", "right", "top")),
    ):
        data = read_data(Data(train=wanted, classes=named), seed=0, known=known, shelf=Shelf())
        assert data.classes == classes
        for images in data.images:
            bright = [decode(images[row], max_pixels=10**6)[:, :8].mean() > 100 for row in range(len(images))]
            assert wanted is three or [classes[label] == "left" for label in images.labels] == bright
    alike = Data(train=Input(uri=write_shards(tmp_path / "1", 8, classes=1)))
    with pytest.raises(JobError, match="every label is 0; required: two classes or more"):
        read_taught(alike, seed=0, classes=known, shelf=Shelf())


def test_labels_are_looked_for_in_every_parquet_file(tmp_path: Path):
    columns = {"key": ["a"], "image": [picture(0)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    wanted = Input(uri=str(tmp_path), format="parquet")
    assert not has_labels(wanted, "side")
    pq.write_table(pa.table(columns | {"side": ["left"]}), tmp_path / "b.parquet")
    assert has_labels(wanted, "side")
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    assert has_labels(wanted, "side"), "whoever reads it says that it is broken"


def labels_of(*labels: str | None) -> pa.Table:
    """What `class_index` looks at of a table of images: a, b, c, of which all lie in s.tar."""
    keys = [chr(ord("a") + number) for number in range(len(labels))]
    return pa.table({"key": keys, "source": ["s.tar"] * len(labels), "cls": pa.array(labels, pa.string())})


def test_a_label_is_a_name_or_a_number_and_the_name_wins():
    assert class_index(labels_of("cow", "0", None), "cls", ("ant", "cow")).tolist() == [1, 0, NO_LABEL]
    assert class_index(labels_of("1", "0"), "cls", ("1", "0")).tolist() == [0, 1]


def test_a_label_of_no_class_is_told_with_an_image_that_has_it():
    for labels, key, sentence in (
        (("cat", "dog"), None, "s.tar: cls of b is dog; required: one of 2 classes, cat, cow, or its number. Correct the labels"),
        (("cat", None, "2"), None, "s.tar: cls of c is 2; required: one of 2 classes"),
        (("cow", "dog", "ant", "dog", "bee"), None, "s.tar: cls of b is dog, others are ant, bee; required: one of 2 classes"),
        (("dog" * 40,), "side", f"s.tar: cls of a has {'dog' * 20} as side; required: one of 2 classes, cat, cow"),
    ):
        with pytest.raises(JobError) as caught:
            class_index(labels_of(*labels), "cls", ("cat", "cow"), key=key)
        assert str(caught.value).startswith(sentence)
    with pytest.raises(JobError, match=r"is 0; required: one of 6 classes, a, b, c, d, 4, …\. Correct the labels or name"):
        class_index(labels_of("0"), "cls", ("a", "b", "c", "d", "4", "e"))


def test_a_label_of_no_class_ends_the_reading_unless_its_image_is_left_out(tmp_path: Path):
    for number, label in enumerate(("left", "top", "right")):
        members = {"x.png": picture(0), "x.cls": b"left", "broken.png": b"no image", "broken.cls": b"nothing"}
        members |= {"y.png": picture(1), "y.cls": label.encode()}
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    with pytest.raises(JobError, match=rf"^{tmp_path}/1\.tar: cls of y is top; required: one of 2 classes, left, right"):
        read_images(Input(uri=str(tmp_path)), label="cls", classes=("left", "right"))
    assert len(read_images(Input(uri=str(tmp_path)), label="cls").texts) == 6, "any label will do"


def test_labels_to_validate_with_are_classes_of_the_training(tmp_path: Path):
    train, held = write_shards(tmp_path / "in", 8, label="name"), write_shards(tmp_path / "held", 3, classes=3, label="name")
    data = Data(train=Input(uri=train), validation=Input(uri=held))
    with pytest.raises(JobError, match=rf"^{held}/0000\.tar: cls of 0002 is top; required: one of 2 classes, left, right"):
        read_data(data, seed=0, known=(), shelf=Shelf())
    with pytest.raises(JobError, match=rf"^{held}/0000\.tar: cls of 0002 is top; required: one of 2 classes, left, right"):
        read_taught(data, seed=0, classes=("left", "right"), shelf=Shelf())
    with pytest.raises(JobError, match=rf"^{train}/0000\.tar: cls of 0001 is right; required: one of 2 classes, left, top"):
        read_taught(data, seed=0, classes=("left", "top"), shelf=Shelf())


def test_a_name_of_two_classes_is_no_label_but_their_numbers_are():
    """ImageNet's crane is a bird and a machine."""
    classes = ("ant", "crane", "cow", "crane")
    assert class_index(labels_of("cow", "1", "3"), "cls", classes).tolist() == [2, 1, 3]
    with pytest.raises(
        JobError, match=r"s\.tar: cls of b is crane, which names two classes; required: labels that name one\. Give its number"
    ):
        class_index(labels_of("ant", "crane"), "cls", classes)
    with pytest.raises(JobError, match=r"is crane, which names two classes; required: labels that name one\. Rename one of them"):
        class_index(labels_of("crane"), "cls", (*classes, "7"))


@given(st.integers(2, 200), st.integers(2, 5), st.floats(0.05, 0.5), st.integers(0, 9))
def test_split_is_a_partition_with_a_share_of_every_class(count: int, classes: int, share: float, seed: int):
    images = Images(pa.array([str(n).encode() for n in range(count)], pa.large_binary()), np.arange(count) % classes)
    kept, held = split(images, share, seed=seed)
    parts = sorted(bytes(part[row]) for part in (kept, held) for row in range(len(part)))
    assert parts == sorted(images.encoded.to_pylist())
    assert len(held) >= 1
    assert abs(len(held) - count * share) <= 1 + classes
    for value in range(classes):
        mine, taken = int((images.labels == value).sum()), int((held.labels == value).sum())
        assert abs(taken - mine * share) < 1.5 or taken == mine - 1


@pytest.mark.parametrize(
    ("classes", "each", "share", "held"), [(100, 4, 0.1, 40), (2, 2, 0.8, 2), (10, 5, 0.1, 5), (3, 1, 0.9, 1)]
)
def test_small_classes_are_held_back_by_turns(classes: int, each: int, share: float, held: int):
    labels = np.repeat(np.arange(classes), each)
    encoded = pa.array([b"%d" % number for number in range(len(labels))], pa.large_binary())
    kept, chosen = split(Images(encoded, labels), share, seed=0)
    assert len(chosen) == held
    assert each == 1 or len(np.unique(kept.labels)) == classes, "a class has nothing to train on"


def test_images_stay_on_their_side_when_others_come_and_copies_of_one_together():
    def held_of(numbers: list[int]) -> list[bytes]:
        encoded = pa.array([str(number).encode() for number in numbers], pa.large_binary())
        _, held = split(Images(encoded, np.array(numbers) % 2), 0.2, seed=1)
        return [bytes(held[row]) for row in range(len(held))]

    before, packed_anew = set(held_of(list(range(1000)))), held_of(list(range(999, -1, -1)))
    assert set(packed_anew) == before
    after = set(held_of(list(range(1200))))
    moved = {image for image in before ^ after if int(image) < 1000}
    assert len(moved) < 20, "of 200; dealt out anew it would be 320"
    copies = held_of([*range(1000), *range(1000)])
    assert sorted(copies) == sorted([*before, *before])


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.floats(0.05, 0.6), st.integers(0, 9))
def test_no_copy_of_an_image_to_train_on_is_held_back(copies: list[int], share: float, seed: int):
    """However often each is there, as where rare ones are packed several times."""
    numbers = np.repeat(np.arange(len(copies)), copies)
    encoded = pa.array([b"%d" % number for number in numbers], pa.large_binary())
    kept, held = (
        {bytes(part[row]) for row in range(len(part))} for part in split(Images(encoded, numbers % 2), share, seed=seed)
    )
    assert kept
    assert held
    assert not kept & held or len(held) == 1, "unless there is nothing else to validate with"


def test_images_that_are_dealt_out_are_in_memory_once(tmp_path: Path):
    images = some(tmp_path, 64)
    before = pa.total_allocated_bytes()
    kept, held = split(images, 0.25, seed=0)
    first = held.take(np.array([1, 0]))
    assert pa.total_allocated_bytes() == before
    assert [bytes(first[0]), bytes(first[1])] == [bytes(held[1]), bytes(held[0])]
    assert (len(kept), len(held), len(first)) == (48, 16, 2)
    with pytest.raises(IndexError):
        kept[48]


def test_a_list_of_what_is_left_out_is_bounded():
    left_out = LeftOut()
    for number in range(0, 1000, 40):
        left_out.add("TRUNCATED", [str(number + more) for more in range(40)])
    left_out.add("NO_LABEL", [])
    assert str(left_out) == "1,000 TRUNCATED (0, 1, 2, …)"
    left_out.add("CORRUPT", ["a", "b", "c"])
    assert str(left_out) == "1,000 TRUNCATED (0, 1, 2, …), 3 CORRUPT (a, b, c)"
    assert len(left_out.keys["TRUNCATED"]) == 50


def test_labels_fit_classes_that_they_name_all_of():
    for texts, fit in (
        (["cat", "1", None], True),
        (["0", "1"], True),
        (["0"], False),
        (["cat", "dog", "cow"], False),
        (["2"], False),
        ([], False),
    ):
        assert fitting(texts, ("cat", "dog")) == (("cat", "dog") if fit else ())


def test_unlabelled_images_validate_only_when_not_one_has_a_label(tmp_path: Path):
    images = some(tmp_path, 20)
    bare = Images(images.encoded, np.full(20, NO_LABEL))
    assert [len(part) for part in split(bare, 0.2, seed=0)] == [16, 4]
    images.labels[::2] = NO_LABEL
    kept, held = split(images, 0.2, seed=0)
    assert (held.labels != NO_LABEL).all()
    assert (kept.labels == NO_LABEL).sum() == 10


def test_a_visit_follows_from_its_numbers_and_leaves_the_generator_alone(tmp_path: Path):
    images = some(tmp_path, 4)
    visits = EpochDataset(images, Augmentation(SMALL, Augment(crop=(0.3, 1), jitter=0.3)), seed=1)
    state = torch.get_rng_state()
    first, label = visits[0, 2]
    assert (first.shape, first.dtype, label) == ((3, 16, 16), torch.uint8, 0)
    torch.rand(7)
    assert torch.equal(visits[0, 2][0], first)
    assert not torch.equal(visits[1, 2][0], first)
    torch.set_rng_state(state)
    visits[3, 1]
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(5):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_change_is_what_predicting_sees(tmp_path: Path):
    from pipeline.preprocess import Prepare

    wanted = Preprocessing(size=12, crop_pct=0.8, resample="bicubic")
    pixels, _ = EpochDataset(some(tmp_path, 1), Augmentation(wanted, STILL), seed=0)[0, 0]
    assert np.array_equal(pixels.numpy(), Prepare(wanted, 10**6)(picture(0))[0])


def test_a_flip_mirrors_half_and_a_crop_moves(tmp_path: Path):
    images = some(tmp_path, 64, classes=1)  # all bright on the left
    still = EpochDataset(images, Augmentation(SMALL, STILL), seed=0)
    mirrored = EpochDataset(images, Augmentation(SMALL, Augment(crop=(1, 1), flip=True)), seed=0)
    turned = sum(torch.equal(mirrored[0, n][0], still[0, n][0].flip(2)) for n in range(64))
    same = sum(torch.equal(mirrored[0, n][0], still[0, n][0]) for n in range(64))
    assert turned + same == 64
    assert 16 < turned < 48
    cropped = EpochDataset(images, Augmentation(SMALL, Augment(crop=(0.4, 0.6), flip=False)), seed=0)
    edges = {int((cropped[0, n][0][0].float().mean(0) > 100).sum()) for n in range(64)}
    assert len(edges) > 4


def test_a_rectangle_is_painted_over_in_the_mean_colour_of_as_many_images_as_are_wanted():
    image = np.full((24, 24, 3), 250, np.uint8)
    seen = Preprocessing(size=24, crop_pct=1.0, mean=(0.2, 0.4, 0.6))
    erased = Augmentation(seen, Augment(crop=(1, 1), flip=False, erase=0.5))
    covered = []
    for seed in range(100):
        with seeded(seed):
            found = erased(image).numpy()
        hole = (found != 250).all(axis=0)
        assert (found[:, ~hole] == 250).all()
        assert (found[:, hole] == np.array([[51], [102], [153]])).all()
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole.sum() == len(rows) * len(columns)
        covered.append(hole.mean())
    assert 30 < np.count_nonzero(covered) < 70
    assert max(covered) < 0.4


def test_trivial_is_one_change_more_of_colour_or_of_shape():
    image, seen = picture_of_noise(), Preprocessing(size=24, crop_pct=1.0, mean=(0.2, 0.4, 0.6))
    still, changed = Augmentation(seen, STILL)(image), Augmentation(seen, STILL.model_copy(update={"trivial": True}))
    found = []
    for seed in range(60):
        with seeded(seed):
            found.append(changed(image))
    assert {(pixels.dtype, tuple(pixels.shape)) for pixels in found} == {(torch.uint8, (3, 24, 24))}
    assert len({pixels.numpy().tobytes() for pixels in found}) > 40
    fill = torch.tensor([[51], [102], [153]], dtype=torch.uint8)
    turned = [pixels for pixels in found if (pixels[:, 0, 0:1] == fill).all() or (pixels[:, -1, -1:] == fill).all()]
    assert 5 < len(turned) < 40, "shapes leave corners in the mean colour"
    assert 0 < sum(torch.equal(pixels, still) for pixels in found) < 15


def test_a_shift_moves_the_picture_over_black():
    seen = Preprocessing(size=24)
    image = np.random.default_rng(0).integers(1, 256, (40, 30, 3), dtype=np.uint8)  # nothing of it is black
    still, shifted = Augmentation(seen, STILL)(image), Augmentation(seen, Augment(crop=(1, 1), shift=3, flip=False))
    places = set()
    for number in range(60):
        with seeded(number):
            moved = shifted(image)
        (here,) = [(y, x) for y in range(-3, 4) for x in range(-3, 4) if torch.equal(moved, over_black(still, y, x))]
        places.add(here)
    assert len(places) > 25
    with pytest.raises(JobError, match=r"shift is 24 and the model sees 24 pixels; required: less than that"):
        Augmentation(seen, Augment(shift=24))


def over_black(pixels: torch.Tensor, down: int, right: int) -> torch.Tensor:
    moved = torch.roll(pixels, (down, right), (1, 2))
    moved[:, : max(0, down)] = moved[:, 24 + min(0, down) :] = 0
    moved[:, :, : max(0, right)] = moved[:, :, 24 + min(0, right) :] = 0
    return moved


@given(st.integers(8, 100), st.integers(2, 8), st.integers(1, 3))
def test_workers_share_an_epoch_without_overlap(count: int, batch: int, world: int):
    orders = [EpochSampler(count, step=batch, seed=3, rank=rank, world=world) for rank in range(world)]
    for order in orders:
        order.set_epoch(2)
    visits = [list(order) for order in orders]
    assert {len(mine) for mine in visits} == {len(orders[0])}
    assert len(orders[0]) % batch == 0
    together = [visit for mine in visits for visit in mine]
    assert len(set(together)) == len(together)
    assert {epoch for epoch, _ in together} <= {2}
    assert count - len(together) < batch * world


@pytest.mark.parametrize(("quiet", "drawn"), [(False, [5, 5, 5, 5, 5]), (True, [2, 2, 4, 4, 5])])
def test_nobody_looks_while_somebody_takes_the_time(tmp_path: Path, *, quiet: bool, drawn: list[int]) -> None:
    begun = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal begun
        for number in range(5):
            begun += 1
            yield table([picture(number), b"slow\n" + bytes(tmp_path / str(number)) if number % 2 else b"no image"])

    look = partial(poison.see, max_pixels=MAX_PIXELS)
    looked = looked_at(tables(), look, CarefulLimits(60.0, 2**31), processes=2, quiet=quiet)
    found = [(begun, len(list(tmp_path.iterdir())), seen["error_class"].to_pylist()) for seen in looked]
    assert [count for count, *_ in found] == drawn
    assert not quiet or [done for _, done, _ in found] == [1, 1, 2, 2, 2], "one of them still looks"
    assert all(classes == [None, "NOT_AN_IMAGE"] for *_, classes in found)
