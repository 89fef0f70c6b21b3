"""Trains with Lightning: mixed precision, early stopping, the best epoch kept; a kill costs no more than the epoch it fell in.

After every epoch the whole state lies in `last.ckpt`, replaced in one step, and that of the best epoch in `best.ckpt`. A second
start finds them and goes on. Since an epoch's random numbers follow from its own number (see `images`), a training that was
killed ends with the weights of one that was not: to the bit on a CPU with the same number of threads, within float tolerance
elsewhere. Several workers go by the first one's checkpoint. Each validates on all validation images: a few seconds more, and no
worker waits for another that has fewer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.engines import cpu
from pipeline.errors import JobError, UnfitError
from pipeline.job.training import Training, Workers
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.afar import Checkpoints
from pipeline.prepare.augment import Augmentation
from pipeline.prepare.checkpoint import BEST, LAST, Keep, OneStep, content_of, make_folder, read, replace
from pipeline.prepare.epochs import Epoch, EpochLog, Patience
from pipeline.prepare.images import AtWork, EpochDataset, EpochSampler, Images, in_memory
from pipeline.prepare.learner import MEASURED, Learner, precision_of
from pipeline.prepare.outcome import Say
from pipeline.prepare.room import fits

_LIGHTNING = {"float32": "32-true", "float16": "16-mixed", "bfloat16": "bf16-mixed"}


@dataclass(frozen=True)
class Result:
    """Every epoch, the best one, the network's weights after it (the first worker has them), and how many epochs an earlier
    start had done."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    weights: dict[str, Tensor] = field(repr=False)
    stopped_early: bool
    resumed: int


@dataclass(frozen=True)
class Worker:
    """Where a training runs: the device, this worker among how many, and what Ray Train adds to the trainer."""

    accelerator: str = "cpu"
    loaders: int = 0
    rank: int = 0
    world: int = 1
    strategy: Callable[[], Any] = lambda: "auto"
    """Makes one, for each belongs to one trainer, and a distillation has two."""
    plugins: tuple[Any, ...] = ()
    broadcast: Callable[[Any], Any] = lambda value: value
    """What the first worker gives, on all of them."""
    beside: int = 1
    """How many workers there are on this one's machine, itself among them."""

    @staticmethod
    def here(workers: Workers) -> Worker:
        """This process alone. Raises UnfitError for a GPU that is not there."""
        if workers.gpus_per_worker and not torch.cuda.is_available():
            do = "Set workers.gpus_per_worker to 0, or repair the driver"
            raise UnfitError("training wants a GPU, and torch sees no CUDA device", do=do)
        if workers.cpus_per_worker is not None:
            torch.set_num_threads(workers.cpus_per_worker)
        return Worker("gpu" if workers.gpus_per_worker else "cpu", workers.loaders)


def fit(
    learner: Learner, data: tuple[Images, Images], *, preprocessing: Preprocessing, worker: Worker, place: Checkpoints, say: Say
) -> Result:
    """Train on (training, validation) images, or go on where `place` says that an earlier start stopped.

    Raises JobError for fewer images than a batch, ModelError when the loss stops being finite, and for `place` what
    `checkpoint` and `Store` raise.
    """
    folder = place.folder
    training = learner.training_
    wanted = training.batch_size * training.accumulate * worker.world
    if len(data[0]) < wanted or not len(data[1]):
        got = f"{len(data[0]):,} images to train on and {len(data[1]):,} to validate with"
        lower = "training.batch_size" + (" or training.accumulate" if training.accumulate > 1 else "")
        raise JobError(got, need=f"a step of {wanted} and one", do=f"Give more images or lower {lower}")
    make_folder(folder)
    if worker.rank == 0:
        place.fetch(say)
    log, patience = EpochLog(say, training.epochs, wanted, folder), Patience(training)
    state = _standing(folder, worker, say)
    if state is not None:
        log.load_state_dict(state["callbacks"][log.state_key])
        patience.load_state_dict(state["callbacks"][patience.state_key])
    resumed = len(log.epochs)
    if resumed:
        say(f"resuming: {resumed} of at most {training.epochs} epochs done")
    if resumed < training.epochs and not patience.spent:
        if training.precision == "bfloat16" and worker.accelerator == "cpu" and cpu.lacks("bfloat16"):
            say(f"caution: training.precision is bfloat16 {cpu.SLOW}")
        loaders = _loaders(data, preprocessing, training, worker, resumed=resumed)
        keeper = OneStep(place.copying(say))
        trainer = _trainer(training, worker, folder, [log, patience], keeper)
        with _quiet():
            trainer.fit(learner, *loaders, ckpt_path=str(folder / LAST) if resumed else None, weights_only=True)
    kept = read(folder / BEST) if worker.rank == 0 else {"state_dict": {}}
    best: Epoch = worker.broadcast(log.kept(kept[MEASURED]) if worker.rank == 0 else None)
    weights = learner.weights(kept["state_dict"])
    return Result(tuple(log.epochs), best, weights, len(log.epochs) < training.epochs, resumed)


