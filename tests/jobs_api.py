"""A small Jobs API that misbehaves on request: what Ray's dashboard answers, kept in memory, with logs that break off."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from aiohttp import web


class JobsApi:
    """The server, in a thread of its own. `jobs` holds what was submitted; `log` is what every driver says; `breaks` are the
    lengths after which the next connections to a log break off; `fail` maps `METHOD path` to the statuses of the next answers."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log, self.ray_version = "", "2.60.0"
        self.breaks: list[int] = []
        self.fail: dict[str, list[int]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()

    def end(self, submission_id: str, **fields: Any) -> None:
        """Later questions hear that the driver has ended."""
        self.jobs[submission_id] |= {"end_time": 2_000, **fields}

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _begin(self) -> str:
        app = web.Application(client_max_size=2**27, middlewares=[self._failing])
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/packages/{rest:.*}", self._no_package),
                web.put("/api/packages/{rest:.*}", self._version),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._info),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    @web.middleware
    async def _failing(self, request: web.Request, handler: Any) -> web.StreamResponse:
        statuses = self.fail.get(f"{request.method} {request.path}", [])
        if statuses and (status := statuses.pop(0)) > 0:
            return web.Response(status=status, text="scripted")
        answer = await handler(request)
        if statuses and statuses[0] == -1:  # done, and the answer is lost
            statuses.pop(0)
            request.transport.abort()
        return answer

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.ray_version})

    async def _no_package(self, _: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if name in self.jobs:
            return web.Response(
                status=500, text=f"Traceback\nValueError: Job with submission_id {name} already exists. Another one.\n"
            )
        known = {"submission_id": name, "entrypoint": asked["entrypoint"], "metadata": asked["metadata"]}
        self.jobs[name] = known | {"type": "SUBMISSION", "status": "RUNNING", "start_time": 1_000 + len(self.jobs)}
        return web.json_response({"job_id": name, "submission_id": name})

    async def _info(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in self.jobs:
            return web.Response(status=404, text=f"Job {name} does not exist")
        return web.json_response(self.jobs[name])

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        length = self.breaks.pop(0) if self.breaks else len(self.log)
        for at in range(0, length, 7):
            await socket.send_str(self.log[at : min(at + 7, length)])
        if length < len(self.log):
            request.transport.abort()
        else:
            self.end(request.match_info["id"], status="SUCCEEDED", driver_exit_code=0)
        return socket


@contextlib.contextmanager
def jobs_api() -> Iterator[JobsApi]:
    server = JobsApi()
    try:
        yield server
    finally:
        server.close()
