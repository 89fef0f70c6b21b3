"""S3 as others speak it: answers of AWS in odd hours, of MinIO, Ceph, GCS, R2 and B2, played by a proxy before a real server."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, FaultProxy
from fsspec.asyn import sync
from seaweed import ACCESS_KEY, SECRET_KEY, Seaweed

from pipeline.cut import list_inputs
from pipeline.errors import InputChanged, InputMissing, NightlabelError, PermissionDenied, StoreError, Temporary, Unidentified
from pipeline.s3 import ATTEMPTS, PATIENT, S3Store
from pipeline.spec import S3, Input
from pipeline.storage import Object

DATA = bytes(range(250)) * 4_000


@pytest.fixture
def store(proxied: tuple[FaultProxy, S3Store]) -> S3Store:
    return proxied[1]


@pytest.fixture
def blob(s3: Seaweed, store: S3Store) -> Object:
    """1 MB."""
    uri = f"s3://{s3.bucket()}/blob"
    s3.put(uri, DATA)
    return store.head(uri)


def raw(status: int, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status} x", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def requests(proxy: FaultProxy, method: str) -> list[str]:
    return [request for request in proxy.requests if request.startswith(method)]


class _Sent(Exception):
    pass


class Wire:
    """What a store of these options would send; nothing is sent."""

    def __init__(self, options: S3) -> None:
        self.store, self.sent = S3Store(options), list[Any]()
        filesystem = self.store._filesystem()
        client = sync(filesystem.loop, filesystem.set_session)
        client.meta.events.register_last("before-send.s3", self._take)

    def _take(self, request: Any, **_: object) -> None:
        self.sent.append(request)
        raise _Sent

    def headers(self, act: Callable[..., object], *given: object, **named: object) -> dict[str, str]:
        """Of the request, names in lower case."""
        with contextlib.suppress(_Sent):
            act(*given, **named)
        sent = self.sent[-1].headers.items()
        return {name.lower(): value if isinstance(value, str) else value.decode() for name, value in sent}

    def url(self, uri: str) -> str:
        self.headers(self.store.head, uri)
        return str(self.sent[-1].url)


# Creating


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_create_is_one_plain_body_with_its_checksum_in_front(s3: Seaweed, scheme: str) -> None:
    """R2, GCS, older Ceph and others do not read a checksum that comes in chunks behind the body."""
    wire = Wire(S3(endpoint=f"{scheme}://r2.example"))
    sent = wire.headers(wire.store.create, "s3://bucket/x", DATA)
    assert sent["x-amz-checksum-crc32"] == base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()
    assert (sent["if-none-match"], sent["content-length"]) == ("*", str(len(DATA)))
    assert {"transfer-encoding", "content-encoding", "x-amz-trailer"}.isdisjoint(sent)


def test_what_a_bucket_wants_said_is_said_of_new_objects(s3: Seaweed) -> None:
    wire = Wire(S3(endpoint=s3.endpoint, encryption="aws:kms", kms_key="alias/labels", requester_pays=True))
    sent = wire.headers(wire.store.create, "s3://bucket/x", DATA)
    said = {name: sent.get(f"x-amz-{name}") for name in ("server-side-encryption", "server-side-encryption-aws-kms-key-id")}
    assert said == {"server-side-encryption": "aws:kms", "server-side-encryption-aws-kms-key-id": "alias/labels"}
    assert sent["x-amz-request-payer"] == "requester"
    assert "x-amz-server-side-encryption" not in wire.headers(wire.store.read, "s3://bucket/x"), "S3 refuses it there"


def test_where_newer_checksums_are_refused_the_oldest_is_sent(
    s3: Seaweed, proxy: FaultProxy, store: S3Store, monkeypatch
) -> None:
    """Backblaze B2 refuses them by name; the SDK's own variables turn them off."""
    says = b"<Error><Code>InvalidArgument</Code><Message>Unsupported header 'x-amz-checksum-crc32' received</Message></Error>"
    proxy.script(Fault("raw", "PUT", answer=raw(400, f"Content-Length: {len(says)}", body=says)))
    with pytest.raises(StoreError, match="Set AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION to when_req"):
        store.create("s3://bucket/x", b"ours")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    wire = Wire(S3(endpoint="https://b2.example"))
    created, read = wire.headers(wire.store.create, "s3://bucket/x", DATA), wire.headers(wire.store.read, "s3://bucket/x")
    assert created["content-md5"] == base64.b64encode(hashlib.md5(DATA).digest()).decode()
    assert not [name for name in created | read if name.startswith(("x-amz-checksum", "x-amz-sdk"))]
    uri = f"s3://{s3.bucket()}/x"
    plain = S3Store(s3.options)
    assert (plain.create(uri, DATA), plain.create(uri, b"other"), plain.read(uri)) == (True, False, DATA)


