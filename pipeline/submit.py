"""Beside the chain: jobs sent to a cluster over the Ray Jobs API, followed to their end, with the driver's own exit code.

The submission id follows from the job, so whoever submits it again finds the attempt that runs and follows that one; a reply that
was lost runs nothing twice. A finished attempt makes room for the next, which labels only what is left. Ray's status says how a
driver ended and no more: a run is complete when its manifest is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from pipeline.environment import Address, has_token
from pipeline.errors import ExitCode, JobError, PermissionDenied, Temporary, UnfitError
from pipeline.ship import Parcel, number

MARK = "nightlabel"  # the metadata that tells our jobs from others
RAY = ".".join(ray.__version__.split(".")[:2])  # the code that is shipped runs on this one

_TIMEOUT_S = 30.0  # of a request; Ray's client has none
_QUIET_S = 30.0  # a log that says nothing for so long is asked for again: the connection may be half open
_PATIENCE_S = 300.0  # how long a cluster that was reached may be away; a head restarts in less
_TRIES = 5
PAUSE_S = 1.0  # between two tries, twice as long each time, and two connections to a log
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_BUSY = (429, 502, 503, 504)  # mostly of a proxy, with a page that is no answer of Ray's
_STATUS = re.compile(r"Request failed with status code (\d{3}): ")

for _name in ("dashboard_sdk", "modules.job.sdk", "modules.dashboard_sdk"):  # they tell every upload and every closed connection
    logging.getLogger(f"ray.dashboard.{_name}").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Submission:
    """One submission as Ray tells it. `code`: the driver's exit code, None while it runs or when Ray lost it."""

    id: str
    status: str
    message: str
    trouble: str | None
    started: float | None
    ended: float | None
    code: int | None

    @property
    def over(self) -> bool:
        return self.status in _ENDED

    def exit_code(self) -> int:
        """The driver's own exit code; that of a shell for a signal. Raises Temporary or UnfitError when it never got that far."""
        if self.status == "STOPPED":
            return ExitCode.TERMINATED
        if self.code is not None:
            return self.code if self.code >= 0 else 128 - self.code
        got = f"{self.id}: {(self.message.splitlines() or ['no reason given'])[0]}"
        if self.trouble == "RUNTIME_ENV_SETUP_FAILURE":
            raise UnfitError(got, do="Mend what the cluster complains of, and submit again")
        raise Temporary(got, do="What is committed stays; submit again")


class _Client(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        response = super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **options)
        if response.status_code in _BUSY:
            response.raise_for_status()
        return response


