"""One behaviour suite over all storages, and what only S3 (through a proxy that misbehaves) or only a disk can do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import itertools
import multiprocessing
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import IncompleteReadError
from faults import Fault, FaultProxy
from seaweed import ACCESS_KEY, Seaweed

from pipeline.errors import InputChanged, InputMissing, PermissionDenied, StoreError, Temporary, Unidentified
from pipeline.read import read_unit
from pipeline.s3 import ATTEMPTS, S3Store
from pipeline.s3_fetch import Fetch
from pipeline.spec import S3, Input
from pipeline.storage import Object, RangeFile, Store, below, join, open_store
from pipeline.unit import Part, Unit

TREE = ("a/1.tar", "a/2.tar", "a/b/3.tar", "a-b/4.tar", "a.txt", "z/ü [1].jpg")


@dataclass
class Place:
    """An empty folder in some store, and a way to overwrite there, which stores cannot."""

    store: Store
    root: str
    overwrite: Callable[[str, bytes], None]

    def fill(self, names: tuple[str, ...] = TREE) -> None:
        for name in names:
            assert self.store.create(join(self.root, name), name.encode())

    def names(self, uri: str) -> list[str]:
        """What a listing finds, from the root."""
        return [found.uri.removeprefix(self.root + "/") for found in self.store.list(uri)]


def overwrite_file(uri: str, data: bytes) -> None:
    before = os.stat(uri).st_mtime_ns
    Path(uri).write_bytes(data)
    os.utime(uri, ns=(before + 1, before + 1))  # the file system's clock may tick slower than this test


@pytest.fixture(scope="session")
def s3_store(s3: Seaweed) -> Store:
    return open_store("s3://", s3.options)  # one for all: a client takes half a second to build


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        (tmp_path / "root").mkdir()
        return Place(open_store(str(tmp_path)), str(tmp_path / "root"), overwrite_file)
    server: Seaweed = request.getfixturevalue("s3")
    return Place(request.getfixturevalue("s3_store"), f"s3://{server.bucket()}", server.put)


# Both stores


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a-b/4.tar", "a.txt", "a/1.tar", "a/2.tar", "a/b/3.tar", "z/ü [1].jpg"]),
        ("a", ["a/1.tar", "a/2.tar", "a/b/3.tar"]),
        ("a/", ["a/1.tar", "a/2.tar", "a/b/3.tar"]),
        ("a.txt", ["a.txt"]),
        ("a/*.tar", ["a/1.tar", "a/2.tar"]),
        ("*/*.tar", ["a-b/4.tar", "a/1.tar", "a/2.tar"]),
        ("**/*.tar", ["a-b/4.tar", "a/1.tar", "a/2.tar", "a/b/3.tar"]),
        ("**", ["a-b/4.tar", "a.txt", "a/1.tar", "a/2.tar", "a/b/3.tar", "z/ü [1].jpg"]),
        ("a/**/[!12].tar", ["a/b/3.tar"]),
        ("a?[a-c]/*", ["a-b/4.tar"]),
        ("a*/", ["a-b/4.tar", "a/1.tar", "a/2.tar", "a/b/3.tar"]),
        ("z/* [[]1].*", ["z/ü [1].jpg"]),
        ("*.jpg", []),
        ("a[/]1.tar", []),
    ],
)
def test_list(place: Place, pattern: str, expected: list[str]) -> None:
    place.fill()
    assert place.names(join(place.root, pattern) + ("/" if pattern.endswith("/") else "")) == expected


def test_names_hold_any_characters(place: Place) -> None:
    odd = ("new\nline.jpg", "a b.jpg", "50%25.jpg", "x#1?.jpg", "+&=;.jpg", "日本/ü.jpg")
    place.fill(odd)
    assert place.names(place.root + "/") == sorted(odd)
    assert [place.store.read(found.uri, pinned=found).decode() for found in place.store.list(place.root + "/")] == sorted(odd)


def test_list_pins_what_head_and_read_see(place: Place) -> None:
    place.fill(("a/1", "a/2"))
    for found in place.store.list(place.root):
        assert found == place.store.head(found.uri)
        assert found.size == len(place.store.read(found.uri, pinned=found))


@pytest.mark.parametrize("name", ["job[1]", "a*", "b?", "[[]"])
def test_a_folder_is_listed_whatever_its_name_looks_like(place: Place, name: str) -> None:
    place.fill(("job1/x", "a/x", "ab/x", "bc/x", "[/x", f"{name}/own", f"{name}/below/own"))
    listed = [item.uri.removeprefix(place.root) for item in place.store.list(join(place.root, name) + "/", glob=False)]
    assert [uri.strip("/") for uri in listed] == [f"{name}/below/own", f"{name}/own"]


def test_another_file_of_the_same_time_is_not_read(tmp_path: Path) -> None:
    """As `cp -p` and `rsync -t` make one."""
    path, store = tmp_path / "x", open_store(str(tmp_path))
    path.write_bytes(b"old")
    pinned = store.head(str(path))
    (tmp_path / "y").write_bytes(b"newer and longer")
    os.utime(tmp_path / "y", ns=(0, int(pinned.etag)))
    (tmp_path / "y").rename(path)
    with pytest.raises(InputChanged):
        store.read(str(path), stop=3, pinned=pinned)


def test_a_missing_folder_or_bucket_cannot_be_listed(place: Place) -> None:
    for name in ("nowhere/", "nowhere/*.tar"):
        with pytest.raises(InputMissing):
            list(place.store.list(f"{place.root}-not-there/{name}"))


def test_an_impossible_glob_is_an_error(place: Place) -> None:
    with pytest.raises(StoreError, match="Mend the pattern"):
        list(place.store.list(join(place.root, "[z-a]")))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 10), (3, 7), (3, None), (9, 99), (10, None), (50, 60), (5, 5), (7, 3)]
)
def test_a_read_is_a_slice(place: Place, start: int, stop: int | None) -> None:
    uri = join(place.root, "ten")
    place.store.create(uri, b"0123456789")
    assert place.store.read(uri, start=start, stop=stop) == b"0123456789"[start:stop]


def test_an_empty_object(place: Place) -> None:
    uri = join(place.root, "empty")
    assert place.store.create(uri, b"")
    assert place.store.head(uri).size == 0
    assert place.store.read(uri) == b""


def test_a_changed_object_is_not_read(place: Place) -> None:
    uri = join(place.root, "x")
    place.store.create(uri, b"first")
    pinned = place.store.head(uri)
    place.overwrite(uri, b"other")
    with pytest.raises(InputChanged, match="not the version"):
        place.store.read(uri, start=1, pinned=pinned)
    assert place.store.read(uri, pinned=place.store.head(uri)) == b"other"


def test_missing_objects(place: Place) -> None:
    place.fill(("folder/x",))
    for name in ("nothing", "folder"):
        with pytest.raises(InputMissing):
            place.store.head(join(place.root, name))
        with pytest.raises(InputMissing):
            place.store.read(join(place.root, name))


def test_create_never_overwrites(place: Place) -> None:
    uri = join(place.root, "deep/er/x")
    assert place.store.create(uri, b"first")
    assert not place.store.create(uri, b"second")
    assert place.store.read(uri) == b"first"


def test_of_eight_creators_one_wins(place: Place) -> None:
    bodies = [bytes([number]) * 50_000 for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        uri = join(place.root, "race")
        created = list(pool.map(place.store.create, itertools.repeat(uri), bodies))
    assert created.count(True) == 1
    assert place.store.read(uri) == bodies[created.index(True)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_stores_travel_to_other_processes(place: Place) -> None:
    uri = join(place.root, "x")
    place.store.create(uri, b"here")  # so that the store is connected before the fork
    sent = pickle.loads(pickle.dumps(place.store))
    assert sent == place.store
    assert sent.head(uri) == place.store.head(uri)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=lambda: answers.put(place.store.head(uri)))
    process.start()
    assert answers.get(timeout=120) == place.store.head(uri)
    process.join(120)
    assert process.exitcode == 0


def test_range_file_serves_parquet(place: Place) -> None:
    table = pa.table({"n": list(range(1000)), "text": [str(n) * 20 for n in range(1000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    uri = join(place.root, "t.parquet")
    place.store.create(uri, buffer.getvalue())
    pinned = place.store.head(uri)
    with RangeFile(place.store, pinned) as file:
        assert pq.ParquetFile(file).read_row_group(7).equals(table.slice(700, 100))
        assert (file.seek(-4, io.SEEK_END), file.read(), file.read(1), file.tell()) == (
            pinned.size - 4,
            b"PAR1",
            b"",
            pinned.size,
        )
        with pytest.raises(ValueError, match="seek"):
            file.seek(-1)
    assert io.BufferedReader(RangeFile(place.store, pinned), 1000).read() == buffer.getvalue()
    place.overwrite(uri, buffer.getvalue()[::-1])
    with pytest.raises(InputChanged):
        RangeFile(place.store, pinned).read(10)


class Sparing:
    """A client of a server that gives `most` bytes at a time, and answers a range of a whole object with the object. No server at
    hand does either, and HTTP lets them."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most, self.asked = data, most, list[str]()

    async def get_object(self, **request: str) -> dict[str, object]:
        self.asked.append(request.get("Range", ""))
        first, last = (int(number) for number in request["Range"].removeprefix("bytes=").split("-"))
        given = self.data[first : min(last + 1, first + self.most)]
        answer = {"ETag": '"e"', "ContentLength": len(given), "Body": _Body(given)}
        return answer | (
            {} if given == self.data else {"ContentRange": f"bytes {first}-{first + len(given) - 1}/{len(self.data)}"}
        )