def test_not_modified_is_not_created(proxy: FaultProxy, store: S3Store, blob: Object) -> None:
    """MinIO of before April 2024 says so of what is there."""
    proxy.script(Fault("raw", "PUT", answer=raw(304)))
    assert store.create(blob.uri, b"other") is False


def test_a_store_without_conditional_creates_is_named_as_that(proxy: FaultProxy, store: S3Store) -> None:
    proxy.script(Fault("status", "PUT", status=501, code="NotImplemented"))
    with pytest.raises(StoreError, match=r"only if it is absent \(If-None-Match: \*\)\. Update the server, or write"):
        store.create("s3://bucket/x", b"ours")


@pytest.mark.parametrize("code", ["BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"])
def test_a_body_that_did_not_arrive_whole_is_sent_again(s3: Seaweed, proxy: FaultProxy, store: S3Store, code: str) -> None:
    proxy.script(Fault("status", "PUT", status=400, code=code))
    assert store.create(f"s3://{s3.bucket()}/x", b"ours")
    assert len(requests(proxy, "PUT")) == 2


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "XMinioStorageFull")])
def test_a_full_store_is_no_matter_of_rights_or_of_time(proxy: FaultProxy, store: S3Store, status: int, code: str) -> None:
    proxy.script(Fault("status", "PUT", status=status, code=code))
    with pytest.raises(StoreError, match="room for the output"):
        store.create("s3://bucket/x", b"ours")
    assert len(proxy.requests) == 1


# Waiting


def test_who_asks_to_be_slower_is_given_more_time(proxy: FaultProxy, store: S3Store, blob: Object) -> None:
    proxy.script(*[Fault("status")] * (PATIENT - 1))
    assert store.read(blob.uri) == DATA
    for fault, attempts in (
        (Fault("status", status=500, code="InternalError"), ATTEMPTS),
        (Fault("status", status=429), PATIENT),
    ):
        proxy.forget()
        proxy.script(*[fault] * PATIENT)
        with pytest.raises(Temporary, match=f"{attempts} attempts.*{fault.code}"):
            store.read(blob.uri)
        assert len(proxy.requests) == attempts


def test_a_read_that_gets_on_may_be_cut_any_number_of_times(
    proxy: FaultProxy, store: S3Store, blob: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.s3.CHUNK", 100_000)
    proxy.script(*[Fault("truncate", "GET", after=70_000)] * 13)
    assert store.read(blob.uri, pinned=blob) == DATA
    proxy.script(*[Fault("truncate", "GET", after=10)] * ATTEMPTS)
    with pytest.raises(Temporary):
        store.read(blob.uri)


def test_sixteen_images_are_read_at_once(proxy: FaultProxy, blob: Object) -> None:
    """The SDK opens ten connections by itself."""
    store = S3Store(S3(endpoint=proxy.endpoint, region="us-east-1"), timeouts=(60.0, 30.0))
    proxy.script(*[Fault("gather", "GET")] * 16)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: store.read(blob.uri, stop=3), range(16))) == {DATA[:3]}
    assert len(requests(proxy, "GET")) == 16, "the rest came when the first had waited for too long"


