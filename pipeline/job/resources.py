"""What a job takes and what there is: pools of tasks and actors, the cluster. `demand` holds the one against the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from pipeline.job.placement import Kubernetes, LabelKey, LabelValue
from pipeline.job.quantity import Bytes, Count, Model, Seconds, between, in_bytes


def _whole_gpus(value: float) -> float:
    if 0 < value < 0.0001 or (value > 1 and value % 1):
        raise ValueError("0, a part of one GPU, or a whole number of them")
    return value


#: Ray counts in parts of 10,000; what is less is nothing to it, and nothing fits any number of times.
Cpus = Annotated[float, Field(strict=True, ge=0.0001, lt=2**31)]
Gpus = Annotated[float, Field(strict=True, ge=0, lt=2**31), AfterValidator(_whole_gpus)]
Labels = dict[LabelKey, LabelValue]

GPU_TYPE = "ray.io/accelerator-type"  # the label of a node with GPUs that Ray sets by itself


class Pool(NamedTuple):
    """Equal tasks or actors, `size` of them; the rest is what each reserves, and the labels that its node must have."""

    name: str
    size: int
    cpus: float
    gpus: float = 0.0
    memory: int = 0
    labels: Mapping[str, str] = {}

    @property
    def kind(self) -> str:
        return "task" if self.name == "read" else "actor"

    @property
    def bundle(self) -> dict[str, float]:
        """What each reserves, as Ray counts it."""
        takes = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in takes.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """The same, as Ray's tasks and actors take it."""
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory, "label_selector": dict(self.labels)}
        return {name: value for name, value in options.items() if value}


class Read(Model):
    """Tasks that fetch shards."""

    tasks: Count = 1
    """Units fetched at the same time."""
    cpus_per_task: Cpus = 0.25
    """CPUs one task reserves; fetching waits more than it computes."""
    memory_per_task: Bytes | None = None
    """Memory one task reserves."""
    labels: Labels = Field(default={})
    """Ray labels that its node must have."""


class PreprocessPool(Model):
    """Actors that decode and resize."""

    actors: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 1
    """Size of the pool; 0: the actors of the model decode too, which is faster where there is no GPU to keep busy. With
    `decode_lane: gpu` the tasks that read decode what is not for the GPU, which wants more of them: less for the CPUs to do."""
    cpus_per_actor: Cpus = 0.5
    """CPUs one actor reserves; it has as many threads, rounded, at least one."""
    memory_per_actor: Bytes | None = None
    """Memory one actor reserves."""
    labels: Labels = Field(default={})
    """Ray labels that its node must have."""


class PredictPool(Model):
    """Actors that run the model."""

    actors: Count = 1
    """Size of the pool."""
    cpus_per_actor: Cpus = 1.0
    """CPUs one actor reserves; without GPU also its threads, rounded, at least one."""
    gpus_per_actor: Gpus = 0.0
    """GPUs one actor reserves, a part of one or a whole number; more than 0 needs CUDA, there is no fall back to the CPU."""
    gpu_type: LabelValue | None = None
    """The GPU that its node must have, as Ray names it: `L4`, `A100`, `H100`."""
    memory_per_actor: Bytes | None = None
    """Memory one actor reserves."""
    labels: Labels = Field(default={})
    """Ray labels that its node must have."""
    batch_size: Count = 32
    """Images in one forward pass; 16-64 on a CPU, 256-1,024 on a GPU."""


class Resources(Model):
    """What the job takes, checked against the cluster before the first image. The defaults are 1.75 CPUs and no GPU in all."""

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
        return sum(pool.size * pool.cpus for pool in self.pools())

    @property
    def gpus(self) -> float:
        return sum(pool.size * pool.gpus for pool in self.pools())

    def pools(self) -> tuple[Pool, Pool, Pool]:
        """read, preprocess, predict."""
        read, preprocess, predict = self.read, self.preprocess, self.predict
        kind = {GPU_TYPE: predict.gpu_type} if predict.gpu_type else {}
        memory = predict.memory_per_actor or 0
        return (
            Pool("read", read.tasks, read.cpus_per_task, 0.0, read.memory_per_task or 0, read.labels),
            Pool(
                "preprocess",
                preprocess.actors,
                preprocess.cpus_per_actor,
                0.0,
                preprocess.memory_per_actor or 0,
                preprocess.labels,
            ),
            Pool("predict", predict.actors, predict.cpus_per_actor, predict.gpus_per_actor, memory, {**predict.labels, **kind}),
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
    """CPUs a node. On Kubernetes these are a pod's: at least one less than the machine has, which keeps some for itself."""
    gpus: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    """GPUs a node."""
    memory: Bytes = 16 * 2**30
    """Memory a node; on Kubernetes a pod's, so some GiB less than the machine has."""
    gpu_type: LabelValue | None = None
    """Kubernetes alone: which GPU, as the node label `kubernetes.gpu_label` spells it, such as nvidia-l4 on GKE."""


class Cluster(Model):
    """What the job is meant for; `run` holds the demand against it, `apply` brings it up."""

    head: Head = Head()
    """The head node."""
    workers: Workers | None = None
    """The nodes that work; none: the head does it all, without GPUs."""
    kubernetes: Kubernetes = Kubernetes()
    """How the job stands on Kubernetes."""
    wait: Seconds | None = None
    """How long a run waits for nodes that an autoscaler brings, before it ends with exit code 75. Absent: where the cluster is
    too small for the job it ends at once with exit code 2; where other jobs hold the CPUs it waits for 10 minutes. On Kubernetes
    it is also how long a new cluster may take to come up; absent, 30 minutes."""
