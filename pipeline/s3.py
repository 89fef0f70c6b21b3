"""The S3 store: raw S3 calls on the client that s3fs sets up, one retry loop of our own around each.

s3fs finds credentials, region and connection pool. Its file objects, its listing cache and its retries are not used: an
exception inside an open file still publishes it, the cache holds every key, and a reply lost between the retries of an SDK
cannot be told from a refusal. The price is the table of errors in `s3_errors`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from botocore import exceptions as sdk

from pipeline.errors import InputMissing, PermissionDenied, StoreError, Temporary, Unidentified
from pipeline.names import anything, glob_matcher, glob_prefix
from pipeline.s3_errors import INTERRUPTED, explanation, is_stale, is_temporary, is_throttled, said, status
from pipeline.s3_fetch import CHUNK, Fetch, etag_of, length_of
from pipeline.spec import S3
from pipeline.storage import Object, changed

T = TypeVar("T")

ATTEMPTS = 6
PATIENT = 10  # of a server that asks to be slower, whose prefixes take minutes to scale while half of what comes is refused
LONGEST = 16  # as a multiple of `backoff`: no wait is longer
PAGE = 1000  # keys of one list request, S3's maximum
CONNECTIONS = 32  # of a process: 16 loose images, four ranges of each tar
_BUCKET = re.compile(r"s3://(arn:[^/]+:accesspoint/[^/]+|[^/]*)/?")


@dataclass(frozen=True)
class S3Store:
    """A `Store` on S3. `backoff` is the bound of the first random wait in seconds, doubled each time: 8 s together on average.
    `timeouts` are seconds to connect and seconds without a byte."""

    options: S3
    backoff: float = 0.5
    timeouts: tuple[float, float] = (5.0, 60.0)
    _clients: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # by process, for forks

    def __reduce__(self) -> tuple[object, ...]:
        return S3Store, (self.options, self.backoff, self.timeouts)

    def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
        bucket, name = bucket_and_key(uri)
        prefix, matches = (glob_prefix(name), glob_matcher(name)) if glob else (name, anything)
        alone: Object | None = None
        refused: PermissionDenied | None = None
        if prefix == name:
            matches = anything
            if name and not name.endswith("/"):
                try:
                    alone = self.head(uri)
                except InputMissing:
                    pass
                except Unidentified:
                    raise
                except PermissionDenied as error:  # so S3 says that it is absent to who may list this folder alone
                    refused = error
                if alone is not None and alone.size:
                    yield alone
                    return
                prefix = f"{name}/"
        found = sorted(self._pages(bucket, prefix, matches), key=lambda found: found.uri)
        if refused is not None and not found:
            raise refused
        yield from found or ([alone] if alone else [])  # an object of no bytes beside a folder is its marker

    def head(self, uri: str) -> Object:
        bucket, key = bucket_and_key(uri)

        async def attempt(client: Any) -> Object:
            wanted = {"Bucket": bucket, "Key": key, **self._payer}
            try:
                answer = await client.head_object(**wanted)
            except sdk.ClientError as error:
                if status(error) not in (400, 403):
                    raise
                answer = await client.get_object(**wanted)  # a HEAD's answer has no body, so none of S3's words; a GET is told
                answer["Body"].close()
            return Object(uri, length_of(answer, uri), etag_of(answer, uri))

        return self._retry(attempt, uri)

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Object | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        bucket, key = bucket_and_key(uri)
        fetch = Fetch({"Bucket": bucket, "Key": key, **self._payer}, start, stop, pinned.etag if pinned else None)
        before = 0
        while True:
            try:
                self._retry(fetch.attempt, uri, known=(412, 416))
                break
            except Temporary:
                if fetch.size - before < CHUNK:  # else it gets on, however often it is cut
                    raise
                before = fetch.size
            except sdk.ClientError as error:
                if status(error) == 412 or fetch.size:
                    raise changed(uri) from error
                break  # 416: a range behind the end is empty, as in a slice
        if pinned is not None and fetch.size != max(0, min(stop or pinned.size, pinned.size) - start):
            raise changed(uri)
        return fetch.data

    def create(self, uri: str, data: bytes) -> bool:
        try:
            self._put(uri, data, {"IfNoneMatch": "*"}, known=(304, 412))
        except sdk.ClientError:  # 304 says MinIO of before April 2024
            return False
        return True

    def _put(self, uri: str, data: bytes, condition: dict[str, str], *, known: tuple[int, ...] = ()) -> None:
        bucket, key = bucket_and_key(uri)

        async def attempt(client: Any) -> None:
            checksum = _checksum(data, plain=client.meta.config.request_checksum_calculation == "when_required")
            request = {"Bucket": bucket, "Key": key, **condition, **checksum, **self._encryption, **self._payer}
            await client.put_object(Body=data, **request)

        self._retry(attempt, uri, known=known, writing=True)

    def _pages(self, bucket: str, prefix: str, matches: Callable[[str], bool]) -> Iterator[Object]:
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE, **self._payer}
        while True:
            page = self._retry(partial(_page, request=request), f"s3://{bucket}/{prefix}")
            for entry in page.get("Contents", ()):
                key = entry["Key"]
                if not key.endswith("/") and matches(key):
                    yield Object(uri := f"s3://{bucket}/{key}", entry["Size"], etag_of(entry, uri))
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == request.get("ContinuationToken"):
                got = f"s3://{bucket}/{prefix}: the listing goes on after {PAGE} keys, and the server does not say where"
                raise StoreError(got, need="a server that knows ListObjectsV2", do="Update the server")
            request = {**request, "ContinuationToken": token}

    @property
    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self.options.requester_pays else {}

    @property
    def _encryption(self) -> dict[str, str]:
        asked = {"ServerSideEncryption": self.options.encryption, "SSEKMSKeyId": self.options.kms_key}
        return {name: value for name, value in asked.items() if value}

    def _filesystem(self) -> Any:
        if (found := self._clients.get(os.getpid())) is not None:
            return found
        import s3fs  # 1 s of imports, so not before the first request
        from aiobotocore.session import AioSession

        connect, read = self.timeouts
        session = AioSession()
        session.get_component("event_emitter").register_last("before-parameter-build", _unchecked_range)
        made = s3fs.S3FileSystem(
            anon=self.options.anonymous,
            endpoint_url=self.options.endpoint,
            client_kwargs={"region_name": self.options.region or os.environ.get("AWS_REGION")},
            config_kwargs={
                **{"connect_timeout": connect, "read_timeout": read},
                **{"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS},
            },
            session=session,
            skip_instance_cache=True,
        )
        return self._clients.setdefault(os.getpid(), made)

    def _retry(
        self, attempt: Callable[[Any], Awaitable[T]], uri: str, *, known: tuple[int, ...] = (), writing: bool = False
    ) -> T:
        """Run `attempt` until it succeeds. Raises our errors, and ClientError for the statuses whose meaning the caller knows."""
        number, renewed = 0, False
        while True:
            filesystem = self._filesystem()
            try:
                return self._once(filesystem, attempt, uri)
            except (sdk.ClientError, sdk.BotoCoreError, *INTERRUPTED) as error:
                if status(error) in known:
                    raise
                if is_stale(error) and not renewed:
                    renewed = True
                    if self._clients.get(os.getpid()) is filesystem:  # else another thread has looked for new ones already
                        self._clients.pop(os.getpid(), None)
                elif not is_temporary(error):
                    raise explanation(error, uri, writing) from error
                number += 1
                if number >= (PATIENT if is_throttled(error) else ATTEMPTS):
                    got = f"{self.options.server or 'AWS S3'} did not answer well in {number} attempts, at last: {said(error)}"
                    do = "Check that the endpoint is reachable, then run again; what is done stays done"
                    raise Temporary(f"{uri}: {got}", do=do) from error
            time.sleep(random.uniform(0, self.backoff * min(2 ** (number - 1), LONGEST)))

    def _once(self, filesystem: Any, attempt: Callable[[Any], Awaitable[T]], uri: str) -> T:
        from fsspec.asyn import sync

        async def run() -> T:
            try:
                client = await filesystem.set_session()
            except ValueError as error:  # an endpoint or region that the environment or a profile names
                need = "a server such as https://minio.example:9000, a region such as us-east-1"
                do = "Mend s3 in the job, AWS_ENDPOINT_URL, AWS_REGION or the profile"
                raise StoreError(f"{uri}: {error}", need=need, do=do) from error
            return await attempt(client)

        result: T = sync(filesystem.loop, run)
        return result


async def _page(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    return dict(await client.list_objects_v2(**request))


def _unchecked_range(params: dict[str, Any], **_: object) -> None:
    """Of a range no checksum is asked for: some servers send that of the whole object, S3 itself at times that of its parts."""
    if "Range" in params:
        params.pop("ChecksumMode", None)


def _checksum(data: bytes, *, plain: bool) -> dict[str, str]:
    """As a header. The SDK would send it behind the body over HTTPS, in chunks that many servers do not read. With `plain`, which
    is the SDK's own setting for servers that refuse newer headers, it is the oldest one."""
    if plain:
        return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()}


def bucket_and_key(uri: str) -> tuple[str, str]:
    """(bucket, key); an access point's ARN, which may hold a slash, is a bucket."""
    match = _BUCKET.match(uri)
    assert match is not None
    return match[1], uri[match.end() :]