# Who asks


def test_keys_that_were_renewed_in_the_night_are_found(s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that something else writes anew every hour, as tools of single sign-on and secrets that are mounted do."""
    path = tmp_path / "credentials"

    def write(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {SECRET_KEY}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    uri = f"s3://{s3.bucket()}/x"
    s3.put(uri, DATA)
    write("of-yesterday")
    store = S3Store(s3.options, backoff=0.001)
    with pytest.raises(Unidentified, match="InvalidAccessKeyId"):
        store.read(uri)
    write(ACCESS_KEY)
    with ThreadPoolExecutor(8) as pool:
        assert {read.result() for read in [pool.submit(store.read, uri) for _ in range(8)]} == {DATA}


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "InvalidAccessKeyId")])
def test_stale_keys_are_looked_for_once(proxy: FaultProxy, store: S3Store, blob: Object, status: int, code: str) -> None:
    proxy.script(Fault("status", "GET", status=status, code=code))
    assert store.read(blob.uri) == DATA
    proxy.forget()
    proxy.script(*[Fault("status", "GET", status=status, code=code)] * 3)
    with pytest.raises(Unidentified, match=code):
        store.read(blob.uri)
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    ("code", "expected"),
    [("RequestTimeTooSkewed", Unidentified), ("SignatureDoesNotMatch", Unidentified), ("AccessDenied", PermissionDenied)],
)
def test_why_a_head_is_forbidden_a_get_is_told(
    proxy: FaultProxy, store: S3Store, blob: Object, code: str, expected: type[NightlabelError]
) -> None:
    proxy.script(*[Fault("status", method, status=403, code=code) for method in ("HEAD", "GET")])
    with pytest.raises(expected, match=code) as caught:
        store.head(blob.uri)
    assert type(caught.value) is expected


def test_where_only_heads_are_forbidden_a_get_tells_the_same(proxy: FaultProxy, store: S3Store, blob: Object) -> None:
    proxy.script(Fault("status", "HEAD", status=403, code="AccessDenied"))
    assert store.head(blob.uri) == blob


# Listing


def test_who_may_list_one_folder_only_lists_it_without_a_slash(s3: Seaweed, proxy: FaultProxy, store: S3Store) -> None:
    """S3 says 403 of what is absent, not 404, to who may not list the whole bucket, and `s3://bucket/photos` is absent."""
    root = f"s3://{s3.bucket()}"
    s3.put(f"{root}/photos/1.jpg", DATA)
    forbidden = [Fault("status", method, "/photos", status=403, code="AccessDenied") for method in ("HEAD", "GET")]
    proxy.script(*forbidden)
    assert [item.uri for item in store.list(f"{root}/photos")] == [f"{root}/photos/1.jpg"]
    assert not proxy.pending
    proxy.script(*(dataclasses.replace(fault, path="/nothing") for fault in forbidden))
    with pytest.raises(PermissionDenied, match=f"{root}/nothing: AccessDenied"):
        list(store.list(f"{root}/nothing"))


def test_an_object_of_no_bytes_beside_a_folder_is_its_marker(s3: Seaweed, proxy: FaultProxy, store: S3Store) -> None:
    root = f"s3://{s3.bucket()}"
    s3.put(f"{root}/photos/1.jpg", DATA)
    marker = raw(200, 'ETag: "d41d8cd98f00b204e9800998ecf8427e"', "Content-Length: 0")
    proxy.script(*[Fault("raw", "HEAD", answer=marker)] * 2)
    assert [item.uri for item in store.list(f"{root}/photos")] == [f"{root}/photos/1.jpg"]
    assert [item.uri for item in store.list(f"{root}/empty.jpg")] == [f"{root}/empty.jpg"]


def test_a_folder_that_has_an_objects_name_is_read_where_that_is_no_image(s3: Seaweed, proxy: FaultProxy, store: S3Store) -> None:
    root = f"s3://{s3.bucket()}"
    s3.put(f"{root}/photos/1.jpg", DATA)
    notes = Fault("raw", "HEAD", answer=raw(200, 'ETag: "e"', "Content-Length: 5"))
    proxy.script(notes)
    listing = list_inputs(store, Input(uri=f"{root}/photos", format="images"))
    assert [item.uri for item in listing.inputs] == [f"{root}/photos/1.jpg"]
    assert listing.ignored == {"": 1}, "the object is told of"
    proxy.script(notes)
    with pytest.raises(InputMissing, match=r"notes\.txt: 1 object \(1 \.txt\), no images"):
        list_inputs(store, Input(uri=f"{root}/notes.txt", format="images"))
    proxy.script(notes)
    assert [item.uri for item in list_inputs(store, Input(uri=f"{root}/1.jpg", format="images")).inputs] == [f"{root}/1.jpg"]


@pytest.mark.parametrize("token", ["", "<NextContinuationToken>again</NextContinuationToken>"], ids=["version-1", "repeated"])
def test_a_listing_that_does_not_get_on_is_no_shorter_listing(proxy: FaultProxy, store: S3Store, token: str) -> None:
    entry = "<Contents><Key>1.jpg</Key><Size>1</Size><ETag>e</ETag></Contents>"
    page = f"<ListBucketResult><IsTruncated>true</IsTruncated>{token}{entry}</ListBucketResult>".encode()
    proxy.script(*[Fault("raw", "GET", answer=raw(200, f"Content-Length: {len(page)}", body=page))] * 5)
    with pytest.raises(StoreError, match="required: a server that knows ListObjectsV2"):
        list(store.list("s3://bucket/photos/"))


ODD_KEYS = ("a+b.jpg", "a b.jpg", "100%.jpg", "%2F.jpg", "a%20b.jpg", "tab\t.jpg", "<&>.jpg", "~!*'().jpg", "ü/é.jpg")


def test_keys_come_through_the_url_coding_of_listings(s3: Seaweed, proxy: FaultProxy, store: S3Store) -> None:
    root = f"s3://{s3.bucket()}"
    for key in ODD_KEYS:
        s3.put(f"{root}/{key}", key.encode())
    found = {item.uri.removeprefix(f"{root}/"): item for item in store.list(f"{root}/")}
    assert sorted(found) == sorted(ODD_KEYS)
    assert "encoding-type=url" in requests(proxy, "GET")[0]
    assert {key: store.read(item.uri, pinned=item).decode() for key, item in found.items()} == {key: key for key in ODD_KEYS}


def test_slashes_in_a_row_and_dots_reach_the_server_as_they_are(s3: Seaweed) -> None:
    """SeaweedFS folds them, being a file system; S3 does not."""
    wire = Wire(S3(endpoint="https://minio.example"))
    for key in ("a//b.jpg", "/a.jpg", "a/../b.jpg", "a/./b.jpg", "a+b c.jpg"):
        assert wire.url(f"s3://bucket/{key}") == f"https://minio.example/bucket/{key.replace('+', '%2B').replace(' ', '%20')}"


@pytest.mark.parametrize("sign", [":", "/"])
def test_an_access_point_is_a_bucket(s3: Seaweed, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    arn = f"arn:aws:s3:eu-west-1:123456789012:accesspoint{sign}photos"
    assert (
        Wire(S3(region="us-east-1")).url(f"s3://{arn}/a/b.jpg")
        == "https://photos-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/a/b.jpg"
    )


def test_a_bucket_of_another_region_is_followed_there_or_named(
    s3: Seaweed, proxy: FaultProxy, store: S3Store, blob: Object
) -> None:
    says = b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>"
    moved = raw(301, "x-amz-bucket-region: eu-west-1", f"Content-Length: {len(says)}", body=says)
    proxy.script(*[Fault("raw", "GET", answer=moved)] * 2)
    with pytest.raises(StoreError, match=r"the bucket's own region, eu-west-1, .* Set s3\.region"):
        store.read(blob.uri)
    assert not proxy.pending, "the SDK has tried it there"


# Reading


@pytest.mark.parametrize("form", ['W/"{}"', "{}", "W/{}", '"{}"'])
def test_etags_of_any_form_pin(s3: Seaweed, proxy: FaultProxy, store: S3Store, blob: Object, form: str) -> None:
    """Weak ones come from proxies that compress, and If-Match never matches them; some servers leave the quotes out."""
    odd = Fault("edit", headers=(("ETag", form.format(blob.etag)),))
    other = dataclasses.replace(odd, headers=(("ETag", form.format("other")),))
    proxy.script(odd, odd, other)
    pinned = store.head(blob.uri)
    assert store.read(blob.uri, start=1, stop=5, pinned=pinned) == DATA[1:5]
    with pytest.raises(InputChanged):
        store.read(blob.uri, start=1, stop=5, pinned=pinned)


@pytest.mark.parametrize("name", ["ETag", "Content-Length"])
def test_an_answer_that_lacks_what_is_needed_is_a_sentence(proxy: FaultProxy, store: S3Store, blob: Object, name: str) -> None:
    """GCS unpacks what was stored gzipped: no length, and no ranges."""
    chunked = (("Content-Length", None), ("Transfer-Encoding", "chunked"))
    for act, method in ((store.head, "HEAD"), (store.read, "GET"), (lambda uri: store.read(uri, stop=9), "GET")):
        if name == "Content-Length" and method == "GET":
            answer = raw(200, 'ETag: "e"', "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n")
            proxy.script(Fault("raw", method, answer=answer))
        else:
            proxy.script(Fault("edit", method, headers=((name, None),) if name == "ETag" else chunked))
        with pytest.raises(StoreError, match=f"comes without an? {name}"):
            act(blob.uri)


def test_of_a_range_no_checksum_is_asked_for_nor_believed(s3: Seaweed, proxy: FaultProxy, store: S3Store) -> None:
    """Ceph, BOS and others send that of the whole object with a part of it, which the SDK would hold the part to."""
    uri = f"s3://{s3.bucket()}/x"
    store.create(uri, DATA)
    whole = base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()
    proxy.script(Fault("edit", "GET", headers=(("x-amz-checksum-crc32", whole),)))
    assert store.read(uri, start=5, stop=50) == DATA[5:50]
    assert len(requests(proxy, "GET")) == 1
    wire = Wire(S3(endpoint="https://b2.example"))
    assert wire.headers(wire.store.read, "s3://bucket/x")["x-amz-checksum-mode"] == "ENABLED"
    assert "x-amz-checksum-mode" not in wire.headers(wire.store.read, "s3://bucket/x", stop=9)


def test_fewer_bytes_than_were_pinned_are_another_version(proxy: FaultProxy, store: S3Store, blob: Object) -> None:
    """A server that ignores If-Match, and one that says that what it sends is all there is."""
    proxy.script(Fault("status", "GET", status=416, code="InvalidRange"))
    with pytest.raises(InputChanged):
        store.read(blob.uri, start=500, stop=900, pinned=blob)
    short = raw(200, f'ETag: "{blob.etag}"', "Content-Length: 3", body=b"abc")
    proxy.script(Fault("raw", "GET", answer=short))
    with pytest.raises(InputChanged):
        store.read(blob.uri, stop=900, pinned=blob)
    assert store.read(blob.uri, start=len(DATA), pinned=blob) == b""
    assert store.read(blob.uri, start=len(DATA) - 1, stop=len(DATA) + 9, pinned=blob) == DATA[-1:]


def test_an_archived_object_is_restored_not_allowed(proxy: FaultProxy, store: S3Store, blob: Object) -> None:
    proxy.script(Fault("status", "GET", status=403, code="InvalidObjectState"))
    with pytest.raises(InputMissing, match=r"InvalidObjectState.* Restore it from the archive"):
        store.read(blob.uri, pinned=blob)
