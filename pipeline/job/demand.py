"""Does a cluster hold what a job takes? Asked before the first image, because Ray waits for ever, without a word, for a node that
can hold an actor.

Sums come first, they explain best. Then the largest task or actor must fit on one node, and all together must: larger ones are
placed first, each on the first node with room. In rare cases another order would find room where this finds none; the price of a
refusal is a sentence, that of a pool which never comes up is the night.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.job.resources import Cluster, Pool, Resources


class Node(NamedTuple):
    """What one node of a cluster has to give."""

    cpus: float
    gpus: float = 0.0
    memory: float = math.inf
    labels: Mapping[str, str] | None = None
    """None: not known, so anything is there."""

    def has(self, labels: Mapping[str, str]) -> bool:
        return self.labels is None or labels.items() <= self.labels.items()

    def holds(self, pool: Pool) -> int:
        """How many of a pool it holds when it is empty. A part of a GPU is a part of one: 0.6 fits once on each."""
        if not self.has(pool.labels):
            return 0
        most = _fixed(self.cpus) // _fixed(pool.cpus)
        if pool.memory and self.memory < most * pool.memory:
            most = int(self.memory // pool.memory)
        if 0 < pool.gpus < 1:
            return min(most, int(self.gpus) * (_fixed(1) // _fixed(pool.gpus)))
        return min(most, _fixed(self.gpus) // _fixed(pool.gpus)) if pool.gpus else most


def check_cluster(resources: Resources, cluster: Cluster) -> None:
    """Hold the demand against the cluster that the job names. Raises ValueError with the sentence."""
    workers = cluster.workers
    if workers is None:
        head = Node(cluster.head.cpus, memory=cluster.head.memory)
        check_demand(resources, [head], where="the head, there are no workers")
    else:
        where = f"{workers.count} {'worker' if workers.count == 1 else 'workers'}"
        check_demand(resources, [Node(workers.cpus, workers.gpus, workers.memory)] * workers.count, where=where)


def check_demand(resources: Resources, nodes: Sequence[Node], *, where: str) -> None:
    """Hold the demand against the nodes of a cluster, which `where` names ("8 workers"). Raises ValueError with the sentence."""
    pools, cpus = [pool for pool in resources.pools() if pool.size], [node.cpus for node in nodes]
    _check_sums(resources, nodes, where)
    for pool in pools:
        if not any(node.holds(pool) for node in nodes):
            _refuse_one(pool, nodes, where)
    free = list(nodes)
    for pool in sorted(pools, key=lambda pool: (pool.gpus, len(pool.labels), pool.cpus, pool.memory), reverse=True):
        left = pool.size
        for at, node in enumerate(free):
            placed = min(left, node.holds(pool))  # no other pool takes GPUs
            free[at] = node._replace(cpus=node.cpus - placed * pool.cpus, memory=node.memory - placed * pool.memory)
            left -= placed
        if left:
            raise ValueError(
                f"resources: {left} of {pool.size} {pool.name} {pool.kind}s find no node with {_takes(pool)} left, the cluster "
                f"has {_sum(cpus, where)} CPUs. Lower {pool.name}.{pool.kind}s, or bring more or larger nodes"
            )


def _check_sums(resources: Resources, nodes: Sequence[Node], where: str) -> None:
    cpus, gpus = [node.cpus for node in nodes], [node.gpus for node in nodes]
    if _fixed(resources.cpus) > _fixed(sum(cpus)):
        parts = " + ".join(f"{name} {count} × {share:g}" for name, count, share, *_ in resources.pools())
        raise ValueError(
            f"resources: the job asks for {resources.cpus:g} CPUs ({parts}), the cluster has {_sum(cpus, where)}. "
            "Lower the actors or their cpus_per_actor, or bring more CPUs"
        )
    if _fixed(resources.gpus) > _fixed(sum(gpus)):
        pool = resources.predict
        raise ValueError(
            f"resources: predict asks for {resources.gpus:g} GPUs ({pool.actors} actors × {pool.gpus_per_actor:g}), the cluster "
            f"has {_sum(gpus, where)}. Lower predict.actors, set predict.gpus_per_actor to 0 for CPUs, or bring more GPUs"
        )


def _refuse_one(pool: Pool, nodes: Sequence[Node], where: str) -> None:
    able = [node for node in nodes if node.has(pool.labels)]
    if not able:
        field = "gpu_type or labels" if pool.name == "predict" else "labels"
        raise ValueError(
            f"resources: {pool.name} {pool.kind}s ask for a node labelled {_pairs(pool.labels)}, none of {where} is. "
            f"Change {pool.name}.{field}, or bring such a node"
        )
    if any(node.holds(pool._replace(memory=0)) for node in able):
        largest = _gib(max(node.memory for node in able))
        raise ValueError(
            f"resources: a {pool.name} {pool.kind} asks for {_gib(pool.memory)} of one node, the largest has {largest} ({where})"
            f". Lower {pool.name}.memory_per_{pool.kind}, or bring larger nodes"
        )
    _refuse_shares(pool, able, where)


def _refuse_shares(pool: Pool, nodes: Sequence[Node], where: str) -> None:
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus) if pool.gpus else (node.cpus, node.gpus))
    takes, has = f"{pool.cpus:g} CPUs", f"{largest.cpus:g} ({where})"
    shares = f"{pool.name}.cpus_per_{pool.kind}"
    if pool.gpus:
        takes, has = f"{pool.gpus:g} GPUs and {takes}", f"{largest.gpus:g} and {has}"
        shares = f"{pool.name}.gpus_per_actor or cpus_per_actor"
    raise ValueError(
        f"resources: a {pool.name} {pool.kind} asks for {takes} of one node, the largest has {has}. Lower {shares}, or "
        "bring larger nodes"
    )


def _takes(pool: Pool) -> str:
    takes = [f"{pool.cpus:g} CPUs"]
    takes += [f"{pool.gpus:g} GPUs"] if pool.gpus else []
    takes += [_gib(pool.memory)] if pool.memory else []
    takes += [_pairs(pool.labels)] if pool.labels else []
    return " and ".join(takes)


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _gib(memory: float) -> str:
    return f"{memory / 2**30:,.1f}".removesuffix(".0") + " GiB of memory"


def _fixed(amount: float) -> int:
    """In Ray's own unit, so that 10 × 0.1 is 1."""
    return round(amount * 10_000)


def _sum(amounts: Sequence[float], where: str) -> str:
    if len(amounts) > 1 and len(set(amounts)) == 1:
        return f"{sum(amounts):g} ({where} × {amounts[0]:g})"
    return f"{sum(amounts):g} on {where}"
