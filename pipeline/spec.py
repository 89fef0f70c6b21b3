"""What is asked: the job as frozen pydantic models. An unknown key is an error, every field carries its documentation.

`jobfile` turns YAML into these models; the reference in jobs/README.md and the JSON schema are generated from them.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import model_validator

from pipeline.job.arithmetic import EngineName, Lane, Precision, check_device, check_engine, check_lane
from pipeline.job.demand import check_cluster
from pipeline.job.fields import Digest, Endpoint, Name, Region, TableName, Uri, Uris, Webhook, Word
from pipeline.job.quantity import Bytes, Count, Fraction, Model, Pixels, Seconds, between, in_bytes, in_pixels, in_seconds
from pipeline.job.resources import Cluster, Resources
from pipeline.job.schedule import Schedule
from pipeline.job.uris import above_days, absolute, absolute_input, holds
from pipeline.names import WILDCARD
from pipeline.rows import check_kept


class S3(Model):
    """How to reach an S3 store. Credentials never stand here: they come from the environment, a profile or a role."""

    endpoint: Endpoint | None = None
    """URL of an S3-compatible server; AWS, or `AWS_ENDPOINT_URL`, when absent."""
    region: Region | None = None
    """Region of the bucket; `AWS_REGION` when absent."""
    anonymous: bool = False
    """Read without credentials (public buckets)."""
    requester_pays: bool = False
    """Accept the transfer cost of a requester-pays bucket."""
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Encryption to ask for with every new object, where the bucket's policy demands it; absent, the bucket's own default."""
    kms_key: Word | None = None
    """ID or ARN of the key for `aws:kms`; the account's own when absent."""

    @model_validator(mode="after")
    def _encrypts(self) -> S3:
        if self.kms_key and not (self.encryption or "").startswith("aws:kms"):
            got = f"kms_key is set and encryption is {self.encryption or 'absent'}"
            raise ValueError(f"{got}; required: aws:kms or aws:kms:dsse beside a key. Set it, or leave the key out")
        return self

    @property
    def server(self) -> str | None:
        """URL of the server: the job's, or the environment's, which the SDK asks in this order. None: AWS, or a profile's."""
        return self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


class Input(Model):
    """Where the images are."""

    uri: Uri | Uris
    """A folder with all that is below it, a file, a glob, or a list of them, all on S3 or all on disk; `{date}` is filled from
    `--date`. On S3 `s3://b/2026` is the folder `2026/` or the object `2026`, and not all that begins so, which is `s3://b/2026**`.
    A glob names files, folders with a `/` at its end. On disk no name that begins with a dot is seen, on S3 none that begins with
    `._`, which is macOS's. Links are followed: what is linked into two folders is two inputs."""
    format: Literal["webdataset", "parquet", "images"] = "webdataset"
    """WebDataset tars, Parquet files with encoded images, or loose image files. Parquet: folders whose names begin with `_` are
    passed over, unless the uri names them; of a Delta or Iceberg table every file there is read, even those it has removed."""
    image_column: Word = "image"
    """Parquet: the column with encoded images, binary or struct<bytes, path>."""
    key_column: Word | None = "key"
    """Parquet: the column that names an image; null numbers the rows instead. A name that comes twice is a DUPLICATE_KEY row. A
    large file is cut into several units, and there only names within one unit are compared."""
    keep: tuple[Word, ...] = ()
    """Sidecars of a tar (`cls`, `json`), as text, or columns of a Parquet file to copy into the output; loose images have none. A
    column has one type in all of an output, which the first file with rows decides, by name. Of others the values are cast, and a
    file with one that would change is UNFIT: the run names it and labels the rest."""
    s3: S3 = S3()
    """How to reach `uri` when it is on S3."""

    @property
    def uris(self) -> tuple[str, ...]:
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    @model_validator(mode="after")
    def _reads(self) -> Input:
        if len({uri.startswith("s3://") for uri in self.uris}) > 1:
            raise ValueError("uri names S3 and the disk; required: one of them, a job reads one store. Make a job for each")
        if self.keep and self.format == "images":
            raise ValueError("keep is set for loose images; required: webdataset or parquet. Drop it, or pack them with sidecars")
        if len(set(self.keep)) < len(self.keep):
            raise ValueError("keep names one twice; required: each once. Drop one")
        if self.format == "parquet" and self.key_column == self.image_column:
            raise ValueError("key_column is the image_column; required: the column that names an image. Set it, or take null")
        return self


