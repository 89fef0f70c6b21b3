"""One ranged read from S3 over several attempts: each continues behind the last byte that arrived, on the same version.

Servers differ in what they answer: another version, more or less than was asked for, no range, no length. What is not the bytes
that were asked for is an error here, whatever the status says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from botocore import exceptions as sdk

from pipeline.errors import StoreError
from pipeline.storage import changed

CHUNK = 2**20  # what a resumed read can lose at most
_WEAK = "W/"  # RFC 9110: If-Match never matches such an etag; what is answered is compared all the same


def etag_of(answer: dict[str, Any], uri: str) -> str:
    """Unquoted. Raises StoreError where there is none."""
    etag = str(answer.get("ETag", ""))
    weak = _WEAK if etag.startswith(_WEAK) else ""
    if not (bare := etag.removeprefix(weak).strip('"')):
        raise StoreError(f"{uri}: comes without an ETag", need="an S3 server that tells one version from another")
    return weak + bare


def length_of(answer: dict[str, Any], uri: str) -> int:
    """In bytes. Raises StoreError where it is not told: what was cut would look whole."""
    length = answer.get("ContentLength")
    if length is None:  # GCS unpacks what was stored with Content-Encoding: gzip
        do = "Where it was stored with Content-Encoding: gzip, store it without"
        raise StoreError(f"{uri}: comes without a Content-Length", need="an object that is sent as it is stored", do=do)
    return int(length)


@dataclass
class Fetch:
    """Bytes [start, stop) of an object. `attempt` is called until it raises nothing; then `data` are they."""

    request: dict[str, str]
    start: int
    stop: int | None
    etag: str | None
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    expected: int = -1

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def uri(self) -> str:
        return f"s3://{self.request['Bucket']}/{self.request['Key']}"

    async def attempt(self, client: Any) -> None:
        if self.size == self.expected:  # the connection broke behind the last byte
            return
        request, at = dict(self.request), self.start + self.size
        if self.etag is not None and not self.etag.startswith(_WEAK):
            request["IfMatch"] = f'"{self.etag}"'
        if at or self.stop is not None:  # a range of an empty object is an error
            request["Range"] = f"bytes={at}-{'' if self.stop is None else self.stop - 1}"
        answer = await client.get_object(**request)
        arrived, before = self.size, len(self.pieces)
        try:
            async with answer["Body"] as body:
                etag, end = etag_of(answer, self.uri), self._end(answer, at, ranged="Range" in request)
                if etag != (self.etag or etag):  # If-Match is ignored
                    raise changed(self.uri)
                self.etag, self.expected = etag, end - self.start
                async for chunk in body.iter_chunks(CHUNK):
                    self.pieces.append(chunk)
                    self.size += len(chunk)
        except sdk.FlexibleChecksumError:  # S3 sends a checksum with whole objects; which byte is wrong it does not tell
            del self.pieces[before:]
            self.size = arrived
            raise
        if self.size != self.expected:  # some servers give less than they are asked for: the rest is asked for again
            raise sdk.IncompleteReadError(actual_bytes=self.size, expected_bytes=self.expected)

    def _end(self, answer: dict[str, Any], at: int, *, ranged: bool) -> int:
        """Where the bytes end that are wanted of the object, as far as it goes. Raises StoreError where others are given."""
        if not ranged:
            return length_of(answer, self.uri)
        span = re.match(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if span is None and at == 0 and self.stop is not None and length_of(answer, self.uri) <= self.stop:
            return length_of(answer, self.uri)  # a server may answer a range of all of it with all of it
        if span is None or int(span[1]) != at:
            raise StoreError(f"{self.uri}: the server ignores ranges", need="an S3 server that serves them")
        return int(span[3]) if self.stop is None else min(self.stop, int(span[3]))
