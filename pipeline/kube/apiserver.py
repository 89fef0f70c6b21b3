"""The API server of a Kubernetes cluster, through the official client: make, change, delete, follow, read a log.

What stands there and is not ours is never touched. An API server that is away is waited for, since a run does not need us.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from pipeline.errors import Conflict, JobError, NightlabelError, PermissionDenied, Temporary, UnfitError, UnitsLeft, first_line
from pipeline.kube.follow import Progress, is_object, progress_of
from pipeline.kube.kuberay import RayJob
from pipeline.kube.render import KubeObject

PATIENCE_S = 600.0  # an API server that is being upgraded is away for some minutes
_PAUSE_S = 1.0
_TRIES = 5
_WATCH_S = 300
_TIMEOUT_S = (5, 60)  # to connect, to answer
_GOES_ON = "The run goes on without us; the same command follows it again"
_NOUNS = {"ConfigMap": "config_map", "ServiceAccount": "service_account"}
_PLURALS = {kind: f"{kind.lower()}s" for kind in ("RayJob", "RayCronJob", "CronJob", "Role", "RoleBinding")}


class Api:
    """The API server that KUBECONFIG, the default kubeconfig or the pod's service account leads to."""

    def __init__(self, *, patience: float = PATIENCE_S, pause: float = _PAUSE_S) -> None:
        self._patience, self._pause = patience, pause
        try:
            _configure()
        except (config.ConfigException, yaml.YAMLError, TypeError, AttributeError, KeyError, ValueError, OSError) as error:
            # The client checks little of a file before it reads in it.
            need = "a kubeconfig, or a pod with a service account"
            raise UnfitError(f"no way to a Kubernetes cluster ({first_line(error)})", need=need, do="Set KUBECONFIG") from None
        self._core, self._custom = client.CoreV1Api(), client.CustomObjectsApi()

    def find(self, thing: KubeObject) -> dict[str, Any] | None:
        """What stands under the thing's name. Raises Conflict when it is not ours."""
        try:
            with _explained(f"look for {title(thing)}"):
                standing = self._call("get", thing, thing["metadata"]["name"])
        except _Absent:
            return None
        if standing["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") != "nightlabel":
            do = "Give the job another name, or that one"
            raise Conflict(f"{title(thing)} stands there and is not of nightlabel", need="a free name", do=do)
        return standing

    def put(self, thing: KubeObject) -> str:
        """Make it, or make what stands there like it; fields that others have set beside ours stay. Says which it was."""
        for _ in range(_TRIES):
            if self.create(thing):
                return "made"
            standing = self.find(thing)
            if standing is not None and self._replace(thing, standing):
                return "updated"
            time.sleep(self._pause)
        raise Temporary(f"{title(thing)} is changed by others all the time", do="Try again")

    def _replace(self, thing: KubeObject, standing: dict[str, Any]) -> bool:
        """False when it is not what was looked at any more: a controller writes there too."""
        meta = {**standing["metadata"], **{key: value for key, value in thing["metadata"].items() if key != "annotations"}}
        meta["annotations"] = {**standing["metadata"].get("annotations", {}), **thing["metadata"].get("annotations", {})}
        try:
            with _explained(f"change {title(thing)}"):
                self._call("replace", thing, thing["metadata"]["name"], {**standing, **thing, "metadata": meta})
        except (_Absent, _Exists):
            return False
        return True

    def create(self, thing: KubeObject) -> bool:
        """False when something stands there."""
        try:
            with _explained(f"make {title(thing)}"):
                self._call("create", thing, thing)
        except _Exists:
            return False
        except _Absent as error:
            raise _nowhere(thing, error) from None
        return True

    def delete(self, thing: RayJob, standing: dict[str, Any]) -> None:
        """Gone when this returns: KubeRay stops the run, its cluster goes with it. What somebody has made in its place stays."""
        only = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=standing["metadata"].get("uid")))
        since = time.monotonic()
        try:
            while time.monotonic() - since < self._patience:
                with _explained(f"delete {title(thing)}"):
                    self._call("delete", thing, thing["metadata"]["name"], body=only)
                time.sleep(self._pause)
        except (_Absent, _Exists):
            return
        raise Temporary(f"{title(thing)} does not go, for {self._patience:g} s", do="Look at the operator's log")

    def follow(self, thing: RayJob) -> Iterator[Progress]:
        """How it stands, whenever that changes, to its end. Raises UnitsLeft when somebody deletes it, PermissionDenied when we
        may not look any more, Temporary when the API server does not answer for as long as our patience."""
        heard, last, uid = time.monotonic(), None, None
        while last is None or not last.ended:
            try:
                for standing in self._standings(thing):
                    heard, now = time.monotonic(), progress_of(standing)
                    if uid != (uid := standing["metadata"].get("uid")) and last:
                        raise _Absent("another one stands in its place")
                    if now != last:
                        last = now
                        yield now
                    if now.ended:
                        return
            except PermissionDenied as error:
                raise PermissionDenied(error.got, do=f"{error.do}. {_GOES_ON}") from None
            except Temporary as error:
                if isinstance(error, _Absent) and not isinstance(error, _Nothing):
                    raise UnitsLeft(f"{title(thing)} was deleted", do="Apply again to go on from there") from None
                if time.monotonic() - heard > self._patience:
                    raise Temporary(f"{error.got}, for {self._patience:g} s", do=_GOES_ON) from None
            time.sleep(self._pause)

    def _standings(self, thing: RayJob) -> Iterator[dict[str, Any]]:
        """The object now, and whenever it changes, until the watch ends, as watches do."""
        name = thing["metadata"]["name"]
        with _explained(f"follow {title(thing)}", reading=True):
            standing = self._call("get", thing, name)
            yield standing
            events = watch.Watch().stream(
                self._custom.list_namespaced_custom_object,
                *_path(thing),
                field_selector=f"metadata.name={name}",
                resource_version=standing["metadata"].get("resourceVersion"),
                timeout_seconds=_WATCH_S,
                _request_timeout=(_TIMEOUT_S[0], _WATCH_S + 30),
            )
            for event in events:
                if event is None:  # a line that is no JSON
                    continue
                if event["type"] == "DELETED":
                    raise _Absent("deleted")
                if not is_object(event["object"]):
                    raise ValueError
                yield event["object"]

    def logs(self, thing: RayJob) -> Iterator[tuple[str, str]]:
        """(pod, line) of what the driver prints, as the newest submitter's pod hands it on, until that ends or breaks off."""
        meta = thing["metadata"]
        with _explained(f"read the log of {title(thing)}", reading=True):
            pods = self._core.list_namespaced_pod(
                meta["namespace"], label_selector=f"job-name={meta['name']}", _request_timeout=_TIMEOUT_S
            ).items
            for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))[-1:]:
                name = pod.metadata.name
                for line in watch.Watch().stream(self._core.read_namespaced_pod_log, name=name, namespace=meta["namespace"]):
                    yield name, line

    def _call(self, verb: str, thing: KubeObject, *rest: Any, **more: Any) -> dict[str, Any]:
        noun = _NOUNS.get(thing["kind"])
        if noun is None:
            call = getattr(self._custom, f"{verb}_namespaced_custom_object")
            answer = call(*_path(thing), *rest, **more, _request_timeout=_TIMEOUT_S)
        else:
            call = getattr(self._core, f"{verb.replace('get', 'read')}_namespaced_{noun}")
            name, body = rest[:1] if verb != "create" else (), rest[1:] if verb != "create" else rest
            answer = call(*name, thing["metadata"]["namespace"], *body, _request_timeout=_TIMEOUT_S)
        found: dict[str, Any] = self._core.api_client.sanitize_for_serialization(answer)
        if verb == "get" and not is_object(found):  # a page to log in, of what stands before the API server
            raise Temporary(f"of {title(thing)} the server tells nothing", need="an API server of Kubernetes", do="Try again")
        return found