class _Body:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def iter_chunks(self, _: int) -> AsyncIterator[bytes]:
        yield self.data


def test_a_server_that_gives_less_than_was_asked_for_is_asked_again() -> None:
    data = bytes(range(100))
    client, fetch = Sparing(data, 40), Fetch({"Bucket": "b", "Key": "k"}, 5, 95, None)
    for _ in range(2):
        with pytest.raises(IncompleteReadError):
            asyncio.run(fetch.attempt(client))
    asyncio.run(fetch.attempt(client))
    assert b"".join(fetch.pieces) == data[5:95]
    assert client.asked == ["bytes=5-94", "bytes=45-94", "bytes=85-94"]


def test_all_of_an_object_is_an_answer_to_a_range_of_all_of_it() -> None:
    fetch = Fetch({"Bucket": "b", "Key": "k"}, 0, 8, None)
    asyncio.run(fetch.attempt(Sparing(b"12345", 99)))
    assert b"".join(fetch.pieces) == b"12345"
    with pytest.raises(StoreError, match="ignores ranges"):
        asyncio.run(Fetch({"Bucket": "b", "Key": "k"}, 0, 3, None).attempt(Heedless()))


class Heedless:
    async def get_object(self, **_: str) -> dict[str, object]:
        return {"ETag": '"e"', "ContentLength": 5, "Body": _Body(b"12345")}


