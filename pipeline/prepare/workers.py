"""Several workers train one model on Ray Train: data parallel, a process a worker, on one machine or on many.

Every worker runs the code that a lone one runs and reads all the data itself; the first one writes checkpoints and artifact. Its
lines, and in the end its outcome, come to the driver through a queue. Inputs and output must be reachable from every worker;
checkpoints lie on the first worker's machine unless the output is on S3 or in a shared folder, and a rerun goes by what its first
worker finds.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.environment import set_ray_environment
from pipeline.errors import JobError, NightlabelError, Temporary
from pipeline.job.jobfile import dump_job, parse_job
from pipeline.job.training import TrainingJob, Workers
from pipeline.prepare.outcome import Outcome, Say
from pipeline.prepare.train import Worker

_OBJECT_STORE = 128 * 2**20  # nothing but lines goes through it


def on_workers(job: TrainingJob, train_job: Callable[..., Outcome], *, say: Say, command: str) -> Outcome:
    """`train_job`, of the module of the job's kind, in this process or on Ray Train."""
    if job.workers.count > 1:
        return _together(job, say=say, command=command)
    return train_job(job, worker=Worker.here(job.workers), say=say, command=command)


def _together(job: TrainingJob, *, say: Say, command: str) -> Outcome:
    """Run the job on its workers. Raises JobError when the cluster cannot hold them, and what the workers raise."""
    set_ray_environment()
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    from pipeline.cluster import start_ray

    start_ray(object_store=_OBJECT_STORE)
    try:
        cpus = job.workers.cpus_per_worker or 1
        _check_fits(job.workers, cpus, [node["Resources"] for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
        each = {"CPU": cpus, **({"GPU": 1} if job.workers.gpus_per_worker else {})}
        lines = Queue(actor_options={"num_cpus": 0})
        with TemporaryDirectory() as storage, ThreadPoolExecutor(1) as aside:
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"job": dump_job(job), "command": command, "lines": lines, "folder": os.getcwd()},
                scaling_config=ScalingConfig(num_workers=job.workers.count, use_gpu="GPU" in each, resources_per_worker=each),
                run_config=RunConfig(storage_path=storage),
            )
            told = aside.submit(_listen, lines, say)
            died: BaseException | None = None
            try:
                trainer.fit()
            except TrainingFailedError as error:
                died = error
            finally:
                lines.put(None)
            return _result(told.result(), died)
    finally:
        ray.shutdown()


def _listen(lines: Any, say: Say) -> Outcome | NightlabelError | None:
    """Says the lines as they come until there are no more; the outcome among them, or the error that a worker raised."""
    result: Outcome | NightlabelError | None = None
    while (item := lines.get()) is not None:
        if isinstance(item, str):
            say(item)
        else:
            result = item
    return result


def _result(told: Outcome | NightlabelError | None, died: BaseException | None) -> Outcome:
    """The outcome. Raises what a worker raised, Temporary when one died, and any other error as the bug that it is."""
    if isinstance(told, NightlabelError):
        raise told from died
    if died is None:
        assert told is not None  # the first worker puts it there before it ends
        return told
    import ray

    if any(isinstance(error, ray.exceptions.RayError) for error in getattr(died, "worker_failures", {}).values()):
        raise Temporary("a worker of the training died", do="Run again; it goes on from its last epoch") from died
    raise died


def _check_fits(workers: Workers, cpus: int, nodes: list[dict[str, float]]) -> None:
    """A worker lies on one node, so what counts is how many fit on each. Ray would wait for ever."""
    needs = {"CPU": cpus, **({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})}
    room = sum(min(int(node.get(what, 0) // each) for what, each in needs.items()) for node in nodes)
    if room < workers.count:
        each = " and ".join(f"{number} {what if number == 1 else f'{what}s'}" for what, number in needs.items())
        got = f"workers: {workers.count} workers of {each} each, the cluster has room for {room} on {len(nodes)} nodes"
        raise JobError(got, do="Lower workers.count or what a worker takes, or bring more machines")


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    if os.path.isdir(config["folder"]):  # relative URIs and checkpoints are the driver's; a Ray that was up stands elsewhere
        os.chdir(config["folder"])
    job = parse_job(config["job"])
    assert isinstance(job, TrainingJob)  # the driver has sent it
    torch.set_num_threads(job.workers.cpus_per_worker or 1)
    context = ray.train.get_context()
    frozen = job.training.freeze > 0
    worker = Worker(
        "gpu" if job.workers.gpus_per_worker else "cpu",
        job.workers.loaders,
        context.get_world_rank(),
        context.get_world_size(),
        lambda: RayDDPStrategy(find_unused_parameters=frozen),  # type: ignore[no-untyped-call]
        (RayLightningEnvironment(),),  # type: ignore[no-untyped-call]
        _broadcast,
        context.get_local_world_size(),
    )
    lines = config["lines"]
    say: Callable[[str], None] = (lambda _: None) if worker.rank else lines.put
    train_job = importlib.import_module(f"pipeline.prepare.{job.kind}").train_job
    try:
        outcome = train_job(job, worker=worker, say=say, command=config["command"])
    except NightlabelError as error:
        lines.put(error)
        raise
    if worker.rank == 0:
        lines.put(outcome)


def _broadcast(value: Any) -> Any:
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