def _configure() -> None:
    # load_config would print, and has read KUBECONFIG when it was imported.
    path = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    if os.environ.get("KUBECONFIG") or os.path.exists(path):
        config.load_kube_config(config_file=path)
    else:
        config.load_incluster_config()


class _Absent(Temporary):
    """404; temporary where somebody else was faster."""


class _Nothing(_Absent):
    """404 for all that is of this kind, or from something before the API server; one that has just come up says so too."""


class _Exists(Temporary):
    """409; the same."""


@contextmanager
def _explained(doing: str, *, reading: bool = False) -> Iterator[None]:
    """The client's errors as ours; with `reading` also those by which it trips over an answer that is none of an API server.
    Raises _Absent and _Exists for what is no error everywhere."""
    try:
        yield
    except ApiException as error:
        raise _reason(doing, error) from None
    except (HTTPError, OSError) as error:
        raise Temporary(f"cannot {doing}: the API server does not answer ({type(error).__name__})", do="Try again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not reading:
            raise
        need = "what an API server of Kubernetes tells"
        raise Temporary(f"cannot {doing}: the answer makes no sense", need=need, do="Try again") from error


def _reason(doing: str, error: ApiException) -> NightlabelError:
    try:
        told = str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        told = ""
    absent = _Absent if told and "find the requested resource" not in told else _Nothing
    told = told or str(error.reason)
    got = f"cannot {doing}: {told.rstrip('.')}"
    if error.status in (401, 403):
        return PermissionDenied(got, do="Log in, or ask for a role that may")
    if error.status in (404, 409):
        return (absent if error.status == 404 else _Exists)(got, do="Try again")
    if error.status in (400, 422):
        return JobError(got, do="Change the job; KubeRay 1.7 or later knows every field that is set")
    return Temporary(got, do="Try again")


def _nowhere(thing: KubeObject, error: _Absent) -> NightlabelError:
    if "namespace" in error.got:
        return UnfitError(error.got, do=f"kubectl create namespace {thing['metadata']['namespace']}, or name another one")
    return UnfitError(error.got, need=f"a cluster that knows {thing['kind']}", do="Install KubeRay, or take --target cronjob")


def _path(thing: KubeObject) -> tuple[str, str, str, str]:
    group, _, version = thing["apiVersion"].partition("/")
    return group, version, thing["metadata"]["namespace"], _PLURALS[thing["kind"]]


def title(thing: KubeObject) -> str:
    return f"{thing['kind']} {thing['metadata']['namespace']}/{thing['metadata']['name']}"
