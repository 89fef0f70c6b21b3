"""A pass without Ray: the stages of `run.chain` one after the other in this process, for tests of what is around it."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pytest

from pipeline import cluster, run


def run_pass(units, job, artifact, *, careful=False, lost=None, only=None):
    """Stands in for `run.run_pass`."""
    preprocess = partial(run.make_preprocess, job, artifact.preprocessing, careful, None)
    stages = run.Timed([("preprocess", preprocess), ("predict", partial(run.make_predict, job, artifact.digest, None))], None)
    for unit in units:
        item = pa.Table.from_pylist([run._item(unit, only)])
        for table in run._read(item, wanted=job.input, max_bytes=job.limits.max_bytes, beside=None):
            yield from stages(table)


@contextmanager
def no_cluster(job, *, tell):
    yield


def without_ray(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run, "run_pass", run_pass)
    patch.setattr(cluster, "cluster", no_cluster)
