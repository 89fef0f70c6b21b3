"""A small HTTP proxy that misbehaves on request: put it between a client and the S3 test server.

Every request takes the first scripted fault that fits it, or is passed on. One request a connection. The Host header is passed
on as it came, so that signatures stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>scripted</Message></Error>"


@dataclass(frozen=True)
class Fault:
    """What to do to one request. `method` and `path` (a part of path and query) choose it; None and "" take any."""

    kind: Literal[
        "status", "reset", "hang", "delay", "gather", "truncate", "stall", "corrupt", "lost", "overwrite", "edit", "raw"
    ]
    method: str | None = None
    path: str = ""
    status: int = 503
    """status: the answer, without asking the server."""
    code: str = "SlowDown"
    """status: the S3 error code of that answer."""
    after: int = 0
    """truncate, stall, corrupt: bytes of the body that arrive before it happens."""
    seconds: float = 0.0
    """delay: before the request is passed on."""
    headers: tuple[tuple[str, str | None], ...] = ()
    """edit: of the server's answer; None takes one out."""
    answer: bytes = b""
    """raw: all of it, without asking the server."""
    # gather: it is passed on when everything that is scripted has been asked for.
    # overwrite: as a server does that does not know If-None-Match, it answers a refused create with 200.

    def fits(self, method: str, path: str) -> bool:
        return self.method in (None, method) and self.path in path


class FaultProxy:
    """The proxy, in a thread of its own. `requests` logs `METHOD path` of all that came."""

    def __init__(self, port: int) -> None:
        self.requests: list[str] = []
        self._upstream, self._script, self._open = port, list[Fault](), set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faults", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def script(self, *faults: Fault) -> None:
        """Add faults; each happens once, to the first request that it fits."""
        self._script.extend(faults)

    @property
    def pending(self) -> list[Fault]:
        """Scripted faults that have not happened."""
        return list(self._script)

    def forget(self) -> None:
        """Back to the beginning: nothing scripted, nothing logged."""
        self._script.clear()
        self.requests.clear()

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _end(self) -> None:
        self._server.close()
        for writer in self._open:  # a task that hangs waits for its client to leave
            writer.transport.abort()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                head, body = await _request(reader, writer)
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
                self.requests.append(f"{method} {path}")
                if await self._answer(self._take(method, path), head + body, writer) == "hang":
                    await reader.read()
            finally:
                self._open.discard(writer)
                writer.close()

    def _take(self, method: str, path: str) -> Fault | None:
        fault = next((fault for fault in self._script if fault.fits(method, path)), None)
        if fault is not None:
            self._script.remove(fault)
        return fault

    async def _answer(self, fault: Fault | None, request: bytes, writer: asyncio.StreamWriter) -> str:
        """Answer or not; "hang" when the client shall wait until it has had enough."""
        kind = fault.kind if fault else "none"
        if fault is None or kind in ("truncate", "stall", "corrupt", "lost", "overwrite", "edit"):
            answer = await self._forward(request)
        elif kind == "status":
            body = ERROR % fault.code.encode()
            answer = b"HTTP/1.1 %d x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (fault.status, len(body))
            answer += b"" if request.startswith(b"HEAD ") else body
        elif kind == "raw":
            answer = fault.answer
        elif kind == "delay":
            await asyncio.sleep(fault.seconds)
            answer = await self._forward(request)
        elif kind == "gather":
            while self._script:
                await asyncio.sleep(0.01)
            answer = await self._forward(request)
        else:
            answer = b""
        if kind in ("reset", "lost"):
            # RST instead of FIN, as when a peer dies.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return "done"
        if fault and kind in ("truncate", "stall", "corrupt"):
            cut = answer.index(b"\r\n\r\n") + 4 + fault.after
            rest = bytes([answer[cut] ^ 0xFF]) + answer[cut + 1 :] if kind == "corrupt" else b""
            answer = answer[:cut] + rest
        if kind == "overwrite" and b" 412 " in answer.split(b"\r\n", 1)[0]:
            answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        if fault and kind == "edit":
            answer = _edited(answer, dict(fault.headers))
        writer.write(answer)
        await writer.drain()
        return "hang" if kind in ("hang", "stall") else "done"

    async def _forward(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, bytes]:
    """Head, made to close the connection after the answer, and body."""
    lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    if headers.get(b"expect", b"").lower() == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get(b"content-length", 0)))
    kept = [line for line in lines if line.partition(b":")[0].lower() not in (b"connection", b"expect")]
    return b"\r\n".join([*kept, b"Connection: close", b"", b""]), body


def _edited(answer: bytes, headers: dict[str, str | None]) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    names = {name.lower().encode() for name in headers}
    kept = [line for line in head.split(b"\r\n") if line.partition(b":")[0].lower() not in names]
    added = [f"{name}: {value}".encode() for name, value in headers.items() if value is not None]
    return b"\r\n".join([*kept, *added, b"", body])


@contextlib.contextmanager
def fault_proxy(port: int) -> Iterator[FaultProxy]:
    """A proxy in front of the server on `port`, for the length of a `with` block."""
    proxy = FaultProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
