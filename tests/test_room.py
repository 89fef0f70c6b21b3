"""Whether a training's images fit into memory, and where they lie if not: what is free, and a refusal after the first shards."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from shards import tar_bytes
from trainings import SMALL, picture, tiny_network, write_shards

from pipeline.errors import JobError, StoreError
from pipeline.job.training import Data, Training
from pipeline.prepare import data, images, room, train
from pipeline.prepare.afar import Checkpoints
from pipeline.prepare.dataset import read_data
from pipeline.prepare.images import labelled, read_images
from pipeline.prepare.learner import CrossEntropy, Learner
from pipeline.prepare.room import free_memory
from pipeline.prepare.shelf import FilePlace, Shelf
from pipeline.prepare.train import Worker, fit
from pipeline.spec import Input


def silent(_: str) -> None:
    pass


def bytes_of(uri: str) -> int:
    return sum(path.stat().st_size for path in Path(uri).iterdir())


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards of the blocks that were read. There is one process that looks at them, and two wait for it."""
    read: list[str] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def counted(*given: Any, **named: Any) -> Iterator[pa.Table]:
        for table in data.image_rows(*given, **named):
            read.append(table["source"][0].as_py())
            yield table

    monkeypatch.setattr(images, "image_rows", counted)
    return read


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, memory: int = 1, disk: int = 10**12) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: memory)
    monkeypatch.setattr(room, "free_disk", lambda _: disk)


