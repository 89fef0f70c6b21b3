"""What a job takes and what there is: pools of tasks and actors, the cluster, and whether the one fits the other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.placement import Kubernetes, LabelValue
from pipeline.quantity import Bytes, Count, Model, Positive


class Read(Model):
    """Tasks that fetch shards."""

    tasks: Count = 1
    """Units fetched at the same time."""
    cpus_per_task: Positive = 0.25
    """CPUs one task reserves; fetching waits more than it computes."""


class PreprocessPool(Model):
    """Actors that decode and resize."""

    actors: Count = 1
    """Size of the pool."""
    cpus_per_actor: Positive = 0.5
    """CPUs one actor reserves; threads per actor are this, rounded, at least one."""


class PredictPool(Model):
    """Actors that run the model."""

    actors: Count = 1
    """Size of the pool."""
    cpus_per_actor: Positive = 1.0
    """CPUs one actor reserves; without GPU also its threads, rounded, at least one."""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """GPUs one actor reserves; more than 0 needs CUDA, there is no fall back to the CPU."""
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
    object_store: Bytes = 1 * 2**30
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

    count: Count = 1
    """How many nodes."""
    cpus: Count
    """CPUs a node."""
    gpus: Annotated[int, Field(ge=0)] = 0
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

    @property
    def cpus(self) -> tuple[int, str]:
        """CPUs that take work, and how they come about."""
        if self.workers is None:
            return self.head.cpus, "(the head's, there are no workers)"
        return self.workers.count * self.workers.cpus, f"({self.workers.count} workers × {self.workers.cpus})"

    @property
    def gpus(self) -> tuple[int, str]:
        """GPUs, and how they come about."""
        if self.workers is None:
            return 0, "(there are no workers)"
        return self.workers.count * self.workers.gpus, f"({self.workers.count} workers × {self.workers.gpus})"


def check_demand(resources: Resources, *, cpus: tuple[float, str], gpus: tuple[float, str]) -> None:
    """Hold the demand against a cluster given as (amount, how it comes about). Raises ValueError with the sentence."""
    if resources.cpus > cpus[0] + 1e-9:
        parts = " + ".join(f"{name} {count} × {share:g}" for name, count, share in resources.pools())
        raise ValueError(
            f"resources: the job asks for {resources.cpus:g} CPUs ({parts}), the cluster has {cpus[0]:g} {cpus[1]}. "
            "Lower the actors or their cpus_per_actor, or bring more CPUs"
        )
    if resources.gpus > gpus[0] + 1e-9:
        pool = resources.predict
        raise ValueError(
            f"resources: predict asks for {resources.gpus:g} GPUs ({pool.actors} actors × {pool.gpus_per_actor:g}), the cluster "
            f"has {gpus[0]:g} {gpus[1]}. Lower predict.actors, set predict.gpus_per_actor to 0 for CPUs, or bring more GPUs"
        )
