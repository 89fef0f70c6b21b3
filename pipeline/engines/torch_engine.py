"""The model in torch on a device: uint8 crops in, ranked classes out, as numpy arrays.

While a batch computes the next one is copied (`feed`), and the results come back once a call, so the device waits for the host
only at both ends of a block. Batch normalisation is folded into the convolutions. In half precision a GPU runs them fused
(`fused`), a CPU runs them under autocast; pooling, classifier and softmax stay float32, they are 0.03 % of the work and bfloat16
logits, with 8 bits, would tie. When the GPU's memory runs out the batch is halved, for good: the next block would fail the same
way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.feed import Feed
from pipeline.engines.fused import Fused
from pipeline.engines.scores import Scores, Wanted
from pipeline.errors import ModelError
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet

_FEW = 32  # of a block for a GPU's lane: those that are labelled both ways, and those that are not plain
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchEngine:
    """A callable on uint8 [N, 3, S, S], for one thread at a time. `batch_size` shrinks when memory runs out.

    Raises ModelError for a precision or a device that cannot be had.
    """

    def __init__(
        self, model: ResNet, preprocessing: Preprocessing, *, wanted: Wanted, precision: str, device: str, batch_size: int
    ) -> None:
        dtype = _check(precision, device)
        self.device, self.wanted, self.batch_size = torch.device(device), wanted, batch_size
        cuda = self.device.type == "cuda"
        if cuda and dtype is torch.float32:
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # not TF32: 10 bits
        self.fused = cuda and dtype is not torch.float32
        self.autocast = None if self.fused or dtype is torch.float32 else dtype
        self.sees = dtype if self.fused else torch.float32
        try:
            model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.features: Callable[[Tensor], Tensor] = Fused(model, dtype) if self.fused else model.features
        except torch.OutOfMemoryError as error:
            do = "Give predict a GPU of its own, or one with more memory"
            raise ModelError("the GPU has no memory for the model", do=do) from error
        if self.fused:
            torch.backends.cudnn.benchmark = True  # cuDNN tries its kernels on the first batch of every size: see _padded
        self.classifier = model.classifier
        self.classes: int = model.classifier[1].out_features  # type: ignore[assignment]
        mean, std = (
            torch.tensor(of, device=self.device).reshape(1, 3, 1, 1) * 255 for of in (preprocessing.mean, preprocessing.std)
        )
        self.scale, self.shift = 1 / std, -mean / std
        self.feed = Feed(self.device) if cuda else None

    def __call__(self, pixels: np.ndarray) -> Scores:
        """Scores of the images uint8 [N, 3, S, S], N > 0, in the host's memory. Raises ModelError when not even one
        image fits into the GPU's memory."""
        return self._scores(len(pixels), pixels.shape[-1], lambda images: self._upload(pixels[images]))

    def on_device(self, pixels: Tensor, *others: np.ndarray) -> Scores:
        """Scores of uint8 [N, 3, S, S], that is on the engine's device already, in any layout, made on the current stream; and of
        `others` after them, which are in the host's memory. At least one image. Raises as a call does."""
        at = len(pixels)
        with torch.inference_mode():  # as all that is uploaded: what was made there is not to be written to outside
            whole = torch.empty((at + sum(map(len, others)), *pixels.shape[1:]), dtype=torch.uint8, device=self.device)
            whole[:at] = pixels
            for images in filter(len, others):
                whole[at : at + len(images)] = self._upload(images)  # before the next but one writes over it
                at += len(images)
        return self._scores(len(whole), whole.shape[-1], lambda images: whole[images])

    def _scores(self, count: int, size: int, give: Callable[[slice], Tensor]) -> Scores:
        results: list[tuple[Tensor, ...]] = []
        start = 0
        with torch.inference_mode(), self._autocast():
            while start < count:
                images = slice(start, min(count, start + self.batch_size))
                result = self._try(give, images, size)
                if result is not None:
                    results.append(result)
                    start = images.stop
        with torch.inference_mode():  # autocast to bfloat16 refuses to join float16, which probabilities are
            joined = [torch.cat(part) for part in zip(*results, strict=True)]
            if self.device.type == "cuda":  # a copy would wait inside the driver, where other threads cannot launch anything then
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record()
                done.synchronize()
            ids, scores, finite, *rest = (part.cpu().numpy() for part in joined)
        embeddings = rest.pop(0) if self.wanted.embeddings else None
        return Scores(ids, scores, finite, embeddings, rest.pop(0) if self.wanted.probabilities else None)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def _upload(self, pixels: np.ndarray) -> Tensor:
        """The images on the device, uint8. On a GPU this returns while the copy is under way."""
        if self.feed is not None:
            return self.feed(pixels)
        return torch.tensor(pixels)  # a copy: Arrow's memory is not to be written to

    def _try(self, give: Callable[[slice], Tensor], images: slice, size: int) -> tuple[Tensor, ...] | None:
        """The results of these images, still on the device, or None when memory ran out and the batch size was halved."""
        try:
            return self.forward(give(images))
        except torch.OutOfMemoryError:
            pass  # freed only outside of the handler, whose traceback holds the tensors
        count = images.stop - images.start
        if count == 1:
            got = f"the GPU has no memory for one image of {size} × {size} pixels"
            raise ModelError(got, do="Give predict a GPU of its own, or one with more memory")
        self.batch_size = count // 2
        torch.cuda.empty_cache()
        return None

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """ids, scores, finite and what else is wanted, as Scores has them, of uint8 [N, 3, S, S]."""
        features = self.features(self._normalised(batch))[: len(batch)]
        with torch.autocast(self.device.type, enabled=False):
            logits = self.classifier(features.float())
            probabilities = logits.softmax(dim=1)
        scores, ids = probabilities.topk(min(self.wanted.top_k, self.classes), dim=1)
        results = [ids.to(torch.int32), scores, logits.isfinite().all(dim=1)]
        if self.wanted.embeddings:
            results.append(features.float())
        if self.wanted.probabilities:
            results.append(probabilities.to(torch.float16))
        return tuple(results)

    def _normalised(self, batch: Tensor) -> Tensor:
        """What the network sees, channels last; zeros behind a batch that has none of the sizes that are computed."""
        count, room = len(batch), self._padded(len(batch))
        shape = (room, *batch.shape[1:])
        seen = torch.empty(shape, dtype=self.sees, device=self.device, memory_format=torch.channels_last)
        # One pass that computes in float32 and rounds once, whatever it reads and writes: a cast, a difference, a product and
        # another cast were 1.0 of the 7.3 ms that an H100 took for 512 images.
        torch.addcmul(self.shift, batch, self.scale, out=seen[:count])
        seen[count:] = 0
        return seen

    def _padded(self, count: int) -> int:
        """How many images to compute for `count`: a few, a quarter, a half, three quarters or all of batch_size where cuDNN tries
        its kernels anew for every size, which the last batch of a block may have any of; else `count`."""
        if not self.fused:
            return count
        quarter = -(-self.batch_size // 4)
        return _FEW if count <= _FEW < quarter else min(self.batch_size, -(-count // quarter) * quarter)


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
