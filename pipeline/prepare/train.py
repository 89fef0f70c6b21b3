"""The training loop: uint8 images in memory, a model, and the weights of its best epoch.

One loop serves every way of making a model: what to minimise is a callable (`Objective`), so distillation passes its own. AdamW
with a cosine schedule and warm-up, mixed precision where the device gains by it, early stopping on a validation split. The price:
images are held in memory, 150 kB each at 224 pixels, so 100,000 take 15 GB and more need a loader in place of `Labelled`. On a
CPU the same seed and number of threads give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import JobError, ModelError
from pipeline.prepare.augment import Augment, augment
from pipeline.preprocessing import Preprocessing
from pipeline.quantity import Count, Model, Share

#: (model, float [N, 3, S, S] normalised, labels int64 [N]) → the loss to minimise, a scalar.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LAST_RATE = 0.01  # of the learning rate, at the end of the cosine


class TrainSettings(Model):
    """How to train. The defaults suit a small data set and a random start; from a trained model a third of the rate is enough."""

    epochs: Count = 12
    """Passes over the training images, at most."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images of one step; batch normalisation needs two."""
    learning_rate: Share = 1e-3
    """Highest rate of AdamW, after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decay of convolution and classifier weights; norms and biases have none."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Epochs in which the rate climbs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target spread over all classes."""
    patience: Count = 5
    """Epochs without a better validation result before the training stops."""
    precision: Literal["float32", "float16", "bfloat16"] | None = None
    """Arithmetic; float16 on a GPU and float32 on a CPU when absent, few CPUs gain by bfloat16 in training."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the order of images, the augmentation, and a random start."""
    augment: Augment = Augment()
    """Random changes of the training images."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images and their classes: uint8 [N, 3, S, S] and int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to. `loss` is the mean objective of its steps, the other two are measured on the validation images."""

    number: int
    loss: float
    validation_loss: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Order of merit: accuracy, then the lower loss."""
        return self.accuracy, -self.validation_loss


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Every epoch that was run, and the one whose weights were kept."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    stopped_early: bool


def train(
    model: nn.Module,
    data: tuple[Labelled, Labelled],
    *,
    preprocessing: Preprocessing,
    settings: TrainSettings,
    objective: Objective | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Train `model` where it lies, on (training, validation) images; afterwards it is in eval mode with its best epoch's weights.

    `objective` is label-smoothed cross entropy when absent; `progress` is called after every epoch. The global random numbers
    are left as they were. Raises JobError for fewer images than a batch, ModelError when the loss stops being finite.
    """
    if len(data[0]) < settings.batch_size or not len(data[1]):
        got = f"{len(data[0]):,} images to train on and {len(data[1]):,} to validate with"
        raise JobError(got, need=f"a batch of {settings.batch_size} and one", do="Give more images or lower batch_size")
    device = next(model.parameters()).device
    objective = objective or _cross_entropy(settings.label_smoothing)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        loop = _Loop(model, settings, Normalise(preprocessing, device), steps=len(data[0]) // settings.batch_size)
        return _until_no_better(loop, data, objective, progress)


def _until_no_better(
    loop: _Loop, data: tuple[Labelled, Labelled], objective: Objective, progress: Callable[[Epoch], None] | None
) -> TrainResult:
    epochs: list[Epoch] = []
    best: Epoch | None = None
    weights: dict[str, Tensor] = {}
    for number in range(1, loop.settings.epochs + 1):
        loss = loop.epoch(data[0], objective)
        epoch = Epoch(number, loss, *loop.validate(data[1]))
        epochs.append(epoch)
        if best is None or epoch.rank > best.rank:
            best, weights = epoch, {name: tensor.detach().clone() for name, tensor in loop.model.state_dict().items()}
        if progress is not None:
            progress(epoch)
        if number - best.number >= loop.settings.patience:
            break
    assert best is not None  # settings.epochs is at least 1
    loop.model.load_state_dict(weights)
    loop.model.eval().requires_grad_(False)
    return TrainResult(tuple(epochs), best, stopped_early=len(epochs) < loop.settings.epochs)


class Normalise:
    """uint8 [N, 3, S, S] on any device → (x / 255 - mean) / std, float32, channels last, on `device`."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(preprocessing.mean, device=device).reshape(1, 3, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std, device=device).reshape(1, 3, 1, 1) * 255

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.device).to(torch.float32, memory_format=torch.channels_last)
        return (images - self.mean) / self.std


class _Loop:
    """Model, optimiser and schedule of one training."""

    def __init__(self, model: nn.Module, settings: TrainSettings, normalise: Normalise, *, steps: int) -> None:
        # Channels last is what predict runs; at 32 pixels on a CPU it trains as fast as channels first, predicting at 224 1.3 x.
        self.model = model.requires_grad_(True).to(memory_format=torch.channels_last)
        self.settings, self.normalise = settings, normalise
        kind = normalise.device.type
        dtype = _DTYPES[settings.precision or ("float16" if kind == "cuda" else "float32")]
        self.autocast = nullcontext() if dtype is torch.float32 else torch.autocast(kind, dtype=dtype)
        self.scaler = torch.amp.GradScaler(kind, enabled=dtype is torch.float16)
        self.optimizer = torch.optim.AdamW(decay_groups(model, settings.weight_decay), lr=settings.learning_rate, fused=True)
        rate = _warmup_cosine(warmup=round(settings.warmup_epochs * steps), total=settings.epochs * steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def epoch(self, data: Labelled, objective: Objective) -> float:
        """One pass in random order; the mean loss of its steps. The images that fill no last batch are other ones every time."""
        self.model.train()
        losses = []
        for pixels, labels in self._shuffled(data):
            with self.autocast:
                loss = objective(self.model, self.normalise(pixels), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            losses.append(loss.detach())  # read once an epoch: reading it here would make the host wait for the GPU at every step
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise ModelError(
                f"training: the loss became {mean}", need="a finite number", do="Lower learning_rate, or take bfloat16"
            )
        return mean

    def _shuffled(self, data: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        device, size = self.normalise.device, self.settings.batch_size
        for batch in torch.randperm(len(data)).unfold(0, size, size):
            yield augment(data.pixels[batch].to(device), self.settings.augment), data.labels[batch].to(device)

    def validate(self, data: Labelled) -> tuple[float, float]:
        """(cross entropy, accuracy) without augmentation or smoothing."""
        with self.autocast:
            return measure(self.model, data, self.normalise, batch_size=self.settings.batch_size)


def measure(model: nn.Module, data: Labelled, normalise: Normalise, *, batch_size: int) -> tuple[float, float]:
    """(mean cross entropy, accuracy) of a model over labelled images; leaves it in eval mode."""
    model.eval()
    loss, right = 0.0, 0
    with torch.inference_mode():
        for pixels, labels in zip(torch.split(data.pixels, batch_size), torch.split(data.labels, batch_size), strict=True):
            logits = model(normalise(pixels)).float().cpu()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
    return loss / len(data), right / len(data)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for an optimiser: matrices and kernels decay, vectors (norms and biases) do not."""
    parameters = list(model.parameters())
    decayed, spared = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _warmup_cosine(*, warmup: int, total: int) -> Callable[[int], float]:
    """Step → share of the highest rate: a straight climb, then half a cosine down to _LAST_RATE."""

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2

    return rate


def _cross_entropy(label_smoothing: float) -> Objective:
    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    return objective
