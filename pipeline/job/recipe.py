"""What is asked of model preparation, frozen pydantic models like `spec.Job`: quantize and evaluate jobs, and what all share.

Each job turns an artifact and shards into an artifact or a report. Inputs are those of labelling: the same readers, the same
preprocessing. Jobs that train are in `training`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from pipeline.job.fields import Digest, Name, Uri, Word
from pipeline.job.quantity import Count, Fraction, Model, Positive
from pipeline.rows import PREPARED
from pipeline.spec import S3, Input, ModelSource


def _label(value: str) -> str:
    if value in PREPARED:
        raise ValueError("a name that image rows have no column of already")
    return value


Label = Annotated[Word, AfterValidator(_label)]
FOLDER = "folder"  # the label of loose images


def check_label(label: str | None, key: str | None, wanted: Input) -> None:
    """Raises ValueError for a label that loose images cannot have, and for a key in what is no object."""
    if wanted.format == "images" and label not in (FOLDER, None):
        got = f"label is {label}, and loose images have no sidecars"
        raise ValueError(
            f"{got}; required: {FOLDER}, the one that each lies in. Set label: {FOLDER}, or pack them with their labels"
        )
    if key is not None and (label is None or wanted.format == "images"):
        raise ValueError(
            f"label_key is {key}, and label is {label or 'null'}; required: a sidecar or column. Leave label_key out"
        )


class Start(Model):
    """An artifact to begin from."""

    uri: Uri
    """Folder of the artifact."""
    digest: Digest | None = None
    """Refuse to run when the artifact's digest is another one."""
    s3: S3 = S3()
    """How to reach `uri` when it is on S3."""


class Folder(Model):
    """Where the result goes."""

    uri: Uri
    """Folder of the new artifact or report."""
    s3: S3 = S3()
    """How to reach `uri` when it is on S3."""


class Preparation(Model):
    """What every job of model preparation has."""

    name: Name
    """Lower case letters, digits and dashes, at most 50."""
    output: Folder
    """Where the result goes; what stands there is never overwritten."""


class Measured(Model):
    """Labelled images to measure with."""

    input: Input
    """Where the images are."""
    label: Label = "cls"
    """Sidecar or column with the label: a class name or its number. For loose images `folder`: the name of each one's folder."""
    label_key: Word | None = None
    """Key of the class in the label, where that is a JSON object or a struct."""
    images: Count | None = None
    """At most this many, the same number from the front of each of 16 shards. If a shard holds one class, that is 16."""

    @model_validator(mode="after")
    def _labelled(self) -> Measured:
        check_label(self.label, self.label_key, self.input)
        return self

    @property
    def where(self) -> str:
        """Of the labels, for what is said of them."""
        return ", ".join(filter(None, (*self.input.uris, self.label, self.label_key)))


class Gate(Model):
    """What a quantized model must reach, measured beside its float32 original on this machine, or it is not published."""

    max_accuracy_loss: Fraction = 0.005
    """Largest loss of top-1 accuracy, in points."""
    min_speedup: Positive = 1.0
    """Images a second against float32 on the same engine."""


class QuantizeJob(Preparation):
    """Static INT8 for ONNX Runtime: the artifact with `model.int8.onnx` beside its weights, for this kind of CPU."""

    kind: Literal["quantize"]
    """What the job does."""
    model: Start
    """The artifact to quantize."""
    calibration: Input
    """Images that show the ranges of the activations; no labels are needed."""
    calibration_images: Count = 256
    """How many of them: the same number from the front of each of 16 shards; loose images at even distances."""
    data: Measured
    """Labelled images of several classes that the gate measures with; not those of the calibration."""
    gate: Gate = Gate()
    """What must be reached."""
    threads: Count | None = None
    """Threads of ONNX Runtime while measuring; absent: all CPUs, or what OMP_NUM_THREADS says."""


class EvaluateJob(Preparation):
    """Measure an artifact on labelled images: JSON, a table, and a page with plots."""

    kind: Literal["evaluate"]
    """What the job does."""
    model: ModelSource
    """The artifact to measure, and the precision to do it in."""
    compare: ModelSource | None = None
    """Another artifact, with the same classes, to measure agreement with."""
    data: Measured
    """Labelled images."""
    gpus: Literal[0, 1] = 0
    """1 needs CUDA, there is no fall back to the CPU."""
    batch_size: Count = 32
    """Images in one forward pass."""

    @model_validator(mode="after")
    def _precisions(self) -> EvaluateJob:
        for field, source in (("model", self.model), ("compare", self.compare)):
            if source is not None and source.precision == "float16" and not self.gpus:
                raise ValueError(f"{field}: precision is float16, which needs a GPU. Set gpus to 1, or take bfloat16")
        return self