class ModelSource(Model):
    """The artifact that labels: one folder with weights, preprocessing and labels."""

    uri: Uri
    """Folder of the artifact."""
    digest: Digest | None = None
    """Refuse to run when the artifact's digest is another one."""
    precision: Precision = "float32"
    """Arithmetic of the model; float16 needs a GPU, int8 an artifact with model.int8.onnx. bfloat16 is for CPUs that have it."""
    engine: EngineName = "auto"
    """What computes. auto: torch on a GPU and for bfloat16, onnxruntime for float32 and int8 on CPUs. openvino, an extra, is the
    fastest on CPUs with AVX-512 or AMX at bfloat16 and int8."""
    s3: S3 = S3()
    """How to reach `uri` when it is on S3."""

    @model_validator(mode="after")
    def _runs(self) -> ModelSource:
        check_engine(self.engine, self.precision)
        return self


class Output(Model):
    """Where the labels go, and which."""

    uri: Uri
    """Folder of the results; every fingerprint gets its own folder under it."""
    layout: Literal["plain", "hive"] = "plain"
    """Name of that folder: the fingerprint, or `fingerprint=<it>`, which duckdb, polars and Spark show as a column, as they do
    with `date={date}/` in `uri`. To be chosen before the first run: another name is another output."""
    top_k: Count = 5
    """How many labels with scores a row keeps, at most the classes that there are."""
    embeddings: bool = False
    """Add the 512 (ResNet-50: 2,048) features before the classifier, float32."""
    probabilities: bool = False
    """Add the probabilities of all classes, float16."""
    s3: S3 = S3()
    """How to reach `uri` when it is on S3."""


class Limits(Model):
    """When enough is enough."""

    max_failed: Fraction = 0.01
    """Largest share of failed rows; above it everything is committed all the same and the exit code is 4."""
    max_pixels: Annotated[Pixels, between(in_pixels, "1px", "1000GP")] = 100 * 10**6
    """Images with more pixels, by their header, become TOO_LARGE rows and are never decoded."""
    max_bytes: Annotated[Bytes, between(in_bytes, "1KiB", "1024TiB")] = 2**30
    """Images with more bytes, encoded, become TOO_LARGE rows and are never decoded; nor are they read, except from Parquet."""
    decode_timeout: Annotated[Seconds, between(in_seconds, "0.1s", "1d")] = 30.0
    """Careful mode, in which images that took a pass down twice are decoded one by one: one that takes longer becomes a
    DECODE_TIMEOUT row. After ten of these in a row each image gets a tenth of the time, 1 s at least, until one is decoded."""
    decode_memory: Annotated[Bytes, between(in_bytes, "16MiB", "1024TiB")] = 2 * 2**30
    """Careful mode: a decoder that needs more becomes a DECODER_CRASH row."""
    deadline: Annotated[Seconds, between(in_seconds, "0.1s", "366d")] | None = None
    """A run that takes longer stops with exit code 5, and the same command goes on. Of several days each has this long. Waiting
    for another run or for the cluster does not count."""


class Publish(Model):
    """A table over the output, brought up to date after every run. The files stay where they are, and are not copied."""

    format: Literal["delta", "iceberg"]
    """Delta: `_delta_log` in the folder of the fingerprint, needs `nightlabel[delta]`. Iceberg: needs `nightlabel[iceberg]`."""
    catalog: Word = "default"
    """Iceberg: the catalog's name in `.pyiceberg.yaml`, or in the environment: PYICEBERG_CATALOG__DEFAULT__URI and its like."""
    table: TableName = ""
    """Iceberg: `namespace.table`; `{fingerprint}` in it keeps the labels of different models apart."""

    @model_validator(mode="after")
    def _named(self) -> Publish:
        if self.format == "iceberg" and not self.table:
            raise ValueError("format is iceberg and table is missing; required: namespace.table. Add it")
        if self.format == "delta" and self.table:
            raise ValueError(f"table is {self.table} and format is delta; required: iceberg for a table by name. Drop one")
        return self