# S3 through a proxy


@pytest.fixture
def hurried(proxied: tuple[FaultProxy, S3Store]) -> S3Store:
    """A store behind the proxy that soon loses patience."""
    return proxied[1]


@pytest.fixture
def blob(s3: Seaweed, s3_store: Store) -> Object:
    """3 MB, so that no single packet holds it."""
    uri = f"s3://{s3.bucket()}/blob"
    s3.put(uri, bytes(range(250)) * 12_000)
    return s3_store.head(uri)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status"),
        Fault("status", status=500, code="InternalError"),
        Fault("status", status=400, code="RequestTimeout"),
        Fault("reset"),
        Fault("hang"),
        Fault("lost"),
        Fault("truncate", after=1_000_000),
        Fault("truncate", after=0),
        Fault("stall", after=2_000_001),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.after or fault.status}",
)
def test_a_read_survives(s3_store: Store, proxy: FaultProxy, hurried: S3Store, blob: Object, fault: Fault) -> None:
    whole = s3_store.read(blob.uri)
    proxy.script(dataclasses.replace(fault, method="GET"))
    assert hurried.read(blob.uri, start=7, stop=2_500_000, pinned=blob) == whole[7:2_500_000]
    assert len(proxy.requests) == 2
    proxy.script(*[dataclasses.replace(fault, method="GET")] * (1 if fault.kind in ("hang", "stall") else 3))
    assert hurried.read(blob.uri) == whole
    assert not proxy.pending


