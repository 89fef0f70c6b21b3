"""Whether a training's images fit into memory: what is free, and a refusal after the first shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from shards import tar_bytes
from trainings import SMALL, picture, tiny_network, write_shards

from pipeline.errors import JobError
from pipeline.job.training import Data, Training
from pipeline.prepare import data, images, room, train
from pipeline.prepare.dataset import read_data
from pipeline.prepare.images import labelled, read_images
from pipeline.prepare.learner import CrossEntropy, Learner
from pipeline.prepare.room import free_memory
from pipeline.prepare.train import Worker, fit
from pipeline.spec import Input


def silent(_: str) -> None:
    pass


def bytes_of(uri: str) -> int:
    return sum(path.stat().st_size for path in Path(uri).iterdir())


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards of the blocks that were read."""
    read: list[str] = []

    def counted(*given: Any, **named: Any) -> Iterator[pa.Table]:
        for table in data.image_rows(*given, **named):
            read.append(table["source"][0].as_py())
            yield table

    monkeypatch.setattr(images, "image_rows", counted)
    return read


def test_images_that_will_not_fit_are_refused_after_the_first_shards(
    tmp_path: Path, blocks: list[str], monkeypatch: pytest.MonkeyPatch
):
    uri = write_shards(tmp_path, 320)
    held = sum(len(picture(number)) for number in range(320))
    monkeypatch.setattr(room, "ENOUGH", 2 * bytes_of(uri) // 10)  # two of the ten shards
    monkeypatch.setattr(room, "free_memory", lambda: held)
    with pytest.raises(JobError, match=r"the images take 0\.0 GB, and 0\.0 GB of memory are free; required: room .* Name fewer"):
        read_images(Input(uri=uri), label="cls")
    assert len(blocks) == 3, "the end of the second is seen with the third"
    monkeypatch.setattr(room, "free_memory", lambda: 2 * held)
    assert len(read_images(Input(uri=uri), label="cls").encoded) == 320
    with pytest.raises(JobError, match="for each of 2 workers on this machine"):
        read_data(Data(train=Input(uri=uri)), seed=0, say=silent, beside=2)


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


def test_pixels_to_validate_with_want_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = labelled(read_images(Input(uri=write_shards(tmp_path / "in", 32)), label="cls"), ("0", "1"), where="x")
    monkeypatch.setattr(train, "free_memory", lambda: 3 * 16 * 16 * 32)
    learner = Learner(tiny_network(), CrossEntropy(0.0), SMALL, Training(batch_size=8))
    with pytest.raises(JobError, match="the 32 images to validate with, as pixels, take 0\\.0 GB, and"):
        fit(learner, (found, found), preprocessing=SMALL, worker=Worker(), folder=tmp_path / "out", say=silent)


def test_a_long_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = write_shards(tmp_path, 96)
    monkeypatch.setattr(room, "EVERY_S", 0.0)
    said: list[str] = []
    read_images(Input(uri=uri), label="cls", say=said.append)
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
