"""What a job takes and what there is: pools of tasks and actors, the cluster. `demand` holds the one against the other."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.placement import Kubernetes, LabelValue
from pipeline.quantity import Bytes, Count, Model, between, in_bytes


def _whole_gpus(value: float) -> float:
    if 0 < value < 0.0001 or (value > 1 and value % 1):
        raise ValueError("0, a part of one GPU, or a whole number of them")
    return value


#: Ray counts in parts of 10,000; what is less is nothing to it, and nothing fits any number of times.
Cpus = Annotated[float, Field(strict=True, ge=0.0001, lt=2**31)]
Gpus = Annotated[float, Field(strict=True, ge=0, lt=2**31), AfterValidator(_whole_gpus)]


class Read(Model):
    """Tasks that fetch shards."""

    tasks: Count = 1
    """Units fetched at the same time."""
    cpus_per_task: Cpus = 0.25
    """CPUs one task reserves; fetching waits more than it computes."""


class PreprocessPool(Model):
    """Actors that decode and resize."""

    actors: Count = 1
    """Size of the pool."""
    cpus_per_actor: Cpus = 0.5
    """CPUs one actor reserves; threads per actor are this, rounded, at least one."""


class PredictPool(Model):
    """Actors that run the model."""

    actors: Count = 1
    """Size of the pool."""
    cpus_per_actor: Cpus = 1.0
    """CPUs one actor reserves; without GPU also its threads, rounded, at least one."""
    gpus_per_actor: Gpus = 0.0
    """GPUs one actor reserves, a part of one or a whole number; more than 0 needs CUDA, there is no fall back to the CPU."""
    batch_size: Count = 32
    """Images in one forward pass; 16-64 on a CPU, 256-1,024 on a GPU."""


class Resources(Model):
    """What the job takes, fixed, checked against the cluster before the first image."""

    read: Read = Read()
    """Tasks that fetch shards."""
    preprocess: PreprocessPool = PreprocessPool()
    """Actors that decode and resize."""
    predict: PredictPool = PredictPool()
    """Actors that run the model."""
    object_store: Annotated[Bytes, between(in_bytes, "75MiB", "1024TiB")] = 1 * 2**30  # 75 MiB is Ray's own least
    """Shared memory for blocks between the stages, when the job brings up its own Ray."""

    @property
    def cpus(self) -> float:
        return sum(count * share for _, count, share in self.pools())

    @property
    def gpus(self) -> float:
        return self.predict.actors * self.predict.gpus_per_actor

    def pools(self) -> tuple[tuple[str, int, float], ...]:
        """(name, size, CPUs each) of the three pools."""
        return (
            ("read", self.read.tasks, self.read.cpus_per_task),
            ("preprocess", self.preprocess.actors, self.preprocess.cpus_per_actor),
            ("predict", self.predict.actors, self.predict.cpus_per_actor),
        )


class Head(Model):
    """The head node; it takes work only when there are no workers."""

    cpus: Count = 2
    """CPUs of the head."""
    memory: Bytes = 8 * 2**30
    """Memory of the head."""


class Workers(Model):
    """The nodes that work."""

    count: Annotated[Count, Field(le=10_000)] = 1
    """How many nodes."""
    cpus: Count
    """CPUs a node."""
    gpus: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    """GPUs a node."""
    memory: Bytes = 16 * 2**30
    """Memory a node."""
    gpu_type: LabelValue | None = None
    """Accelerator label of the node, such as nvidia-l4."""


class Cluster(Model):
    """What the job is meant for; `run` holds the demand against it, submission brings it up."""

    head: Head = Head()
    """The head node."""
    workers: Workers | None = None
    """The nodes that work; none: the head does it all, without GPUs."""
    kubernetes: Kubernetes = Kubernetes()
    """How the job stands on Kubernetes."""