def test_a_damaged_read_is_tried_again(s3: Seaweed, proxy: FaultProxy, hurried: S3Store) -> None:
    uri, data = f"s3://{s3.bucket()}/x", bytes(range(250)) * 12_000
    hurried.create(uri, data)  # a create leaves a checksum that S3 sends back with the whole object
    proxy.script(Fault("corrupt", after=1_000_000))
    assert hurried.read(uri) == data
    assert not proxy.pending


def test_a_resumed_read_never_mixes_two_versions(s3: Seaweed, proxy: FaultProxy, hurried: S3Store, blob: Object) -> None:
    proxy.script(Fault("truncate", after=1_000_000), Fault("hang"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(hurried.read, blob.uri)  # without an etag: pinned to the one it saw first
        while not (len(proxy.requests) == 2 or reading.done()):
            concurrent.futures.wait([reading], timeout=0.01)
        s3.put(blob.uri, b"x" * 3_000_000)
        with pytest.raises(InputChanged):
            reading.result(timeout=120)


def test_a_read_gives_up_at_last(proxy: FaultProxy, hurried: S3Store, blob: Object) -> None:
    proxy.script(*[Fault("status", status=500, code="InternalError")] * ATTEMPTS)
    with pytest.raises(Temporary, match=f"{proxy.endpoint}.*{ATTEMPTS} attempts.*InternalError"):
        hurried.read(blob.uri)
    assert len(proxy.requests) == ATTEMPTS


def test_listing_survives_and_takes_every_page(
    s3: Seaweed, proxy: FaultProxy, hurried: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.s3.PAGE", 4)
    bucket = s3.bucket()
    for name in ("0", "1", "2", "3-", "3/0", "4", "5", "folder/", "6"):  # folder/: the marker that consoles write
        s3.put(f"s3://{bucket}/x/{name}", b"")
    proxy.script(Fault("status"), Fault("truncate", after=200), Fault("reset", path="continuation-token"))
    found = [found.uri.removeprefix(f"s3://{bucket}/x/") for found in hurried.list(f"s3://{bucket}/x/")]
    assert found == ["0", "1", "2", "3-", "3/0", "4", "5", "6"]
    assert not proxy.pending
    assert len(proxy.requests) == 3 + 3


@pytest.mark.parametrize("fault", [Fault("lost"), Fault("hang"), Fault("reset"), Fault("status")], ids=lambda fault: fault.kind)
def test_a_create_survives(s3: Seaweed, proxy: FaultProxy, hurried: S3Store, fault: Fault) -> None:
    uri = f"s3://{s3.bucket()}/x"
    proxy.script(dataclasses.replace(fault, method="PUT"))
    assert hurried.create(uri, b"ours") == (fault.kind != "lost")  # lost: it stands there, and the second try met it
    assert hurried.read(uri) == b"ours"
    assert len([request for request in proxy.requests if request.startswith("PUT")]) == 2


def test_a_conflicting_create_is_tried_again(s3: Seaweed, proxy: FaultProxy, hurried: S3Store) -> None:
    proxy.script(Fault("status", status=409, code="ConditionalRequestConflict"))
    assert hurried.create(f"s3://{s3.bucket()}/x", b"ours")


def test_a_create_sends_a_checksum_that_the_server_holds_it_to(s3: Seaweed) -> None:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match=r"(?i)checksum|digest"):
        s3.client_of(ACCESS_KEY, attempts=1).put_object(Bucket=s3.bucket(), Key="x", Body=b"data", ChecksumCRC32="AAAAAA==")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("status", status=404, code="NoSuchBucket"), StoreError),
        (Fault("status", status=403, code="AccessDenied"), PermissionDenied),
        (Fault("status", status=501, code="NotImplemented"), StoreError),
        (Fault("status", status=403, code="RequestTimeTooSkewed"), Unidentified),
    ],
)
def test_a_refused_create_is_not_tried_again(
    proxy: FaultProxy, hurried: S3Store, fault: Fault, expected: type[Exception]
) -> None:
    proxy.script(fault)
    with pytest.raises(expected, match=fault.code):
        hurried.create("s3://somewhere/x", b"ours")
    assert len(proxy.requests) == 1