def _standing(folder: Path, worker: Worker, say: Say) -> dict[str, Any] | None:
    """The state that an earlier start has left: the first worker's, on all of them. It is of use with the best epoch only, which
    that worker alone has."""
    last, stands = folder / LAST, False
    if worker.rank == 0 and last.exists():
        stands = (folder / BEST).exists()
        if not stands:
            say(f"starting anew: {folder} holds {LAST} without {BEST}")
    if worker.world > 1:
        content = worker.broadcast(content_of(last) if stands else None)
        stands = content is not None
        if stands and not (last.exists() and content_of(last) == content):
            replace(last, content)
    return read(last) if stands else None


def _loaders(
    data: tuple[Images, Images], preprocessing: Preprocessing, training: Training, worker: Worker, *, resumed: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    visits = EpochDataset(data[0], Augmentation(preprocessing, training.augment), seed=training.seed)
    step = training.batch_size * training.accumulate  # none is of fewer batches: Lightning would weigh these as if it were whole
    order = EpochSampler(len(data[0]), step=step, seed=training.seed, rank=worker.rank, world=worker.world)
    order.set_epoch(resumed)  # Lightning says it too late for loaders in processes of their own, which draw ahead
    pinned = worker.accelerator == "gpu"
    train = DataLoader(
        visits,
        batch_size=training.batch_size,
        sampler=order,
        num_workers=worker.loaders,
        multiprocessing_context="fork" if worker.loaders else None,  # shares the images, any other way copies them
        persistent_workers=worker.loaders > 0,  # else 14 are forked from a process with a GPU again for every epoch
        pin_memory=pinned,
    )
    held = AtWork(data[1], preprocessing)
    once = fits(len(held) * 3 * preprocessing.size**2, beside=worker.beside)
    loaders = 0 if once else worker.loaders
    seen: Dataset[Any] = in_memory(held) if once else held
    validation = DataLoader(
        seen,
        batch_size=2 * training.batch_size,
        num_workers=loaders,
        multiprocessing_context="fork" if loaders else None,
        persistent_workers=loaders > 0,
        pin_memory=pinned,
    )
    return train, validation


def _trainer(training: Training, worker: Worker, folder: Path, callbacks: Sequence[pl.Callback], keeper: OneStep) -> pl.Trainer:
    best = Keep(
        folder,
        Path(BEST).stem,
        monitor="score",
        mode="max",
        save_weights_only=True,  # what the optimiser knows is in the other; nobody goes on from this one
        enable_version_counter=False,
    )
    last = Keep(folder, Path(LAST).stem, enable_version_counter=False)  # after the other: it holds the other's state
    device = "cuda" if worker.accelerator == "gpu" else "cpu"
    with _quiet():
        return pl.Trainer(
            accelerator=worker.accelerator,
            devices=1,
            strategy=worker.strategy(),
            precision=_LIGHTNING[precision_of(training, device)],  # type: ignore[arg-type]
            max_epochs=training.epochs,
            benchmark=worker.accelerator == "gpu",  # batches of one size: cuDNN tries its kernels once
            gradient_clip_val=training.gradient_clip or None,
            accumulate_grad_batches=training.accumulate,
            callbacks=[*callbacks, best, last],
            plugins=[keeper, *worker.plugins],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on the machine and its advice, which is for those who wrote the training."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*|.*lr_scheduler.step.*")
        yield
