"""The whole chain in one function, and one pass of it.

Correctness never rests on Ray: a block that is lost (its worker died, its code failed) is simply missing from the pass, and the
driver runs another one over the units that did not arrive. So retries are few and finite, and errored blocks are allowed.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import astuple
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline.artifact import Artifact
from pipeline.cluster import connect
from pipeline.errors import NightlabelError, Stalled, Temporary, first_line
from pipeline.job.resources import Pool
from pipeline.lanes import START, Measurements, Share, Split, all_on_gpu
from pipeline.spec import Input, Job
from pipeline.stages import Seam, Timed, clocked, gathered, make_predict, make_preprocess
from pipeline.storage import open_input
from pipeline.unit import Part, Unit, dump_types, parse_types
from pipeline.watch import losses, watched

_LEAVE_S = 30.0  # for Ray to kill the workers of a pass
STALL_S = 600.0  # no block for so long means a hung pool (ray#62746); a 128 MiB block takes 50 s at 18 img/s
_CAREFUL_BYTES = 2**14  # of encoded images, one photograph or 8 thumbnails, where preprocess has no blocks of its own
_CAREFUL_ROWS = 8  # of a block in careful mode: hanging images come through by and by, so that the watch sees the pass live
_CALLS = 4  # of an actor with a GPU lane: blocks are copied, decoded and labelled at the same time
_ACTOR: dict[str, Any] = {"max_restarts": 2, "max_task_retries": 1}  # Ray's default is to retry for ever, a poison image with it
_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}  # a stage gets blocks as they are

#: Numbers of the rows that are wanted of a unit, by unit id.
Only = Mapping[str, frozenset[int]]


def chain(
    units: list[Unit], job: Job, artifact: Artifact, *, careful: bool = False, only: Only | None = None
) -> ray.data.Dataset:
    """read → preprocess → predict over units: a lazy dataset of prediction rows, every unit closed by its end row. With `only`,
    of some of their rows. Raises Temporary when there is no Ray, in whose place Ray Data would start another.

    Where the job has no actors of preprocess, that stage is one with predict; and with read, where the GPU decodes what is plain:
    a block costs as much to hand on as to tell that.
    """
    if not ray.is_initialized():
        raise Temporary("Ray is gone, and did not come up again", do="Run again; what is committed stays")
    read, preprocess, predict = job.resources.pools()
    apart = preprocess.size > 0
    rows = _block_bytes(job, artifact, careful) // (3 * artifact.preprocessing.size**2)
    if not careful:
        rows = rows * 4 // 3  # what comes out is one block then, in one piece: Ray cuts them only from one and a half on
    share = None if careful else _share(job)  # what the GPU decodes cannot be killed
    decoding: Seam = "preprocess", partial(make_preprocess, job, artifact.preprocessing, careful, share)
    labelling: Seam = "predict", partial(make_predict, job, artifact.digest, share)
    beside = partial(Timed, [decoding], rows) if share and not apart else None
    items = [_item(unit, only) for unit in units]
    with warnings.catch_warnings():
        # Finite retries have no other way in than the keyword arguments that 2.60 deprecates (2.61 is not admitted).
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            partial(_read, wanted=job.input, max_bytes=job.limits.max_bytes, beside=beside),
            **_BLOCKS,
            compute=TaskPoolStrategy(size=read.size),
            max_retries=1,
            **read.options,
        )
        if apart:
            dataset = dataset.map_batches(Timed, fn_constructor_args=([decoding], rows), **_BLOCKS, **_actors(preprocess))
        # What comes encoded to a GPU lane may be thumbnails, whose pixels are many times as large.
        stages = ([labelling], 2 * rows if share else None) if apart or beside else ([decoding, labelling], rows)
        # Not map_batches, which wants a number of rows for a GPU: Ray cut blocks to it by copies, a fifth of what an actor with a
        # GPU lane did, and left it crumbs.
        return dataset.map_batches_internal(
            Timed, fn_constructor_args=stages, **_BLOCKS, **_actors(predict, _CALLS if share else 1)
        )


def _actors(pool: Pool, calls: int = 1) -> dict[str, Any]:
    """`calls` at a time, side by side, in threads of an actor."""
    threads: dict[str, Any] = {"max_concurrent_calls_per_actor": calls, "enable_true_multi_threading": True} if calls > 1 else {}
    return {"zero_copy_batch": True, "compute": ActorPoolStrategy(size=pool.size, **threads), **pool.options, **_ACTOR}


def _item(unit: Unit, only: Only | None) -> dict[str, str]:
    rows = None if only is None else sorted(only[unit.id])
    return {"unit": json.dumps([[astuple(part) for part in unit.parts], rows, dump_types(unit.kept)])}


def _block_bytes(job: Job, artifact: Artifact, careful: bool) -> int:
    """One forward batch of pixels at least, 4 MiB to 128 MiB: 27 to 891 crops of 224 × 224; few in careful mode."""
    if careful:
        return _CAREFUL_ROWS * 3 * artifact.preprocessing.size**2
    return max(2**22, min(2**27, job.resources.predict.batch_size * 3 * artifact.preprocessing.size**2))


def _read(batch: pa.Table, *, wanted: Input, max_bytes: int, beside: Callable[[], Timed] | None) -> Iterator[pa.Table]:
    """Rows of the units in `batch`. `beside` makes the stages that they go through here too, a block at a time."""
    from pipeline.read import read_unit

    stages, size = beside and beside(), DataContext.get_current().target_max_block_size or 0  # the driver's, as Ray hands it on
    for item in batch.column("unit").to_pylist():
        parts, only, kept = json.loads(item)
        unit = Unit(tuple(Part(*fields) for fields in parts), parse_types(kept))
        tables = clocked(read_unit(_store(wanted), unit, wanted=wanted, only=only, max_bytes=max_bytes))
        if stages is None:
            yield from tables
            continue
        for table in gathered(tables, size):
            yield from stages(table)


_store = lru_cache(1)(open_input)  # one a worker process: an S3 client takes 0.1 s to make, and each day has another input


def _share(job: Job) -> Share | None:
    if job.decode_lane == "cpu":
        return None
    if job.decode_lane == "gpu":
        return all_on_gpu
    pools = job.resources
    actors = pools.preprocess.actors / pools.predict.actors
    split = ray.remote(Split).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(actors)
    return partial(_ask, split)


def _ask(split: Any, measured: Measurements) -> float:
    try:
        share: float = ray.get(split.share.remote(measured))
    except ray.exceptions.RayError:  # it only steers: no block is lost for it
        return START
    return share


def run_pass(
    units: list[Unit],
    job: Job,
    artifact: Artifact,
    *,
    careful: bool = False,
    lost: list[str] | None = None,
    only: Only | None = None,
) -> Generator[pa.Table | None, None, None]:
    """Prediction rows of `units` as their blocks finish, in any order, and None for a second without one. Blocks may be missing,
    that is the driver's to see; what they were lost to is added to `lost`, a line each.

    Raises Temporary when the pass dies, and Stalled when nothing arrives for so long that something must hang; that is gone then.
    """
    alone = careful and not job.resources.preprocess.actors  # what comes out is small, so it is what goes in that is cut
    DataContext.get_current().target_max_block_size = _CAREFUL_BYTES if alone else _block_bytes(job, artifact, careful)
    # Each image of a block may hang, and its successor wait for a new child, which imports torch.
    stall_s = max(STALL_S, 2 * _CAREFUL_ROWS * (job.limits.decode_timeout + 30)) if careful else STALL_S

    def start() -> Generator[pa.Table, None, None]:  # under watch, for what is put into Ray's store may find Ray dying
        dataset = chain(units, job, artifact, careful=careful, only=only)
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")

    blocks = watched(start, stall_s=stall_s, explain=_reason, leave=_leave)
    try:
        with losses(lost if lost is not None else []), closing(blocks):
            yield from blocks
    except Stalled:
        if _executors():  # Ray itself hangs
            ray.shutdown()
            connect(job)
        raise


def _executors() -> list[StreamingExecutor]:
    """The loops of passes that run; Ray Data hands none out before its first block."""
    return [thread for thread in threading.enumerate() if isinstance(thread, StreamingExecutor)]


def _leave() -> None:
    """Ends the pass that runs: its workers, of which one may hang and would keep its CPUs from the next pass; and its loop, which
    waits in Ray's core: with Ray shut down under it, the process died of a segmentation fault (2 of 9 times on a busy machine).
    """
    ends = [threading.Thread(target=executor.shutdown, args=(True,), daemon=True) for executor in _executors()]
    for end in ends:
        end.start()
    for end in ends:
        end.join(_LEAVE_S)


def _reason(error: BaseException) -> BaseException:
    """What a pass died of, as an error of ours: the one that a stage raised while it loaded, or that Ray failed. Else a bug."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NightlabelError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    if not isinstance(error, (ray.exceptions.RayError, RuntimeError)):
        return error
    return Temporary(f"the pass ended early ({first_line(error)})", do="Run again; what is committed stays")