def test_what_a_head_cannot_say_is_asked_again(s3: Seaweed, proxy: FaultProxy, hurried: S3Store, blob: Object) -> None:
    refused = Fault("status", "HEAD", status=400, code="InvalidRequest")
    proxy.script(refused, refused, dataclasses.replace(refused, method="GET"))  # the SDK asks by HEAD where the bucket is, too
    with pytest.raises(StoreError, match="InvalidRequest"):
        hurried.head(blob.uri)
    assert [request.partition(" ")[0] for request in proxy.requests] == ["HEAD", "HEAD", "GET"]
    proxy.script(refused, refused)
    assert hurried.head(blob.uri) == blob


def test_an_unreachable_endpoint_is_temporary(s3: Seaweed) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        store = S3Store(S3(endpoint=endpoint), backoff=0.01)
        for act in (lambda: store.read("s3://b/x"), lambda: store.create("s3://b/x", b""), lambda: list(store.list("s3://b/"))):
            with pytest.raises(Temporary, match=endpoint):
                act()


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://[::1", "http://a..b:80"])
def test_an_endpoint_of_the_environment_that_is_none_is_a_sentence(
    name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, endpoint)
    with pytest.raises(StoreError, match=r"required: a server such as https://.*AWS_ENDPOINT_URL"):
        S3Store(S3()).head("s3://somewhere/x")


def test_wrong_missing_and_anonymous_credentials(s3: Seaweed, blob: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionDenied, match="AccessDenied") as caught:
        S3Store(S3(endpoint=s3.endpoint, anonymous=True)).read(blob.uri)
    assert type(caught.value) is PermissionDenied, "who asks is known well enough: it is this bucket that says no"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unidentified, match="SignatureDoesNotMatch"):
        S3Store(s3.options).create(blob.uri, b"")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Unidentified, match="credentials"):
        S3Store(s3.options).read(blob.uri)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(Unidentified, match=r"s3\.anonymous"):
        S3Store(s3.options).read(blob.uri)


def test_requester_pays_is_said(s3: Seaweed, proxy: FaultProxy, blob: Object) -> None:
    store = S3Store(S3(endpoint=proxy.endpoint, requester_pays=True))
    assert store.head(blob.uri) == blob
    assert store.read(blob.uri, stop=3) == bytes(range(3))
    assert len(list(store.list(blob.uri.rpartition("/")[0]))) == 1


# Disk


def test_a_disk_keeps_no_temporary_file(tmp_path: Path) -> None:
    store = open_store("out")
    uri = str(tmp_path / "x")
    assert [store.create(uri, b"1"), store.create(uri, b"2")] == [True, False]
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_created_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, done, link, sync = open_store("out"), list[str](), os.link, os.fsync

    def linked(source: str, target: str) -> None:
        assert list(store.list(str(tmp_path))) == [], "what is half written is listed"
        done.append("named")
        link(source, target)

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(os, "fsync", synced)
    assert store.create(str(tmp_path / "x"), b"1")
    assert done == ["file", "named", "folder"]


@pytest.mark.parametrize(("size", "later", "whole"), [(5, 0, True), (5, 1, False), (4, 0, False)])
def test_a_file_that_is_written_to_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, later: int, *, whole: bool
) -> None:
    """`size` and by how much `later` it is of then, where clocks tick seldom."""
    (tmp_path / "x").write_bytes(b"12345")
    stat = os.fstat

    def touched(handle: int) -> os.stat_result:
        before = stat(handle)
        os.truncate(tmp_path / "x", size)
        os.utime(tmp_path / "x", ns=(1, before.st_mtime_ns + later))
        return before

    monkeypatch.setattr(os, "fstat", touched)
    with contextlib.nullcontext() if whole else pytest.raises(InputChanged):
        assert open_store("x").read(str(tmp_path / "x")) == b"12345"


