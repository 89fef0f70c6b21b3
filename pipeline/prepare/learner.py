"""One training as Lightning sees it: a network, what it is to minimise, the optimiser and the schedule.

Targets are distributions, float [N, classes], all zero for an image without a label, so smoothing, mixup and distillation speak
of the same thing. Norms and biases do not decay. Whatever is drawn at random depends on (seed, epoch, step) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from pipeline.job.training import Training
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet
from pipeline.prepare.images import seeded

_LAST_RATE = 0.01  # of the learning rate, at the end of the cosine
MEASURED = "measured"  # in a checkpoint: of which epoch it is, and what that came to


#: (network, images float [N, 3, S, S] normalised, targets [N, classes]) → the loss to minimise, a scalar. Parameters of its own,
#: where it is a module with some, are trained beside the network and thrown away.
Objective = Callable[[ResNet, Tensor, Tensor], Tensor]


class CrossEntropy(nn.Module):
    """Against labels, smoothed. An image counts as much as its class: `weights` [classes], 1 on average over the images, so the
    rate need not change with them. Weighting the smoothed target instead would make a rare class the best answer to all."""

    def __init__(self, smoothing: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, network: ResNet, images: Tensor, targets: Tensor) -> Tensor:
        return self.of(network(images), targets)

    def of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the images, those without a label counting nothing, and one mixed with such a one its share."""
        share = targets.sum(dim=1)
        whole = targets / torch.where(share > 0, share, 1.0).unsqueeze(1)  # or the share would count twice
        each = F.cross_entropy(logits, whole, label_smoothing=self.smoothing, reduction="none")
        weights = share if self.weights is None else targets @ cast(Tensor, self.weights)
        return (each * weights).mean()


def balanced_weights(counts: Iterable[int]) -> Tensor:
    """Weights in inverse proportion to the images of each class, 1 on average over the images; float [classes]."""
    numbers = torch.tensor(list(counts), dtype=torch.float32)
    return torch.where(numbers > 0, numbers.sum() / (numbers.clamp(min=1) * (numbers > 0).sum()), 0.0)


