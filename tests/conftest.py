"""Shared fixtures. The project's own tests make what they need; those that want ../shared/data skip when it is absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from faults import FaultProxy
    from seaweed import Seaweed

    from pipeline.s3 import S3Store

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # read when Ray is imported, as `pipeline.label` sees to it
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# Speed is for benchmarks: a busy machine must not fail a property.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server. Its credentials stand in os.environ for the rest of the test session."""
    import seaweed  # not above: most tests need no S3 client

    server = seaweed.start(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture(scope="session")
def ray_address(s3: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Ray of one node and 2 CPUs that outlives the drivers, so that a test pays for connecting and not for starting it.
    Its workers inherit the credentials of the S3 server, a private HOME, and the tests' folder on their path."""
    from ray.cluster_utils import Cluster

    from pipeline.environment import RAYLET_ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in RAYLET_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # the code under test, wherever that runs
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": 512 * 2**20, "include_dashboard": False},
        )
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def on_ray(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs of this test, in this process and below it, work on the shared Ray."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    return ray_address


@pytest.fixture
def one_day(monkeypatch: pytest.MonkeyPatch) -> str:
    """Today for the dates of jobs, in every time zone; it does not end while a test runs."""
    from datetime import datetime, tzinfo

    from pipeline.job import schedule

    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2026, 11, 25, 12, tzinfo=tz)

    monkeypatch.setattr(schedule, "datetime", Noon)
    return "2026-11-25"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small artifact: ResNet-18 on 32 × 32 pixels, random weights that tell the pictures of `shards` apart."""
    import models

    return models.small_artifact(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def proxied(s3: Seaweed) -> Iterator[tuple[FaultProxy, S3Store]]:
    """A proxy before the S3 server that can misbehave, and a store behind it that loses patience with an answer after 3 s."""
    from faults import fault_proxy

    from pipeline.s3 import S3Store
    from pipeline.spec import S3

    with fault_proxy(s3.port) as running:
        yield running, S3Store(S3(endpoint=running.endpoint, region="us-east-1"), backoff=0.001, timeouts=(60.0, 3.0))


@pytest.fixture
def proxy(proxied: tuple[FaultProxy, S3Store]) -> FaultProxy:
    proxied[0].forget()
    return proxied[0]
