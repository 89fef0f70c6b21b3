"""A real S3 server for the tests: SeaweedFS on free local ports, in a private folder, with signed access."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sysconfig
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.spec import S3

ACCESS_KEY, SECRET_KEY = "nightlabel-test", "not-a-secret"
NOBODIES = ("nightlabel-driver", "nightlabel-worker")  # access keys that may do what a bucket's policy grants
GRPC = 10_000  # SeaweedFS listens for gRPC that far above each of its four ports
READY_SECONDS = 240


@dataclass
class Seaweed:
    """A running server. `env` holds what a process needs to talk to it."""

    process: subprocess.Popen[bytes]
    endpoint: str
    client: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.client = self.client_of(ACCESS_KEY)

    def client_of(self, access_key: str, *, attempts: int = 5) -> Any:
        """A client that signs as one of the server's identities, and asks again where a busy server hangs up."""
        return botocore.session.get_session().create_client(
            "s3",
            "us-east-1",
            endpoint_url=self.endpoint,
            config=Config(retries={"total_max_attempts": attempts}, connect_timeout=10, read_timeout=60),
            aws_access_key_id=access_key,
            aws_secret_access_key=SECRET_KEY,
        )

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @property
    def options(self) -> S3:
        return S3(endpoint=self.endpoint, region="us-east-1")

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"b-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, uri: str, data: bytes) -> None:
        """Write or overwrite, which our own store cannot."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def start(folder: Path, *, host: str = "127.0.0.1") -> Seaweed:
    """Start a server that keeps everything in `folder`; returns when a signed put and get have succeeded."""
    port = _free_ports()
    actions = {ACCESS_KEY: ["Admin", "Read", "Write", "List", "Tagging"]} | {name: [] for name in NOBODIES}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET_KEY}], "actions": granted}
        for name, granted in actions.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(
            [Path(sysconfig.get_path("scripts")) / "weed", *_arguments(folder, host, port)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A bucket takes seven volumes at once by default, of 200, and a second to get them.
            env={**os.environ, "GOMEMLIMIT": "400MiB", "HOME": str(folder), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        )
    server = Seaweed(process, f"http://{host}:{port}")
    try:
        _wait(server)
    except (BotoCoreError, ClientError) as error:
        server.stop()
        raise RuntimeError(f"SeaweedFS did not start:\n{(folder / 'weed.log').read_text()[-2000:]}") from error
    return server


def _arguments(folder: Path, host: str, port: int) -> list[str]:
    options = {
        **{"dir": folder / "data", "ip": host, "ip.bind": host},
        **{
            "master.port": port + 1,
            "volume.port": port + 2,
            "filer": "true",
            "filer.port": port + 3,
            "s3": "true",
            "s3.port": port,
        },
        **{"s3.config": folder / "s3.json", "s3.iam": "false", "s3.port.iceberg": 0, "s3.port.lance": 0},
        **{"master.peers": "none", "master.telemetry": "false", "master.volumeSizeLimitMB": 512},
        **{"volume.max": 200, "volume.preStopSeconds": 0},
    }
    return ["-logtostderr=true", "server", *(f"-{name}={value}" for name, value in options.items())]


def _wait(server: Seaweed) -> None:
    deadline, bucket = time.monotonic() + READY_SECONDS, f"b-{uuid.uuid4().hex[:12]}"
    client = server.client_of(ACCESS_KEY, attempts=1)  # whose patience is this loop's
    while True:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key="ready", Body=b"yes")
            if client.get_object(Bucket=bucket, Key="ready")["Body"].read() == b"yes":
                client.close()
                return
        except (BotoCoreError, ClientError):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(0.1)


def _free_ports() -> int:
    """A port P such that P..P+3 and P+10000..P+10003 are free now."""
    while True:
        first = random.randrange(11_000, 22_000)  # with GRPC still below 32,768, from where the system gives ports to clients
        try:
            for port in (*range(first, first + 4), *range(first + GRPC, first + GRPC + 4)):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
