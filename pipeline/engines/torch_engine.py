"""The model in torch on a device: uint8 crops in, ranked classes out, as numpy arrays.

Batches are copied into pinned memory and to the GPU on a stream of their own while the batch before computes, and the results
come back once a call, so the device waits for the host only at both ends of a block. Batch normalisation is folded into the
convolutions. The backbone runs under autocast; pooling, classifier and softmax stay float32, they are 0.03 % of the work and
bfloat16 logits, with 8 bits, would tie. When the GPU's memory runs out the batch is halved, for good: the next block would fail
the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.scores import Scores, Wanted
from pipeline.errors import ModelError
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet

T = TypeVar("T")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchEngine:
    """A callable on uint8 [N, 3, S, S]. `batch_size` shrinks when memory runs out.

    Raises ModelError for a precision or a device that cannot be had.
    """

    def __init__(
        self, model: ResNet, preprocessing: Preprocessing, *, wanted: Wanted, precision: str, device: str, batch_size: int
    ) -> None:
        self.dtype = _check(precision, device)
        self.device, self.wanted, self.batch_size = torch.device(device), wanted, batch_size
        if self.device.type == "cuda" and self.dtype is torch.float32:
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # not TF32: 10 bits
        try:
            self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        except torch.OutOfMemoryError as error:
            do = "Give predict a GPU of its own, or one with more memory"
            raise ModelError("the GPU has no memory for the model", do=do) from error
        self.classes: int = model.classifier[1].out_features  # type: ignore[assignment]
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(preprocessing.mean, device=self.device).reshape(shape) * 255
        self.scale = 1 / (torch.tensor(preprocessing.std, device=self.device).reshape(shape) * 255)
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, pixels: np.ndarray, rows: np.ndarray) -> Scores:
        """Scores of the images `pixels[rows]`, in that order; `rows` is int [N], N > 0. Raises ModelError when not even one
        image fits into the GPU's memory."""
        results: list[tuple[Tensor, ...]] = []
        start = 0
        with torch.inference_mode(), self._autocast():
            batch: Tensor | None = None
            while start < len(rows):
                if batch is None:  # the next one is copied while the one before computes
                    here = rows[start : start + self.batch_size]
                    batch = self._try(partial(self._upload, pixels, here), len(here), pixels)
                    continue
                result = self._try(partial(self._forward, batch), len(batch), pixels)
                if result is not None:
                    results.append(result)
                    start += len(batch)
                batch = None
        with torch.inference_mode():  # autocast to bfloat16 refuses to join float16, which probabilities are
            ids, scores, finite, *rest = (torch.cat(part).cpu().numpy() for part in zip(*results, strict=True))
        embeddings = rest.pop(0) if self.wanted.embeddings else None
        return Scores(ids, scores, finite, embeddings, rest.pop(0) if self.wanted.probabilities else None)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def _upload(self, pixels: np.ndarray, rows: np.ndarray) -> Tensor:
        """The images on the device, uint8. On a GPU this returns while the copy is under way."""
        staged = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, pin_memory=self.copying is not None)
        np.take(pixels, rows, axis=0, out=staged.numpy(), mode="clip")  # any other mode makes another copy
        if self.copying is None:
            return staged
        with torch.cuda.stream(self.copying):
            batch = staged.to(self.device, non_blocking=True)
        batch.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _try(self, step: Callable[[], T], count: int, pixels: np.ndarray) -> T | None:
        """What a step on `count` images gives, still on the device, or None when memory ran out and the batch size was halved."""
        try:
            return step()
        except torch.OutOfMemoryError:
            pass  # freed only outside of the handler, whose traceback holds the tensors
        if count == 1:
            got = f"the GPU has no memory for one image of {pixels.shape[-1]} × {pixels.shape[-1]} pixels"
            raise ModelError(got, do="Give predict a GPU of its own, or one with more memory")
        self.batch_size = count // 2
        torch.cuda.empty_cache()
        return None

    def _forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        normalised = (batch.to(torch.float32, memory_format=torch.channels_last) - self.mean) * self.scale
        features = self.model.features(normalised)
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model.classifier(features.float())
            probabilities = logits.softmax(dim=1)
        scores, ids = probabilities.topk(min(self.wanted.top_k, self.classes), dim=1)
        results = [ids.to(torch.int32), scores, logits.isfinite().all(dim=1)]
        if self.wanted.embeddings:
            results.append(features.float())
        if self.wanted.probabilities:
            results.append(probabilities.to(torch.float16))
        return tuple(results)


def _check(precision: str, device: str) -> torch.dtype:
    if precision not in _DTYPES:
        do = "Set model.precision to one of these"
        raise ModelError(f"model: precision is {precision}", need=", ".join(_DTYPES), do=do)
    if precision == "float16" and device == "cpu":
        raise ModelError("model: precision is float16 on a CPU", need="a GPU", do="Take bfloat16 or float32")
    if device.startswith("cuda") and not torch.cuda.is_available():
        do = "Set resources.predict.gpus_per_actor to 0, or repair the driver"
        raise ModelError("predict: torch sees no CUDA device", need="one", do=do)
    return _DTYPES[precision]
