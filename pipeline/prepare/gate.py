"""The gate: int8 candidates beside their float32 original, on the same images, in the same minutes, on this machine.

Every batch is one round in which all of them label it, in an order that moves on by one; so each speed-up is a median over rounds
of the ratio within a round, and what else the machine does falls on all alike. Which candidate is the best is decided by
agreement with float32 and never by time: they are as fast as each other within the noise, and so the same job makes the same
artifact again.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.engines.onnx_engine import OnnxEngine
from pipeline.engines.scores import Scores, Wanted
from pipeline.errors import ModelError
from pipeline.job.quantity import exceeds
from pipeline.job.recipe import Gate

BATCH = 16  # images; from 8 to 32 no model changes by more than 5 %
ROUNDS = 7  # at least, by repeating the first batch when there are fewer
FLOAT32 = "float32"

#: Crops uint8 [N, 3, S, S] and their classes int64 [N], N > 0.
Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model on all the images."""

    name: str
    bytes: int
    images: int
    right: int
    same: int
    """Images whose best class is that of float32."""
    drift: float
    """Mean total variation distance of the probabilities to those of float32, 0 to 1."""
    images_per_second: float
    speedup: float

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def agreement(self) -> float:
        return self.same / self.images


@dataclass
class _Tally:
    right: int = 0
    same: int = 0
    drift: float = 0.0
    paces: list[float] = field(default_factory=list)  # seconds an image, by round


def measure(models: Mapping[str, bytes], batches: Iterable[Batch], gate: Gate, *, threads: int) -> tuple[Measurement, ...]:
    """Measurements in the order of `models`, of which one is FLOAT32. Empty when there is no batch.

    Raises ModelError when float32 is right hardly more often than a constant answer is, for then a broken model would pass.
    """
    wanted = Wanted(probabilities=True)
    engines = {name: OnnxEngine(model, wanted=wanted, batch_size=BATCH, threads=threads) for name, model in models.items()}
    tallies = {name: _Tally() for name in models}
    truth: Counter[int] = Counter()
    first: np.ndarray | None = None
    for pixels, labels in batches:
        if first is None:
            first = pixels
            _round(engines, pixels, 0)  # warm
        truth.update(labels.tolist())
        scores = _timed(engines, pixels, tallies)
        for name, tally in tallies.items():
            _count(tally, scores[name], scores[FLOAT32], labels)
    if first is None:
        return ()
    while len(tallies[FLOAT32].paces) < ROUNDS:
        _timed(engines, first, tallies)
    _check_power(tallies[FLOAT32].right, truth, gate)
    return tuple(_measurement(name, len(models[name]), tally, tallies[FLOAT32], truth.total()) for name, tally in tallies.items())


def best_of(measured: Sequence[Measurement], gate: Gate) -> Measurement | None:
    """The candidate that passes and agrees with float32 most often; of equal ones the one whose probabilities are nearest."""
    original = next(one for one in measured if one.name == FLOAT32)
    passing = [one for one in measured if one is not original and passes(one, original, gate)]
    return max(passing, key=lambda one: (one.same, -one.drift), default=None)


def passes(candidate: Measurement, original: Measurement, gate: Gate) -> bool:
    lost = original.right - candidate.right  # in images, not in shares: 1 - 199/200 is over 0.005 in binary
    return not exceeds(lost, gate.max_accuracy_loss, of=original.images) and candidate.speedup >= gate.min_speedup


def _check_power(right: int, truth: Counter[int], gate: Gate) -> None:
    images, most = truth.total(), truth.most_common(1)[0][1]
    if not exceeds(right - most, gate.max_accuracy_loss, of=images):
        raise ModelError(
            f"float32 is right on {right} of {images} images, a constant answer on {most}: max_accuracy_loss would let that pass",
            need="images that the model tells apart, or the gate cannot see a broken one",
            do="Check the labels, measure on as many images of every class, or lower gate.max_accuracy_loss",
        )


def _round(engines: Mapping[str, OnnxEngine], pixels: np.ndarray, number: int) -> dict[str, tuple[Scores, float]]:
    """Scores and seconds of every engine, beginning with the `number`-th."""
    names = list(engines)
    results: dict[str, tuple[Scores, float]] = {}
    for at in range(len(names)):
        name = names[(at + number) % len(names)]
        since = time.perf_counter()
        scores = engines[name](pixels)
        results[name] = scores, time.perf_counter() - since
    return results


def _timed(engines: Mapping[str, OnnxEngine], pixels: np.ndarray, tallies: Mapping[str, _Tally]) -> dict[str, Scores]:
    results = _round(engines, pixels, len(tallies[FLOAT32].paces))
    for name, (_, seconds) in results.items():
        tallies[name].paces.append(seconds / len(pixels))
    return {name: scores for name, (scores, _) in results.items()}


def _count(tally: _Tally, scores: Scores, original: Scores, labels: np.ndarray) -> None:
    assert scores.probabilities is not None  # wanted
    assert original.probabilities is not None
    best = np.where(scores.finite, scores.ids[:, 0], -1)  # what is not finite is never right
    tally.right += int((best == labels).sum())
    tally.same += int((best == original.ids[:, 0]).sum())
    tally.drift += float(np.abs(scores.probabilities.astype(np.float32) - original.probabilities).sum()) / 2


def _measurement(name: str, size: int, tally: _Tally, original: _Tally, images: int) -> Measurement:
    ratios = [theirs / ours for theirs, ours in zip(original.paces, tally.paces, strict=True)]
    speed, speedup = 1 / statistics.median(tally.paces), statistics.median(ratios)
    return Measurement(name, size, images, tally.right, tally.same, tally.drift / images, speed, speedup)
