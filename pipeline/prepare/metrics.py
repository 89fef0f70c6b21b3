"""How good answers are: accuracy, precision and recall, confusions, calibration. Numpy alone.

Measured from the ranked classes of every image and the score of the first, not from all probabilities: those are what labelling
puts out, ties included, and 1,000 classes of 50,000 images would be 200 MB. A ratio of nothing (the precision of a class that
was never answered) is nan, not 0: it is unknown, and a mean over classes must not count it as bad.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # as in Guo et al. 2017, arXiv 1706.04599
SMALLEST = 2.0**-24  # of float16, above 0: what a probability that was rounded to 0 counts as in a logarithm


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of N images, and what they are."""

    ids: np.ndarray  # int [N, k], the best class first
    score: np.ndarray  # float [N], probability of the best class
    truth: np.ndarray  # int [N]
    truth_score: np.ndarray  # float [N], probability of the true class

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def right(self) -> np.ndarray:
        """bool [N]"""
        right: np.ndarray = self.ids[:, 0] == self.truth
        return right

    def where(self, mask: np.ndarray) -> Predictions:
        """Those of the images that `mask`, bool [N], picks."""
        return Predictions(self.ids[mask], self.score[mask], self.truth[mask], self.truth_score[mask])


@dataclass(frozen=True, slots=True)
class Bin:
    """The images whose score is over `low` and up to `high`: how sure the model was, and how often it was right. nan for none."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Metrics:
    """`confusion[t, p]` images of class t were taken for class p."""

    top1: float
    top5: float
    ece: float
    nll: float
    confusion: np.ndarray
    reliability: tuple[Bin, ...]

    @property
    def images(self) -> np.ndarray:
        """Images of each class, int [C]."""
        images: np.ndarray = self.confusion.sum(axis=1)
        return images

    @property
    def precision(self) -> np.ndarray:
        """Share of the images taken for a class that are of it, float [C]."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """Share of the images of a class that were taken for it, float [C]."""
        return _ratio(self.confusion.diagonal(), self.images)


def measure(answers: Predictions, classes: int) -> Metrics:
    """All of it, of one image or more."""
    bins = reliability(answers.score, answers.right)
    return Metrics(
        top1=float(answers.right.mean()),
        top5=top_k(answers, 5),
        ece=calibration_error(bins),
        nll=0.0 - float(np.log(np.maximum(answers.truth_score.astype(np.float64), SMALLEST)).mean()),
        confusion=confusion_matrix(answers.truth, answers.ids[:, 0], classes),
        reliability=bins,
    )


def top_k(answers: Predictions, k: int) -> float:
    """Share of the images whose class is among the k best."""
    return float((answers.ids[:, :k] == answers.truth[:, None]).any(axis=1).mean())


def confusion_matrix(truth: np.ndarray, answered: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C], rows are the truth."""
    cells = truth.astype(np.int64) * classes + answered
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def reliability(score: np.ndarray, right: np.ndarray) -> tuple[Bin, ...]:
    """BINS bins of equal width over the scores 0 to 1."""
    score = score.astype(np.float64)
    edges = np.linspace(0, 1, BINS + 1)
    at = np.searchsorted(edges[1:-1], score, side="left")  # an edge belongs to the bin below it
    images = np.bincount(at, minlength=BINS)
    confidence = _ratio(np.bincount(at, weights=score, minlength=BINS), images)
    accuracy = _ratio(np.bincount(at, weights=right, minlength=BINS), images)
    columns = (edges[:-1], edges[1:], images, confidence, accuracy)
    return tuple(Bin(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Expected calibration error: the gap between confidence and accuracy, weighted by images (equation 3 of the paper)."""
    images = sum(part.images for part in bins)
    return sum(part.images * abs(part.accuracy - part.confidence) for part in bins if part.images) / images


def agreement(first: Predictions, second: Predictions) -> float:
    """Share of the images to which both give the same class, right or wrong."""
    return float((first.ids[:, 0] == second.ids[:, 0]).mean())


def worst_confusions(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(truth, answer, images) of the commonest mistakes, most frequent first."""
    wrong = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = (np.unravel_index(cell, wrong.shape) for cell in order)
    return [(int(row), int(column), int(wrong[row, column])) for row, column in cells if wrong[row, column]]


def most_confused(confusion: np.ndarray, most: int) -> list[int]:
    """The classes with the most mistakes from and to them, in their own order."""
    wrong = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:most]
    return sorted(int(number) for number in order)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """nan where `whole` is 0."""
    ratio: np.ndarray = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return ratio
