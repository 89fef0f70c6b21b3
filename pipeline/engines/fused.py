"""A folded ResNet in half precision, every convolution one kernel with its bias, its shortcut and its ReLU: cuDNN's.

On an H100 this makes 69,096 images a second of ResNet-18 at 224 pixels, autocast 39,059 (LOG.md, 2026-11-26): run apart, bias,
sum and ReLU each read and write every activation once more. torch.compile makes 11 % more again, for 10 s of every start and a
C compiler on every node. What cuDNN has no such kernel for, and all there is on a CPU, runs as separate ones, which is how the
tests prove the structure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.resnet import ConvNorm, ResNet


class Fused:
    """A callable on [N, 3, S, S], normalised, of `dtype` and channels last; gives the pooled features, float32 [N, features].

    The model stays as it is; the weights are copied. Raises ValueError for one that is not folded.
    """

    def __init__(self, model: ResNet, dtype: torch.dtype) -> None:
        network: Any = model.resnet  # Any: torch's modules do not say what their children are
        self.stem = _Convolution(network.embedder.embedder, dtype)
        self.pooler = network.embedder.pooler
        self.layers = [_Layer(layer, dtype) for stage in network.encoder.stages for layer in stage.layers]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.pooler(self.stem.relu(x))
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=(2, 3), dtype=torch.float32)


class _Layer:
    """A residual layer, basic or bottleneck."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        projection = layer.shortcut if isinstance(layer.shortcut, ConvNorm) else None
        *before, last = layer.layer
        self.before = [_Convolution(convolution, dtype) for convolution in before]
        self.last = _Convolution(last, dtype, beside=projection)
        self.shortcut = _Convolution(projection, dtype) if projection else None

    def __call__(self, x: Tensor) -> Tensor:
        short = self.shortcut.bare(x) if self.shortcut else x
        for convolution in self.before:
            x = convolution.relu(x)
        return self.last.relu(x, short)


class _Convolution:
    """A folded convolution. Its bias holds that of one `beside` it, whose result is added to its own: one pass less."""

    def __init__(self, folded: ConvNorm, dtype: torch.dtype, *, beside: ConvNorm | None = None) -> None:
        module = folded.convolution
        biases = [other.convolution.bias for other in (folded, beside) if other is not None]
        if any(bias is None for bias in biases):
            raise ValueError("the model is not folded")
        self.weight = module.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)
        self.bias = torch.stack([bias.detach() for bias in biases if bias is not None]).sum(dim=0).to(dtype)
        self.stride: Any = module.stride
        self.padding: Any = module.padding
        self.fused = True

    def bare(self, x: Tensor) -> Tensor:
        """Without bias and ReLU."""
        return F.conv2d(x, self.weight, None, self.stride, self.padding)

    def relu(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """max(0, convolution + bias + added)."""
        if self.fused:
            try:
                return self._one_kernel(x, added)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # not CUDA, or no kernel for these channels; if it was something worse, it comes again below
                self.fused = False
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return torch.relu_(x if added is None else x.add_(added))

    def _one_kernel(self, x: Tensor, added: Tensor | None) -> Tensor:
        shape = (self.stride, self.padding, (1, 1), 1)
        if added is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *shape)
        return torch.cudnn_convolution_add_relu(x, self.weight, added, 1.0, self.bias, *shape)
