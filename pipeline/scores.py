"""What an engine is asked and what it answers. Needs neither torch nor onnxruntime: a worker loads only the one it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to return of every image."""

    top_k: int = 1
    embeddings: bool = False
    probabilities: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Results of N images, best class first. Where `finite` is false the other values mean nothing."""

    ids: np.ndarray  # int32 [N, k]
    scores: np.ndarray  # float32 [N, k], softmax over all classes
    finite: np.ndarray  # bool [N]
    embeddings: np.ndarray | None  # float32 [N, features]
    probabilities: np.ndarray | None  # float16 [N, classes]


#: (pixels uint8 [M, 3, S, S], rows int [N], N > 0) → scores of the images `pixels[rows]`, in that order.
Engine = Callable[[np.ndarray, np.ndarray], Scores]