class Normalise(nn.Module):
    """uint8 [N, 3, S, S] → (x / 255 - mean) / std, float32, channels last."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        return (images - self.mean) / self.std


class Learner(pl.LightningModule):
    """Batches are (pixels uint8 [N, 3, S, S], classes int64 [N])."""

    def __init__(self, network: ResNet, objective: Objective, preprocessing: Preprocessing, training: Training) -> None:
        super().__init__()
        # Channels last is what predict runs; on a CPU it trains as fast as channels first.
        # A loaded network is in eval mode, and Lightning leaves it so.
        self.network = network.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.objective, self.training_, self.normalise = objective, training, Normalise(preprocessing)
        self.average = _average(self.network, training.ema) if training.ema else None
        self.classes: int = network.classifier[1].out_features  # type: ignore[assignment]
        self.accuracy = MulticlassAccuracy(self.classes, average="micro")
        self.validation_loss, self.loss = (MeanMetric(nan_strategy="disable") for _ in range(2))
        mixers = ((v2.MixUp, training.mixup), (v2.CutMix, training.cutmix))
        ways = [mixer(alpha=alpha, num_classes=self.classes) for mixer, alpha in mixers if alpha]
        self.mix = v2.RandomChoice(ways) if ways else None

    def on_train_epoch_start(self) -> None:
        """Freeze, thaw. A frozen part keeps the statistics of its norms too."""
        wanted = self.training_
        thawed = wanted.unfreeze_epoch is not None and self.current_epoch + 1 >= wanted.unfreeze_epoch
        for part in parts(self.network)[: wanted.freeze]:
            part.requires_grad_(thawed).train(thawed)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        pixels, labels = batch
        images = self.normalise(pixels)
        targets = F.one_hot(labels.clamp(min=0), self.classes).float() * (labels >= 0).unsqueeze(1)
        if self.mix is not None:
            with seeded(self.training_.seed, self.current_epoch, number, self.global_rank):
                images, targets = self.mix(images, targets)
        loss: Tensor = self.objective(self.network, images, targets)
        self.loss.update(loss.detach())
        return loss

    def optimizer_step(self, *args: Any, **more: Any) -> None:
        super().optimizer_step(*args, **more)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        pixels, labels = batch
        network = self.network if self.average is None else self.average
        logits = network(self.normalise(pixels))
        self.accuracy.update(logits, labels)
        # Image by image, and so counted: of a batch's mean MeanMetric forgets the weight where it is not to look for nan (1.9).
        self.validation_loss.update(F.cross_entropy(logits, labels, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Measured on all validation images by every worker, so nothing has to be added up."""
        accuracy, loss = self.accuracy.compute(), self.validation_loss.compute()
        right = torch.round(accuracy * self.validation_loss.weight)
        self.log("accuracy", accuracy)
        self.log("validation_loss", loss)
        self.log("training_loss", self.loss.compute())
        # The epoch to keep: images that are right, and of as many the smaller loss, or a model of few validation images that
        # has them all right would be one that is sure of none.
        self.log("score", right + torch.nan_to_num(1 / (1 + loss), nan=0.0))
        for metric in (self.accuracy, self.validation_loss, self.loss):
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says of which epoch it is, from 1, and what that came to."""
        named = {"loss": "training_loss", "validation_loss": "validation_loss", "accuracy": "accuracy"}
        values = {name: float(self.trainer.callback_metrics[metric]) for name, metric in named.items()}
        checkpoint[MEASURED] = {"number": self.current_epoch + 1, **values}

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the network that was validated, from the `state_dict` of a checkpoint."""
        prefix = "network." if self.average is None else "average.module."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def configure_optimizers(self) -> Any:
        wanted = self.training_
        groups = decay_groups(self, wanted.weight_decay)
        # Fused is the faster one, but under AMP Lightning cannot clip its gradients. Nor can SGD's go on with parameters that
        # have moved beside some that thaw and have not (torch 2.15). Then None, torch's own choice: False would be a loop over
        # the tensors, which on a GPU is five launches for each of them.
        thaws = wanted.optimizer == "sgd" and wanted.freeze and wanted.unfreeze_epoch
        clips = wanted.gradient_clip and precision_of(wanted, self.device.type) != "float32"
        fused = None if thaws or clips else True
        if wanted.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=wanted.learning_rate, fused=fused)
        else:
            optimizer = torch.optim.SGD(groups, lr=wanted.learning_rate, momentum=0.9, nesterov=True, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        rate = warmup_cosine(warmup=round(wanted.warmup_epochs * total / wanted.epochs), total=total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _average(network: ResNet, decay: float) -> AveragedModel:
    """A part of the learner, so it is where the network is and in every checkpoint. Lightning's own is neither: it leaves the
    average on the CPU, and out of a checkpoint of weights only, which the best one is (2.6)."""

    def update(average: Any, current: Any, steps: Any) -> None:
        with torch.no_grad():
            if average[0].is_floating_point():  # weights, and the statistics of norms: of nearly the same images as they are
                late = min(decay, float((1 + steps) / (10 + steps)))
                torch._foreach_lerp_(average, current, 1 - late)  # what is frozen stays as it is, to the bit
            else:
                torch._foreach_copy_(average, current)  # how many batches a norm has seen

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True).requires_grad_(False)


def precision_of(training: Training, device: str) -> str:
    """The arithmetic that is asked for, or the device's own."""
    return training.precision or ("float16" if device == "cuda" else "float32")


def parts(network: ResNet) -> list[nn.Module]:
    """Stem, then the stages: what `training.freeze` counts."""
    stem: Any = network.resnet[0]
    stages: Any = network.resnet[1][0]  # type: ignore[index]
    return [stem, *stages]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for an optimiser: matrices and kernels decay, vectors (norms and biases) do not. What is frozen when it is
    called, as an average is, is in none."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed, spared = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def warmup_cosine(*, warmup: int, total: int) -> Callable[[int], float]:
    """Step → share of the highest rate: a straight climb, then half a cosine down to _LAST_RATE."""

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2

    return rate