class Notify(Model):
    """Whom to tell how a run ended. What goes wrong there is a line on the screen, and changes no exit code."""

    when: Literal["failure", "always"] = "failure"
    """Only when the exit code is not 0, or every time. An interrupted run tells nobody."""
    command: tuple[Word, ...] = ()
    """Program and arguments, run without a shell; the receipt comes on its standard input as JSON."""
    webhook: Webhook | None = None
    """https URL that the receipt is posted to. NIGHTLABEL_WEBHOOK_TOKEN of the environment goes where it says `{token}`, or else
    into the header `Authorization: Bearer`."""

    @model_validator(mode="after")
    def _somebody(self) -> Notify:
        if not self.command and self.webhook is None:
            raise ValueError("it names nobody; required: command or webhook. Give one")
        return self


class Job(Model):
    """One labelling job."""

    kind: Literal["label"] = "label"
    """What the job does."""
    name: Name
    """Lower case letters, digits and dashes, at most 50."""
    input: Input
    """Where the images are."""
    model: ModelSource
    """The artifact that labels."""
    output: Output
    """Where the labels go, and which."""
    decode: Literal["exact", "fast"] = "exact"
    """exact: pixels within 2 of 255 levels of Pillow's. fast: a JPEG at least twice as large as the model wants is decoded at a
    half, a quarter or an eighth; one of 64 is labelled both ways, and the manifest says how many labels stayed the same."""
    decode_lane: Lane = "cpu"
    """What decodes. cpu: the actors of preprocess. gpu: plain JPEGs on the GPU, several times as fast, others on the CPUs. both:
    plain JPEGs on either side, for many cores beside a small GPU. These need `nightlabel[gpu-decode]`. The pixels are the same to
    the bit, so a run may go on with another lane; one of 512 images is labelled both ways and compared."""
    resources: Resources = Resources()
    """What the job takes."""
    cluster: Cluster | None = None
    """What the job is meant for."""
    limits: Limits = Limits()
    """When enough is enough."""
    schedule: Schedule | None = None
    """When to run."""
    publish: Publish | None = None
    """A table to register the files in."""
    notify: Notify | None = None
    """Whom to tell how a run ended."""

    def from_root(self) -> Job:
        """The job with every local path absolute: what goes to workers. Raises JobError for an input that cannot be."""
        sections: dict[str, Model] = {
            "input": self.input.model_copy(update={"uri": tuple(map(absolute_input, self.input.uris))}),
            "model": self.model.model_copy(update={"uri": absolute(self.model.uri)}),
            "output": self.output.model_copy(update={"uri": absolute(self.output.uri)}),
        }
        return self.model_copy(update=sections)

    @model_validator(mode="after")
    def _fits(self) -> Job:
        delta = self.publish is not None and self.publish.format == "delta"
        check_kept(self.input.keep, hive=self.output.layout == "hive", delta=delta)
        if WILDCARD.search(self.output.uri):
            raise ValueError(f"output.uri is {self.output.uri}; required: a folder, no pattern of *, ? or [. Take another name")
        if self.input.format == "parquet" and any(holds(uri, self.output.uri) for uri in self.input.uris):
            raise ValueError(
                f"output.uri is {self.output.uri}, inside of the input: the next run would read these labels as images; "
                "required: a place beside it. Take another output.uri"
            )
        if self.publish is not None and self.output.probabilities:
            raise ValueError("publish: Delta and Iceberg have no float16, as output.probabilities are. Drop one of the two")
        if self.schedule is not None:
            above_days(self.output.uri)
        check_device(self.model.engine, self.model.precision, gpus=self.resources.predict.gpus_per_actor)
        check_lane(self.decode_lane, gpus=self.resources.predict.gpus_per_actor, actors=self.resources.preprocess.actors)
        if self.cluster is not None:
            check_cluster(self.resources, self.cluster)
        return self