@pytest.mark.parametrize(
    ("number", "writing", "expected"),
    [
        *((number, True, Temporary) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM)),
        *((number, False, Temporary) for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN)),
        *((number, True, PermissionDenied) for number in (errno.EROFS, errno.EACCES, errno.EPERM)),
        *((number, True, StoreError) for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENAMETOOLONG)),
        (errno.ENOENT, False, InputMissing),
        (errno.ENAMETOOLONG, False, StoreError),
    ],
)
def test_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, writing: bool, expected: type[Exception]
) -> None:
    """Which of it another pass may mend, and which is no fault of the file."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))

    monkeypatch.setattr("pipeline.disk.open", fail, raising=False)
    store, uri = open_store("x"), str(tmp_path / "x")
    with pytest.raises(expected, match=os.strerror(number)) as caught:
        store.create(uri, b"") if writing else store.read(uri)
    assert type(caught.value) is expected


@pytest.mark.parametrize("become", ["a pipe", "a socket", "a folder", "a link to itself", "a device"])
def test_a_file_that_is_none_any_more_costs_its_own_image_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, become: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    for name in ("a.jpg", "b.jpg"):
        Path(name).write_bytes(b"x")
    unit = Unit(tuple(Part.of(item) for item in open_store("x").list(str(tmp_path))))
    os.unlink("a.jpg")
    if become == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("a.jpg")
    else:
        makes = {"a pipe": os.mkfifo, "a folder": os.mkdir, "a link to itself": partial(os.symlink, "a.jpg")}
        makes.get(become, partial(os.symlink, "/dev/zero"))("a.jpg")
    wanted, said = Input(uri=str(tmp_path), format="images"), queue.Queue[Any]()

    def read() -> None:
        said.put([table.select(["key", "error_class"]).to_pylist() for table in read_unit(open_store("x"), unit, wanted=wanted)])

    threading.Thread(target=read, daemon=True).start()
    try:
        rows = [row for table in said.get(timeout=120) for row in table]
    finally:  # whoever waits for a writer waits no longer
        if become == "a pipe":
            os.close(os.open("a.jpg", os.O_RDWR))
    assert [tuple(row.values()) for row in rows] == [("a.jpg", "FETCH_FAILED"), ("b.jpg", None), (None, None)]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As FAT and some network disks are, of which Linux says no more than EPERM; a bucket that is mounted says ENOSYS."""

    def fail(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match="required: a file system with hard links"):
        open_store("x").create(str(tmp_path / "x"), b"")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["labels", "labels/0123456789ab", "labels/0123456789ab/runs"])
