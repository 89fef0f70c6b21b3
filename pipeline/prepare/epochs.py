"""What the epochs of a training came to: kept, told, and judged, whether another one is worth it."""

from __future__ import annotations

import csv
import io
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from pipeline.errors import ModelError
from pipeline.job.training import Training
from pipeline.prepare.checkpoint import replace
from pipeline.prepare.outcome import Say

EVERY_S = 30.0
TABLE = "epochs.csv"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to. `loss` is the mean objective of its steps, the other two are measured on the validation images."""

    number: int
    loss: float
    validation_loss: float
    accuracy: float
    seconds: float


class EpochLog(pl.Callback):
    """Keeps the epochs, in the checkpoint too, and tells them as they end; of a long one also how far it is. `images` are those
    of a step, of all workers. The first worker writes a table of them into `folder`, anew each time: Lightning's own logger would
    begin an empty one when the training goes on."""

    def __init__(self, say: Say, total: int, images: int, folder: Path) -> None:
        self.epochs: list[Epoch] = []
        self._say, self._total, self._images, self._since, self._told = say, total, images, 0.0, 0.0
        self._table = folder / TABLE

    def on_train_epoch_start(self, *_: Any) -> None:
        self._since = self._told = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        batches = trainer.accumulate_grad_batches  # of a step; the loss of each is given as its share of the step's
        now, done, of = time.perf_counter(), (batch_idx + 1) / batches, int(trainer.num_training_batches) // batches
        if now - self._told > EVERY_S and done < of and done.is_integer():
            self._told, pace, loss = now, done / (now - self._since), batches * float(outputs["loss"])
            self._say(
                f"epoch {len(self.epochs) + 1} of {self._total}: step {done:,.0f} of {of:,}, loss {loss:.3f}, "
                f"{pace * self._images:,.0f} images/s, {(of - done) / pace / 60:,.1f} min to go"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loss, validation_loss, accuracy = (
            float(trainer.callback_metrics[name]) for name in ("training_loss", "validation_loss", "accuracy")
        )
        if not math.isfinite(loss):
            do = "Lower training.learning_rate, or take bfloat16"
            raise ModelError(f"training: the loss became {loss}", need="a finite number", do=do)
        epoch = Epoch(len(self.epochs) + 1, loss, validation_loss, accuracy, time.perf_counter() - self._since)
        self.epochs.append(epoch)
        if trainer.is_global_zero:
            self._write()
        self._say(
            f"epoch {epoch.number} of {self._total}: loss {loss:.3f}, validation loss {validation_loss:.3f}, "
            f"{accuracy:.2%} right, {epoch.seconds:.1f} s"
        )

    def _write(self) -> None:
        sink = io.StringIO()
        table = csv.DictWriter(sink, [field.name for field in fields(Epoch)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, self.epochs))
        replace(self._table, sink.getvalue().encode())

    def kept(self, measured: dict[str, float]) -> Epoch:
        """The epoch that a checkpoint says it holds. It is one that came again, with other figures, where a kill fell between the
        two checkpoints of an epoch and the machine does not compute to the bit."""
        number = int(measured["number"])
        seconds = sum(epoch.seconds for epoch in self.epochs if epoch.number == number)
        return Epoch(number, measured["loss"], measured["validation_loss"], measured["accuracy"], seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": [asdict(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = [Epoch(**epoch) for epoch in state_dict["epochs"]]


class Patience(EarlyStopping):
    """Stops when the accuracy has not risen for `training.patience` epochs, but not before what is frozen has been thawed."""

    def __init__(self, training: Training) -> None:
        super().__init__("accuracy", mode="max", patience=training.patience)
        self._thaw = training.unfreeze_epoch or 0

    @property
    def spent(self) -> bool:
        return self.wait_count >= self.patience

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 < self._thaw:
            self.wait_count, trainer.should_stop = 0, False
