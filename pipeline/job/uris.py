"""The URIs of a job: all of them changed at once; where they lead on this machine, above its days, into one another."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.errors import JobError
from pipeline.names import WILDCARD, from_here, glob_matcher, glob_prefix, spelt

Filled = TypeVar("Filled", bound=BaseModel)


def with_uris(job: Filled, change: Callable[[str], str]) -> Filled:
    """The job, of whatever kind, with every `uri` in it changed. It is checked again. Raises what `change` raises."""

    def walk(value: Any, *, uri: bool = False) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner, uri=key == "uri") for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, uri=uri) for inner in value]
        return change(value) if uri and isinstance(value, str) else value

    return type(job).model_validate(walk(job.model_dump(mode="json")))


def is_dated(job: BaseModel) -> bool:
    """Does a place of the job depend on the day?"""
    found: list[str] = []

    def look(uri: str) -> str:
        found.append(uri)
        return uri

    with_uris(job, look)
    return any("{date}" in uri for uri in found)


def absolute(uri: str) -> str:
    """A local path from the root, since a worker's working folder is not the driver's; a URI of S3 as it is. A `/` at the end
    stays, it means a folder."""
    if uri.startswith("s3://"):
        return uri
    path = spelt(from_here(uri.removeprefix("file://")))
    return f"{path}/" if uri.endswith("/") and path != "/" else path


def absolute_input(uri: str) -> str:
    """The same of what may be a glob. Raises JobError where the working folder's own name would be read as one."""
    path = absolute(uri)
    if len(WILDCARD.findall(path)) > len(WILDCARD.findall(uri)):
        folder = os.getcwd()
        need = "a working folder without *, ? and [ in its name, or a path from the root with [[] for ["
        raise JobError(f"{uri}: lies in {folder}, which reads as a glob", need=need, do="Run from another folder")
    return path


def above_days(folder: str) -> str:
    """The innermost folder that all days share, of one with `{date}` in its URI; else that one. Raises ValueError when they share
    no bucket."""
    above, date, _ = absolute(folder).partition("{date}")
    if not date:
        return above
    above = above.rpartition("/")[0]
    if above == "s3:/":
        raise ValueError(
            f"output.uri is {folder}; required: one bucket for all days, for the lease that their runs look at. "
            "Put {date} behind the bucket"
        )
    return above or "/"


def holds(source: str, folder: str) -> bool:
    """Would a listing of `source`, a folder or a glob, find Parquet files of ours under `folder`?"""
    label, source = f"{absolute(folder).rstrip('/')}/0123456789ab/data/{'0' * 32}.parquet", absolute(source)
    base = glob_prefix(source)
    return label.startswith(base.rstrip("/") + "/") if base == source else glob_matcher(source)(label)