class Connection:
    """The Jobs API at one address. Raises PermissionDenied when the token is not the cluster's, Temporary when nothing answers,
    UnfitError when something else does."""

    def __init__(self, address: Address) -> None:
        self.url, self.loopback = address.url, address.loopback
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # else a RAY_ADDRESS that is set wins over what the client is given
        with self._reached():
            self._client = _Client(self.url)

    def check_version(self) -> None:
        """Raises UnfitError when the cluster's Ray is not the one that the shipped code is written for."""
        with self._reached():
            version = str(self._client._do_request("GET", "/api/version").json().get("ray_version"))
        if version.split(".")[:2] != RAY.split("."):
            do = "Bring the cluster up with that, or submit with --installed to an image that holds its own nightlabel"
            raise UnfitError(f"{self.url} runs Ray {version}", need=f"Ray {RAY}", do=do)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """What the client may raise, as errors of ours."""
        try:
            yield
        except AuthenticationError:
            got = f"{self.url} does not accept {'this token' if has_token() else 'a request without token'}"
            do = "Set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"
            raise PermissionDenied(got, do=do) from None
        except requests.JSONDecodeError:
            do = "Check the address"
            raise UnfitError(f"{self.url} is no Ray dashboard", need="the dashboard of a Ray cluster", do=do) from None
        except (requests.RequestException, ConnectionError) as error:
            reason = "no answer in time" if isinstance(error, requests.Timeout) else "no connection"
            if isinstance(error, requests.HTTPError) and error.response is not None:
                reason = f"the answer is {error.response.status_code} {error.response.reason}"
            do = "Check the address and that the cluster is up, and try again"
            raise Temporary(f"{self.url}: {reason}", need="the dashboard of a Ray cluster", do=do) from None
        except RuntimeError as error:
            self._refused(str(error))

    def _refused(self, text: str) -> NoReturn:
        status = _STATUS.search(text)
        # Of a traceback, what it says.
        reason = _STATUS.sub("", [line for line in text.splitlines() if line.strip(" .")][-1]).rstrip(".")
        if status and status[1] == "404":
            raise JobError(f"{self.url}: {reason}", do="nightlabel list shows what it knows")
        if status and status[1].startswith("5"):
            raise Temporary(f"{self.url}: {reason}", do="Try again")
        raise UnfitError(f"{self.url}: {reason}", do="Check the address and the cluster's version of Ray")

    def attempts(self, name: str | None = None) -> list[Submission]:
        """Our submissions, oldest first; with `name` those of one parcel, in the order of their numbers."""
        with self._reached():
            found = [item for item in self._client.list_jobs() if item.submission_id and MARK in (item.metadata or {})]
        attempts = sorted((_attempt(item) for item in found), key=lambda item: item.started or 0.0)
        if name is None:
            return attempts
        return sorted((item for item in attempts if number(item.id, name)), key=lambda item: number(item.id, name) or 0)

    def attempt(self, submission_id: str) -> Submission:
        """Raises JobError when the cluster does not know it."""
        with self._reached():
            return _attempt(self._client.get_job_info(submission_id))

    def submit(self, parcel: Parcel) -> tuple[Submission, bool]:
        """(the attempt that is under way, whether it is a new one): a running attempt is joined, else the next one begins."""
        earlier = self.attempts(parcel.name)
        if earlier and not earlier[-1].over:
            return earlier[-1], False
        last = number(earlier[-1].id, parcel.name) or 0 if earlier else 0
        submission_id = f"{parcel.name}-{last + 1}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "parcel.zip")
            path.write_bytes(parcel.archive)
            return self._post(parcel, submission_id, str(path))

    def _post(self, parcel: Parcel, submission_id: str, archive: str) -> tuple[Submission, bool]:
        """Asks until the cluster has the job: a lost reply is told from a lost request by looking for the id."""
        for tried in range(_TRIES):
            try:
                with self._reached():
                    self._client.submit_job(
                        entrypoint=parcel.entrypoint,
                        submission_id=submission_id,
                        runtime_env={"working_dir": archive},
                        metadata={MARK: parcel.job},
                    )
            except (Temporary, UnfitError) as error:
                with contextlib.suppress(JobError, Temporary):
                    return self.attempt(submission_id), tried > 0 or "already exists" not in str(error)
                if isinstance(error, UnfitError) or tried == _TRIES - 1:
                    raise
                time.sleep(PAUSE_S * 2**tried)
            else:
                return self.attempt(submission_id), True
        raise AssertionError("unreachable")

    def stop(self, submission_id: str) -> Submission:
        """Ask the driver to end (SIGTERM, SIGKILL after 3 s), and wait until it has."""
        with self._reached():
            self._client.stop_job(submission_id)
        deadline = time.monotonic() + _TIMEOUT_S
        while not (attempt := self.attempt(submission_id)).over and time.monotonic() < deadline:
            time.sleep(0.3)
        return attempt

    def logs(self, submission_id: str) -> str:
        """What the driver has said so far."""
        with self._reached():
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str) -> Iterator[str]:
        """What the driver says, from its first word to its end, over as many connections as that takes."""
        self.attempt(submission_id)
        said, away = 0, None
        while True:
            arrived = 0
            for chunk in self._tail(submission_id):
                fresh = chunk[max(0, said - arrived) :]  # each connection tells the log from its beginning
                arrived += len(chunk)
                if fresh:
                    said, away = arrived, None
                    yield fresh
            try:
                if self.attempt(submission_id).over:
                    return
                away = None
            except JobError as error:  # it was known: a head that has started anew remembers no job
                raise Temporary(error.got, do="What is committed stays; submit again") from None
            except Temporary as error:
                away = away or time.monotonic()
                if time.monotonic() - away > _PATIENCE_S:
                    raise Temporary(error.got, do="The job may go on: nightlabel wait joins it again, submit too") from None
            time.sleep(PAUSE_S)

    def _tail(self, submission_id: str) -> Iterator[str]:
        """The chunks of one connection, by a thread of its own: a signal must not end inside of an event loop, which hides it."""
        chunks: queue.Queue[str | None] = queue.Queue()

        async def tail() -> None:
            stream = aiter(self._client.tail_job_logs(submission_id))
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    async with asyncio.timeout(_QUIET_S):
                        chunk = await anext(stream)
                    chunks.put(chunk)

        def run() -> None:
            try:
                asyncio.run(tail())
            except (aiohttp.ClientError, OSError, RuntimeError, RayError):  # `follow` asks whether the job has ended
                pass
            finally:
                chunks.put(None)

        threading.Thread(target=run, daemon=True).start()
        while (chunk := chunks.get()) is not None:
            yield chunk


def _attempt(item: Any) -> Submission:
    started, ended = ((time_ms / 1000 if time_ms else None) for time_ms in (item.start_time, item.end_time))
    told = (item.submission_id, str(item.status), item.message or "", item.error_type)
    return Submission(*told, started, ended, code=item.driver_exit_code)