def test_images_that_will_not_fit_are_refused_after_the_first_shards(
    tmp_path: Path, blocks: list[str], monkeypatch: pytest.MonkeyPatch
):
    uri = write_shards(tmp_path, 320)
    held = sum(len(picture(number)) for number in range(320))
    monkeypatch.setattr(room, "ENOUGH", 2 * bytes_of(uri) // 10)  # two of the ten shards
    monkeypatch.setattr(room, "free_memory", lambda: held)
    with pytest.raises(JobError, match=r"the images take 0\.0 GB, and 0\.0 GB of memory are free; required: room .* Name fewer"):
        read_images(Input(uri=uri), label="cls")
    assert len(blocks) == 3 + 2, "the end of the second is seen with the third"
    monkeypatch.setattr(room, "free_memory", lambda: 2 * held)
    assert len(read_images(Input(uri=uri), label="cls").encoded) == 320
    with pytest.raises(JobError, match="for each of 2 workers on this machine"):
        read_data(Data(train=Input(uri=uri)), seed=0, known=(), shelf=Shelf(beside=2))


def test_what_does_not_fit_into_memory_lies_in_a_file_that_serves_again(
    tmp_path: Path, blocks: list[str], monkeypatch: pytest.MonkeyPatch
):
    wanted, said = Input(uri=write_shards(tmp_path / "in", 64)), list[str]()
    broken = tar_bytes({"x.png": b"\x89PNG nothing", "x.cls": b"1", "y.png": picture(64), "y.cls": b"0"})
    (tmp_path / "in/z.tar").write_bytes(broken)
    held = read_images(wanted, label="cls")
    short_of_memory(monkeypatch)
    shelf = Shelf(tmp_path / "training", say=said.append)
    before = pa.total_allocated_bytes()
    filed = read_images(wanted, label="cls", shelf=shelf)
    assert pa.total_allocated_bytes() - before < 10_000 < filed.encoded.nbytes, "it is mapped"
    read = len(blocks)
    again = read_images(wanted, label="cls", shelf=shelf)
    assert len(blocks) == read, "nothing is read a second time"
    for found in (filed, again):
        assert found.encoded.to_pylist() == held.encoded.to_pylist()
        assert (found.texts, found.left_out) == (held.texts, held.left_out)
    assert [line.partition(":")[0] for line in said] == [
        f"the images go to {tmp_path}/training/train-0.arrow, for memory is short",
        "images of before",
    ]
    assert replace(shelf, name="validation").standing() is None
    monkeypatch.setattr("pipeline.prepare.shelf.CODE_VERSION", "another")
    assert shelf.standing() is None, "another version may decode otherwise"


def test_a_file_that_was_begun_is_no_file_and_what_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, shelf = Input(uri=write_shards(tmp_path / "in", 64)), Shelf(tmp_path / "training")
    short_of_memory(monkeypatch)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.shelf.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            read_images(wanted, label="cls", shelf=shelf)
    assert list((tmp_path / "training").iterdir()) == []
    (tmp_path / "training/train-0.arrow").write_bytes(b"half of it")
    assert len(read_images(wanted, label="cls", shelf=shelf).texts) == 64
    with pytest.raises(JobError, match="no sound image with a label"):
        read_images(wanted, label="none", shelf=replace(shelf, name="validation"))
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["train-0.arrow", "train-0.json"]


def test_two_of_the_same_training_at_once_read_each_into_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second one begins while the first one reads, and gets no further."""
    wanted, folder = Input(uri=write_shards(tmp_path / "in", 64)), tmp_path / "training"
    held = read_images(wanted, label="cls")
    short_of_memory(monkeypatch)
    add, second = FilePlace.add, list[FilePlace]()

    def beside(place: FilePlace, *images: Any) -> None:
        add(place, *images)
        if not second:
            second.append(stack.enter_context(Shelf(folder).place(wanted)))
            add(second[0], *images)

    monkeypatch.setattr(FilePlace, "add", beside)
    with ExitStack() as stack:
        first = read_images(wanted, label="cls", shelf=Shelf(folder))
    assert first.encoded.to_pylist() == held.encoded.to_pylist()
    assert sorted(path.suffix for path in folder.iterdir()) == [".arrow", ".json", ".part"]


def test_the_larger_of_disk_and_memory_is_taken_and_a_full_one_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = Input(uri=write_shards(tmp_path / "in", 64))
    held = read_images(wanted, label="cls").encoded.nbytes
    short_of_memory(monkeypatch, memory=held, disk=2 * held)
    assert len(read_images(wanted, label="cls", shelf=Shelf(tmp_path / "a")).texts) == 64
    with pytest.raises(JobError, match=f"for each of 2 workers on this machine, and .* of the disk of {tmp_path}/b are free"):
        read_images(wanted, label="cls", shelf=Shelf(tmp_path / "b", beside=2))
    short_of_memory(monkeypatch, memory=int(1.2 * held), disk=held)
    assert len(read_images(wanted, label="cls", shelf=Shelf(tmp_path / "c")).texts) == 64
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_bytes(b"")
    short_of_memory(monkeypatch)
    with pytest.raises(StoreError, match="a place for checkpoints"):
        read_images(wanted, label="cls", shelf=Shelf(tmp_path / "file/c"))
    (tmp_path / "d").mkdir()

    def full(_: int) -> str:
        (tmp_path / "d/train-0.full.part").symlink_to("/dev/full")
        return "full"

    monkeypatch.setattr(secrets, "token_hex", full)
    with pytest.raises(StoreError, match=r"train-0\.arrow: No space left on device; required: a place for checkpoints"):
        read_images(wanted, label="cls", shelf=Shelf(tmp_path / "d"))
    assert list((tmp_path / "d").iterdir()) == []


def test_sidecars_take_no_room_and_one_large_shard_is_refused_when_it_no_longer_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for shard in "abc":
        members = {f"{number}.{name}": content for number in "01" for name, content in (("png", picture(0)), ("cls", b"1"))}
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members | {"0.npy": bytes(10**6)}))
    monkeypatch.setattr(room, "ENOUGH", 1)
    monkeypatch.setattr(room, "free_memory", lambda: 10**5)
    assert len(read_images(Input(uri=str(tmp_path)), label="cls").texts) == 6
    monkeypatch.setattr(room, "free_memory", lambda: 100)
    with pytest.raises(JobError, match="of memory are free"):
        read_images(Input(uri=str(tmp_path / "a.tar")), label="cls")


def test_loose_images_are_refused_at_once_and_not_before(tmp_path: Path, blocks: list[str], monkeypatch: pytest.MonkeyPatch):
    for number in range(200):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    wanted = Input(uri=str(tmp_path), format="images")
    monkeypatch.setattr(room, "ENOUGH", 1)
    short_of_memory(monkeypatch, memory=int(1.2 * bytes_of(str(tmp_path))), disk=0)
    assert len(read_images(wanted, label="folder").texts) == 200
    read = len(blocks)
    assert read > 1, "blocks"
    short_of_memory(monkeypatch, memory=bytes_of(str(tmp_path)), disk=0)
    with pytest.raises(JobError, match="of memory are free"):
        read_images(wanted, label="folder")
    assert len(blocks) <= read + 1 + 2


def test_pixels_to_validate_with_are_decoded_anew_where_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = labelled(read_images(Input(uri=write_shards(tmp_path / "in", 32)), label="cls"), ("0", "1"))
    results, once = [], list[int]()
    monkeypatch.setattr(train, "in_memory", lambda held: once.append(len(held)) or images.in_memory(held))
    for name, memory in (("held", 10**9), ("anew", 1)):
        monkeypatch.setattr(room, "free_memory", lambda memory=memory: memory)
        torch.manual_seed(0)
        learner = Learner(tiny_network(), CrossEntropy(0.0), SMALL, Training(batch_size=8, epochs=2))
        worker, folder = Worker(loaders=1), tmp_path / name
        results.append(fit(learner, (found, found), preprocessing=SMALL, worker=worker, place=Checkpoints(folder), say=silent))
    kept = [[replace(epoch, seconds=0.0) for epoch in result.epochs] for result in results]
    assert kept[0] == kept[1]
    assert once == [32], "the second time they are not held"


def test_a_long_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = write_shards(tmp_path, 96)
    monkeypatch.setattr(room, "EVERY_S", 0.0)
    said: list[str] = []
    read_images(Input(uri=uri), label="cls", shelf=Shelf(say=said.append))
    assert said == [
        "32 images read, 0% of 0.0 GB",
        "64 images read, 33% of 0.0 GB",
        "96 images read, 67% of 0.0 GB",
    ]


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\n"}, 800 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 800 kB\n",
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "4000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1500\n",
            },
            2500,
        ),
        ({"proc/meminfo": "MemAvailable: 800 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 800 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 800 kB\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500\n",
            },
            1500,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ({}, None),
    ],
)
def test_what_is_free_is_the_machines_and_no_more_than_the_containers(tmp_path: Path, files: dict[str, str], free: int | None):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert free_memory(tmp_path) == free
