"""An artifact over labelled images: the stages of labelling, what they answer, and how long each takes.

The stages are those of a labelling run, called in turn in one process, so accuracy is that of the labels to come and the rates
are of each stage alone with all threads. A run overlaps the two and pays for moving rows between processes: its rate is not here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.artifact import Artifact
from pipeline.predict import Predict
from pipeline.prepare.data import MAX_PIXELS, LeftOut
from pipeline.prepare.metrics import Predictions
from pipeline.preprocess import Preprocess
from pipeline.rows import pixels_view
from pipeline.spec import ModelSource, Output

TRUTH = "truth"
TOP = 5


@dataclass(frozen=True, eq=False)
class Mistake:
    """An image taken for another class: classes as numbers, `pixels` uint8 [3, S, S] as the model saw them."""

    key: str
    source: str
    truth: int
    answer: int
    score: float
    truth_score: float
    pixels: np.ndarray = field(repr=False)


class Clock:
    """Times calls on blocks of images. Those that have failed already take no time, and do not count."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, float]] = []

    def __call__(self, work: Callable[[pa.Table], pa.Table], block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        result = work(block)
        self._calls.append((block["error_class"].null_count, time.perf_counter() - started))
        return result

    @property
    def rate(self) -> float:
        """Images a second, without the first block if there are more: it pays for choosing kernels and filling caches."""
        calls = self._calls[1:] or self._calls
        return sum(images for images, _ in calls) / max(1e-9, sum(seconds for _, seconds in calls))


class Evaluator:
    """An artifact that is asked about blocks of labelled images (rows.IMAGE and the column TRUTH), and all it answered.

    Raises ModelError when the model, its precision and the device do not go together.
    """

    def __init__(self, artifact: Artifact, source: ModelSource, *, device: str, batch_size: int) -> None:
        self.artifact, threads = artifact, torch.get_num_threads()
        self._preprocess = Preprocess(artifact.preprocessing, max_pixels=MAX_PIXELS, threads=threads)
        self._predict = Predict(
            artifact,
            source,
            device=device,
            batch_size=batch_size,
            output=Output(uri=source.uri, top_k=TOP, probabilities=True),  # the URI is not used: nothing is written
            threads=threads,
        )
        self.caution = self._predict.caution
        self.decoding, self.predicting = Clock(), Clock()
        self.left_out = LeftOut()
        self._answers: list[Predictions] = []
        self._scored: list[np.ndarray] = []

    def decode(self, block: pa.Table) -> pa.Table:
        return self.decoding(self._preprocess, block)

    def ask(self, decoded: pa.Table) -> tuple[pa.Table, Predictions]:
        """The rows of the images that could be scored, as predict puts them out and with `pixels`, and the answers for them."""
        said = self.predicting(self._predict, decoded).append_column("pixels", decoded["pixels"])
        self.left_out.add_failed(said)
        scored = np.asarray(pc.equal(said["status"], "ok").combine_chunks())
        said = said.filter(pa.array(scored))
        answers = self._read(said)
        self._answers.append(answers)
        self._scored.append(scored)
        return said, answers

    @property
    def answers(self) -> Predictions:
        """For every image that could be scored, in order."""
        columns = ("ids", "score", "truth", "truth_score")
        return Predictions(*(np.concatenate([getattr(part, name) for part in self._answers]) for name in columns))

    @property
    def scored(self) -> np.ndarray:
        """Which of the images could be scored, bool [N]."""
        return np.concatenate(self._scored)

    def _read(self, said: pa.Table) -> Predictions:
        classes = len(self.artifact.labels)
        ids = _numpy(pc.struct_field(pc.list_flatten(said["topk"]), "label_id")).reshape(-1, min(TOP, classes))
        probabilities = _numpy(pc.list_flatten(said["probabilities"])).reshape(-1, classes)
        truth = _numpy(said[TRUTH])
        return Predictions(ids, _numpy(said["score"]), truth, probabilities[np.arange(len(truth)), truth])


def mistakes(said: pa.Table, answers: Predictions, *, size: int, most: int) -> list[Mistake]:
    """Of the images of a block those that are wrong with the highest scores; `size` is the edge of `pixels`."""
    wrong = np.flatnonzero(~answers.right)
    worst = wrong[np.argsort(-answers.score[wrong], kind="stable")[:most]]
    pixels = pixels_view(said["pixels"], size)
    return [
        Mistake(
            key=said["key"][row].as_py(),
            source=said["source"][row].as_py(),
            truth=int(answers.truth[row]),
            answer=int(answers.ids[row, 0]),
            score=float(answers.score[row]),
            truth_score=float(answers.truth_score[row]),
            pixels=pixels[row].copy(),
        )
        for row in worst.tolist()
    ]


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    array: np.ndarray = column.to_numpy()
    return array
