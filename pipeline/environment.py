"""What Ray reads from the environment when it is imported, set before that; where a cluster is, and the token for it."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.errors import JobError, UnfitError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

#: Of whatever starts a raylet. Ray ends a worker that was idle for a second while actors leave less than one CPU, so a read
#: task may begin with a new one: 2.4 s of a core (LOG.md, 2026-11-26).
RAYLET_ENVIRONMENT = {"RAY_idle_worker_killing_time_threshold_ms": "3600000"}
# What the user has set stays.
_RAY_ENVIRONMENT = {
    **RAYLET_ENVIRONMENT,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a pass that was left must not bring Ray up again behind our back
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would build an environment per worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # Ray Train would move its workers to a new folder, and relative URIs with them
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core cries wolf on stderr for every pool whose actors may restart
}


def set_ray_environment(*, cluster: bool | None = None) -> None:
    """To be called before Ray is imported. `cluster`: talk to one that is up (as a set RAY_ADDRESS says, when absent) rather
    than start one. Without RAY_AUTH_MODE a cluster is shown the token that is there; a Ray of our own, on loopback and gone
    after the run, needs none, and `ray.init` alone would write one to the home folder."""
    asked = bool(os.environ.get("RAY_ADDRESS")) if cluster is None else cluster
    mode = "token" if asked and has_token() else "disabled"
    for name, value in {**_RAY_ENVIRONMENT, "RAY_AUTH_MODE": mode}.items():
        os.environ.setdefault(name, value)


def has_token() -> bool:
    """Is there a token where Ray looks for one: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    # Not Path.expanduser, which raises where there is no home: a container's user that no passwd knows.
    return os.path.isfile(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"))


@dataclass(frozen=True)
class Address:
    """Where the dashboard of a cluster is, and whether that is this machine."""

    url: str
    loopback: bool


def cluster_address(text: str, *, insecure: bool = False) -> Address:
    """`http://head:8265`, or without http://. A cluster on another machine is only spoken to with a token, or `insecure`.

    Raises JobError when it is no such address, UnfitError without a token.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host = parts.hostname or ""
        fits = parts.scheme in ("http", "https") and host.encode("idna")
    except ValueError:  # a bracket that does not close; a part of the name that is empty, or has more than 63 letters
        fits = False
    if not fits:
        raise JobError(f"the address {text}", need="that of a dashboard, such as http://head:8265", do="Change --address")
    address = Address(f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), _is_loopback(host))
    mode, do = os.environ.get("RAY_AUTH_MODE", "token" if has_token() else "disabled").lower(), "Set RAY_AUTH_TOKEN"
    if mode == "token" and not has_token():
        raise UnfitError("RAY_AUTH_MODE is token and there is none", need="the cluster's token", do=do)
    if mode != "token" and not address.loopback and not insecure:
        do += ", or say --insecure where everyone in the network may run code on the cluster"
        raise UnfitError(f"{address.url} is another machine, and there is no token", need="the cluster's token", do=do)
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
