"""What a submitted job carries: one zip with the job file and, unless the cluster's image holds it, this package.

The zip becomes the working folder of the driver and stands on the path of every worker. A wheel would not do: Ray installs wheels
with pip, which a cluster without a registry cannot. The same job gives the same bytes, so a second attempt uploads nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shlex
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pipeline.errors import JobError
from pipeline.job.jobfile import asked_days, at_day, dump_job, with_places
from pipeline.job.schedule import settled
from pipeline.job.uris import absolute, absolute_input
from pipeline.spec import Job

MAX_BYTES = 100 * 2**20  # what Ray's dashboard accepts as the body of a request


@dataclass(frozen=True)
class Parcel:
    """A job made ready to travel. `name` begins the ids of all its attempts: job, day, digest of the job as it is shipped.
    `days` are those that --date named when it was packed, or one None."""

    name: str
    job: str
    archive: bytes
    entrypoint: str
    days: tuple[str | None, ...] = (None,)


def pack(template: Job, *, file: str, date: str | None, loopback: bool, code: bool) -> Parcel:
    """The parcel of a job read from `file`, `{date}` left in; `date`: what --date says; `loopback`: the cluster is on this
    machine; `code`: ship the package too.

    Raises JobError for paths that the cluster does not see, for a parcel that is too large, and for no date where one is needed.
    """
    days = asked_days(template, date, name=file)
    at_day(template, days[0], name=file)  # complains where a day is needed and none was given
    text, name = dump_job(_anchored(template, file=file, loopback=loopback)), Path(file).name
    archive = _zip({name: text} | (_package() if code else {}))
    if len(archive) > MAX_BYTES:
        do = "Put nightlabel into the cluster's image and submit with --installed"
        raise JobError(f"{file}: job and package are {len(archive):,} bytes", need=f"at most {MAX_BYTES:,}", do=do)
    parts = [template.name, *dict.fromkeys(day for day in (days[0], days[-1]) if day), hashlib.sha256(text).hexdigest()[:8]]
    words = ["python", "-m", "pipeline", "run", name, *(["--date", settled(date, days, template.schedule)] if date else [])]
    # exec: no shell stands between Ray and the driver, so its signals arrive and its exit code is reported.
    return Parcel("-".join(parts), template.name, archive, f"exec {shlex.join(words)}", days)


def number(submission_id: str, name: str) -> int | None:
    """Which attempt at a parcel of that name an id is; None when it belongs to something else."""
    head, _, tail = submission_id.rpartition("-")
    return int(tail) if head == name and tail.isdecimal() else None


def _anchored(job: Job, *, file: str, loopback: bool) -> Job:
    """The job with URIs that mean the same wherever they are read."""

    def settle(uri: str) -> str:
        if not loopback and not uri.startswith("s3://") and not uri.removeprefix("file://").startswith("/"):
            need = "s3://, or an absolute path that every node of the cluster mounts"
            raise JobError(f"{file}: {uri} is a path in this folder, which the cluster does not see", need=need, do="Change it")
        return absolute(uri)

    for uri in job.input.uris:
        absolute_input(uri)
    return with_places(job, settle, name=file)


def _package() -> dict[str, bytes]:
    """Every file of this package, and the metadata that says which version it is."""
    root = Path(__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    package = {f"pipeline/{path.relative_to(root).as_posix()}": path.read_bytes() for path in files}
    distribution = importlib.metadata.distribution("nightlabel")
    metadata = distribution.read_text("METADATA") or ""
    return package | {f"nightlabel-{distribution.version}.dist-info/METADATA": metadata.encode()}


def _zip(files: dict[str, bytes]) -> bytes:
    sink = BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no time of day: equal content, equal bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return sink.getvalue()