def test_a_file_is_no_folder_of_ours_that_is_not_there_yet(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(StoreError, match=rf"^{tmp_path}/{name} is a file; required: a folder"):
        below(open_store(str(tmp_path)), f"{tmp_path}/labels/0123456789ab", "runs")


def test_hidden_files_are_not_listed(tmp_path: Path) -> None:
    for name in (".cache/a", "b/.c.tmp", "b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    store = open_store(str(tmp_path))
    assert [found.uri for found in store.list(str(tmp_path))] == [str(tmp_path / "b/d")]
    assert [found.uri for found in store.list(str(tmp_path / ".cache"))] == [str(tmp_path / ".cache/a")]


def test_file_uris_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("out")
    assert store.create(f"file://{tmp_path}/out/100% x", b"1")
    for uri in ("out", "./out/*", f"file://{tmp_path}/out/", "file://out"):
        assert [found.uri for found in store.list(uri)] == [str(tmp_path / "out/100% x")]


def test_links_are_followed_and_no_loop_of_them(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").touch()
    (tmp_path / "root/linked").symlink_to(tmp_path / "other")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    store = open_store(str(tmp_path))
    assert [found.uri for found in store.list(str(tmp_path / "root"))] == [str(tmp_path / "root/linked/x")]
    (tmp_path / "root/again").symlink_to(tmp_path / "other")  # as `find -L` has it
    assert [Path(found.uri).parent.name for found in store.list(str(tmp_path / "root"))] == ["again", "linked"]
    (tmp_path / "root/again").unlink()
    (tmp_path / "root/broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "root/circle").symlink_to(tmp_path / "root/circle")
    os.mkfifo(tmp_path / ".pipe")  # whose reader would wait for ever
    (tmp_path / "root/pipe.jpg").symlink_to(tmp_path / ".pipe")
    found = {Path(item.uri).name: item for item in store.list(str(tmp_path / "root"))}
    assert sorted(found) == ["broken", "circle", "x"]
    for name in ("broken", "circle"):  # by whom it is read it is told of
        with pytest.raises(InputMissing, match=name):
            store.read(found[name].uri, pinned=found[name])


@pytest.mark.parametrize(
    ("pattern", "looked_at", "found"),
    [
        ("*.tar", ["."], ["a.tar"]),
        ("[!x]*", ["."], ["a.tar"]),
        ("*/*.tar", [".", "d", "e"], ["d/b.tar"]),
        ("d*/*/c.tar", [".", "d", "d/f", "e"], ["d/f/c.tar"]),
        ("**/c.tar", [".", "d", "d/f", "d/f/g", "e"], ["d/f/c.tar"]),
        ("d*/", [".", "d", "d/f", "d/f/g", "e"], ["d/b.tar", "d/f/c.tar", "d/f/g/h"]),
        ("", [".", "d", "d/f", "d/f/g", "e"], ["a.tar", "d/b.tar", "d/f/c.tar", "d/f/g/h", "e/i"]),
    ],
)
def test_a_glob_looks_into_no_folder_that_it_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, looked_at: list[str], found: list[str]
) -> None:
    """Such as lost+found/, which is root's alone, beside the shards of a disk."""
    for name in ("a.tar", "d/b.tar", "d/f/c.tar", "d/f/g/h", "e/i"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    looked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (looked.append(os.path.relpath(folder, tmp_path)), scandir(folder))[1])
    assert [item.uri for item in open_store("/").list(f"{tmp_path}/{pattern}")] == [f"{tmp_path}/{name}" for name in found]
    assert sorted(looked) == looked_at


def test_what_goes_away_while_a_folder_is_listed_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer writes b.part and renames it; a folder is moved away with all that it holds."""
    for name in ("a", "b.part", "moved/x", "now a file/x", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scan = os.scandir

    def scanned(folder: str):
        with scan(folder) as entries:
            found = list(entries)
        if folder == str(tmp_path):
            os.rename(tmp_path / "now a file", tmp_path / "n")
            (tmp_path / "now a file").touch()
            os.rename(tmp_path / "b.part", tmp_path / "b")
            os.rename(tmp_path / "moved", tmp_path.parent / f"{tmp_path.name}-moved")
        return contextlib.nullcontext(found)

    monkeypatch.setattr(os, "scandir", scanned)
    assert [Path(found.uri).name for found in open_store("/").list(str(tmp_path))] == ["a", "z"]
    with pytest.raises(InputMissing, match="absent"):
        list(open_store("/").list(str(tmp_path / "absent/")))


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Rights do not bind root, so lay them down for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_rights(unprivileged: None) -> None:
    store = open_store("/")
    with pytest.raises(PermissionDenied, match="the right to write"):
        store.create("/nightlabel-test/x", b"")
    with pytest.raises(PermissionDenied, match="the right to read"):
        store.read("/etc/shadow")


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError, match="file"):
        store.create(str(tmp_path / "file/x"), b"")
    with pytest.raises(InputMissing):
        store.read(str(tmp_path / "file/x"))
    with pytest.raises(InputMissing):
        list(store.list(f"{tmp_path}/file/"))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # Python ignores SIGXFSZ, so the write fails as on a full disk
    try:
        with pytest.raises(StoreError, match="too large"):
            open_store(str(tmp_path)).create(str(tmp_path / "x"), b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_join() -> None:
    assert join("s3://b/x/", "a", "b/c") == "s3://b/x/a/b/c"
    assert join("s3://b", "a") == "s3://b/a"
    assert join("/", "a") == "/a"
    assert join("out/", "/a/") == "out/a"


def test_a_disk_needs_no_s3_client() -> None:
    code = "import sys; from pipeline.storage import open_store; open_store('x'); print({'s3fs', 'botocore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
