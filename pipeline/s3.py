"""The S3 store: raw S3 calls on the client that s3fs sets up, one retry loop of our own around each.

s3fs finds credentials, region and connection pool. Its file objects, its listing cache and its retries are not used: an
exception inside an open file still publishes it, the cache holds every key, and a reply lost between the retries of an SDK
cannot be told from a refusal. The price is the table of errors in `s3_errors`.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from botocore import exceptions as sdk

from pipeline.errors import InputMissing, StoreError, Temporary
from pipeline.names import anything, glob_matcher, glob_prefix
from pipeline.s3_errors import INTERRUPTED, explanation, is_temporary, said, status
from pipeline.spec import S3
from pipeline.storage import Object, changed

T = TypeVar("T")

ATTEMPTS = 6
PAGE = 1000  # keys of one list request, S3's maximum
CHUNK = 2**20  # what a resumed read can lose at most


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
        bucket, name = _split(uri)
        prefix, matches = (glob_prefix(name), glob_matcher(name)) if glob else (name, anything)
        if prefix == name:
            if name and not name.endswith("/"):
                try:
                    yield self.head(uri)
                    return
                except InputMissing:
                    prefix = f"{name}/"
            matches = anything
        yield from sorted(self._pages(bucket, prefix, matches), key=lambda found: found.uri)

    def head(self, uri: str) -> Object:
        bucket, key = _split(uri)

        async def attempt(client: Any) -> Object:
            wanted = {"Bucket": bucket, "Key": key, **self._payer}
            try:
                answer = await client.head_object(**wanted)
            except sdk.ClientError as error:
                if status(error) == 400:  # what a HEAD is answered has no body, so none of S3's words; a GET is told them
                    (await client.get_object(**wanted, Range="bytes=0-0"))["Body"].close()
                raise
            return Object(uri, answer["ContentLength"], answer["ETag"].strip('"'))

        return self._retry(attempt, uri)

    def read(self, uri: str, *, start: int = 0, stop: int | None = None, pinned: Object | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        bucket, key = _split(uri)
        fetch = _Fetch({"Bucket": bucket, "Key": key, **self._payer}, start, stop, pinned.etag if pinned else None)
        try:
            self._retry(fetch.attempt, uri)
        except sdk.ClientError as error:
            if status(error) == 412 or fetch.size:
                raise changed(uri) from error
            # 416: a range behind the end is empty, as in a slice
        return b"".join(fetch.pieces)

    def create(self, uri: str, data: bytes) -> bool:
        bucket, key = _split(uri)

        async def attempt(client: Any) -> bool:
            await client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", ChecksumAlgorithm="CRC32", **self._payer)
            return True

        try:
            return self._retry(attempt, uri, writing=True)
        except sdk.ClientError as error:
            if status(error) == 412:
                return False
            raise

    def _pages(self, bucket: str, prefix: str, matches: Callable[[str], bool]) -> Iterator[Object]:
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE, **self._payer}
        while True:
            page = self._retry(partial(_page, request=request), f"s3://{bucket}/{prefix}")
            for entry in page.get("Contents", ()):
                key = entry["Key"]
                if not key.endswith("/") and matches(key):
                    yield Object(f"s3://{bucket}/{key}", entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            request = {**request, "ContinuationToken": page["NextContinuationToken"]}

    @property
    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self.options.requester_pays else {}

    def _filesystem(self) -> Any:
        if (found := self._clients.get(os.getpid())) is not None:
            return found
        import s3fs  # 1 s of imports, so not before the first request

        connect, read = self.timeouts
        made = s3fs.S3FileSystem(
            anon=self.options.anonymous,
            endpoint_url=self.options.endpoint,
            client_kwargs={"region_name": self.options.region or os.environ.get("AWS_REGION")},
            config_kwargs={"connect_timeout": connect, "read_timeout": read, "retries": {"total_max_attempts": 1}},
            skip_instance_cache=True,
        )
        return self._clients.setdefault(os.getpid(), made)

    def _retry(self, attempt: Callable[[Any], Awaitable[T]], uri: str, *, writing: bool = False) -> T:
        """Run `attempt` until it succeeds. Raises our errors, and ClientError for 412 and 416, whose meaning the caller knows."""
        from fsspec.asyn import sync

        filesystem = self._filesystem()

        async def run() -> T:
            try:
                client = await filesystem.set_session()
            except ValueError as error:  # an endpoint or region that the environment or a profile names
                need = "a server such as https://minio.example:9000, a region such as us-east-1"
                do = "Mend s3 in the job, AWS_ENDPOINT_URL, AWS_REGION or the profile"
                raise StoreError(f"{uri}: {error}", need=need, do=do) from error
            return await attempt(client)

        trouble = Exception()
        for number in range(ATTEMPTS):
            if number:
                time.sleep(random.uniform(0, self.backoff * 2 ** (number - 1)))
            try:
                result: T = sync(filesystem.loop, run)
                return result
            except (sdk.ClientError, sdk.BotoCoreError, *INTERRUPTED) as error:
                if status(error) in (412, 416):
                    raise
                if not is_temporary(error):
                    raise explanation(error, uri, writing) from error
                trouble = error
        where = self.options.server or "AWS S3"
        raise Temporary(
            f"{uri}: {where} did not answer well in {ATTEMPTS} attempts, at last: {said(trouble)}",
            do="Check that the endpoint is reachable, then run again; what is done stays done",
        ) from trouble


@dataclass
class _Fetch:
    """One ranged read over several attempts: each continues behind the last byte that arrived, on the same version."""

    request: dict[str, str]
    start: int
    stop: int | None
    etag: str | None
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    expected: int = -1

    async def attempt(self, client: Any) -> None:
        if self.size == self.expected:  # the connection broke behind the last byte
            return
        request, at = dict(self.request), self.start + self.size
        if self.etag is not None:
            request["IfMatch"] = f'"{self.etag}"'
        if at or self.stop is not None:  # a range of an empty object is an error
            request["Range"] = f"bytes={at}-{'' if self.stop is None else self.stop - 1}"
        answer = await client.get_object(**request)
        etag, end = answer["ETag"].strip('"'), self._end(answer, at) if "Range" in request else answer["ContentLength"]
        if etag != (self.etag or etag):  # If-Match is ignored
            raise changed(f"s3://{self.request['Bucket']}/{self.request['Key']}")
        self.etag = etag
        arrived, before = self.size, len(self.pieces)
        self.expected = end - self.start
        try:
            async with answer["Body"] as body:
                async for chunk in body.iter_chunks(CHUNK):
                    self.pieces.append(chunk)
                    self.size += len(chunk)
        except sdk.FlexibleChecksumError:  # S3 sends a checksum with whole objects; which byte is wrong it does not tell
            del self.pieces[before:]
            self.size = arrived
            raise
        if self.size != self.expected:  # some servers give less than they are asked for: the rest is asked for again
            raise sdk.IncompleteReadError(actual_bytes=self.size, expected_bytes=self.expected)

    def _end(self, answer: dict[str, Any], at: int) -> int:
        """Where the bytes end that are wanted of the object, as far as it goes. Raises StoreError where others are given."""
        span = re.match(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if span is None and at == 0 and self.stop is not None and answer["ContentLength"] <= self.stop:
            return int(answer["ContentLength"])  # a server may answer a range of all of it with all of it
        if span is None or int(span[1]) != at:
            raise StoreError(f"{self.request['Bucket']}: the server ignores ranges", need="an S3 server that serves them")
        return int(span[3]) if self.stop is None else min(self.stop, int(span[3]))


async def _page(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    return dict(await client.list_objects_v2(**request))


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
