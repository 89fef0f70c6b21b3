"""Tells somebody how a run ended: the receipt as JSON to a command's standard input, or posted to a webhook.

It comes last and changes nothing: what goes wrong here is a line on the screen, never another exit code. No shell is involved.
The webhook's secret, NIGHTLABEL_WEBHOOK_TOKEN, goes where the URL says `{token}`, or else into an Authorization header; it is
sent to that URL only, redirects are not followed, and it stands in no message.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import IO, Any

from pipeline.errors import ExitCode, NightlabelError
from pipeline.nights.lease import Say
from pipeline.report import Receipt
from pipeline.spec import Notify

TOKEN = "NIGHTLABEL_WEBHOOK_TOKEN"
ATTEMPTS = 3
TIMEOUT_S = 10.0  # of a server that says nothing
WEBHOOK_S = 60.0  # of all attempts: one that sends a byte now and then is never silent
COMMAND_S = 60.0
_MOST_SAID = 2**20  # bytes of a command's errors, which lie in memory


def account(job: str, day: str | None, outcome: Receipt | NightlabelError) -> dict[str, Any]:
    """What is told of a run: its receipt, or what stopped it."""
    head = {"job": job, "day": day, "exit_code": outcome.exit_code}
    if isinstance(outcome, Receipt):
        return {**head, "error": None, "error_class": None, "receipt": outcome.as_dict()}
    return {**head, "error": str(outcome), "error_class": type(outcome).__name__, "receipt": None}


def tell(wanted: Notify | None, content: Mapping[str, Any], *, say: Say, pause: float = 1.0) -> None:
    """Does what `wanted` says with `content`; `say` gets a sentence for each thing that went wrong."""
    if wanted is None or (wanted.when == "failure" and content["exit_code"] == ExitCode.DONE):
        return
    body = json.dumps(content, ensure_ascii=False).encode()
    if wanted.command:
        _run(wanted.command, body, say)
    if wanted.webhook is not None:
        said: list[str] = []
        posting = threading.Thread(target=lambda url: said.append(_post(url, body, pause)), args=(wanted.webhook,), daemon=True)
        posting.start()
        posting.join(WEBHOOK_S)
        if trouble := said[0] if said else f"no answer in {WEBHOOK_S:g} s":
            say(f"notify.webhook {wanted.webhook}: {trouble}")


def _run(command: tuple[str, ...], body: bytes, say: Say) -> None:
    """Over when the command itself has ended: no pipe, which what it leaves running would hold open."""
    try:
        with _file() as asked, _file(most=_MOST_SAID) as errors:
            asked.write(body)
            asked.seek(0)
            done = subprocess.run(command, stdin=asked, stdout=subprocess.DEVNULL, stderr=errors, timeout=COMMAND_S, check=False)
            errors.seek(0)
            said = errors.read().rstrip(b"\0").decode("utf-8", "replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        say(f"notify.command {command[0]} was ended after {COMMAND_S:g} s")
    except OSError as error:
        say(f"notify.command {command[0]}: {error.strerror}")
    else:
        if done.returncode:
            say(f"notify.command {command[0]} ended with {done.returncode}" + (f": {said[-1]}" if said else ""))


def _file(most: int | None = None) -> IO[bytes]:
    """One without a name; in memory where there is such a thing, for a full disk may be what is to be told. There nobody writes
    behind the first `most` bytes: whoever tries is told so, and the machine's memory is not filled."""
    if not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile()
    import fcntl

    made = os.memfd_create("notify", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if most is not None:
        os.ftruncate(made, most)
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return open(made, "w+b")


class _Strict(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the 3xx is the answer, and an error


def _post(url: str, body: bytes, pause: float) -> str:
    """What went wrong; "" for nothing."""
    token = os.environ.get(TOKEN, "").strip()
    if not re.fullmatch("[!-~]*", token):  # the errors of http.client would quote it
        return f"{TOKEN} holds characters that HTTP does not carry"
    headers = {"Content-Type": "application/json", "User-Agent": "nightlabel"}
    if token and "{token}" not in url:
        headers["Authorization"] = f"Bearer {token}"
    opener, trouble = urllib.request.build_opener(_Strict), ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(pause * 2**number)
        try:
            request = urllib.request.Request(url.replace("{token}", token), body, headers, method="POST")
            with opener.open(request, timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            error.close()
            trouble = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, HTTPException, ValueError) as error:
            trouble = str(getattr(error, "reason", error)).replace(token or "\0", "***")
    return trouble
