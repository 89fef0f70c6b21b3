"""The residual network itself, in plain torch, with Hugging Face's parameter names.

Not torchvision's class, though the same arithmetic (tests/test_artifact.py): importing `torchvision.models.resnet`
takes as long again as torch's own import in every worker (LOG.md, 2026-11-25). With Hugging Face's names a safetensors file loads
as it is. The stride of a bottleneck stands in its 3x3 convolution ("v1.5", torchvision and Hugging Face alike), or in its first
when `downsample_in_bottleneck` says so ("v1").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.errors import ModelError
from pipeline.model.huggingface import BOTTLENECK, Architecture


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, in most places, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.normalization: nn.Module = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalization(self.convolution(x))
        return torch.relu_(x) if self.relu else x


class Layer(nn.Module):
    """One residual layer, basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, a: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        if a.layer_type == "basic":
            layers = [ConvNorm(inputs, outputs, 3, stride=stride), ConvNorm(outputs, outputs, 3, relu=False)]
        else:
            narrow = outputs // BOTTLENECK
            first, second = (stride, 1) if a.downsample_in_bottleneck else (1, stride)
            layers = [
                ConvNorm(inputs, narrow, 1, stride=first),
                ConvNorm(narrow, narrow, 3, stride=second),
                ConvNorm(narrow, outputs, 1, relu=False),
            ]
        projects = inputs != outputs or stride != 1
        self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride, relu=False) if projects else nn.Identity()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.layer(x) + self.shortcut(x))


class ResNet(nn.Module):
    """float [N, 3, S, S], normalised, to logits [N, classes]; `features` stops before the classifier."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        if a.stem == "small":
            embedder = _named(embedder=ConvNorm(3, a.embedding_size, 3), pooler=nn.Identity())
        else:
            stem, pooler = ConvNorm(3, a.embedding_size, 7, stride=2), nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
            embedder = _named(embedder=stem, pooler=pooler)
        stages, inputs = [], a.embedding_size
        for i, (depth, outputs) in enumerate(zip(a.depths, a.hidden_sizes, strict=True)):
            rest = [Layer(a, outputs, outputs, 1) for _ in range(depth - 1)]
            stages.append(_named(layers=nn.Sequential(Layer(a, inputs, outputs, a.stride(i)), *rest)))
            inputs = outputs
        self.resnet = _named(embedder=embedder, encoder=_named(stages=nn.Sequential(*stages)))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(a.features, a.classes))

    def features(self, x: Tensor) -> Tensor:
        """float [N, 3, S, S], normalised, to the pooled features, float32 [N, features] under autocast too."""
        pooled: Tensor = self.resnet(x).mean(dim=(2, 3), dtype=torch.float32)
        return pooled

    def classify(self, features: Tensor) -> Tensor:
        """Pooled features to logits [N, classes], float32 under autocast too: with bfloat16's 8 bits classes would tie."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def load_state(a: Architecture, state: Mapping[str, Tensor], where: str, called: Callable[[str], str] = str) -> ResNet:
    """A ResNet in eval mode with these parameters (Hugging Face names), as float32. Raises ModelError when they do not
    fit, with what they are `called` where they come from."""
    with torch.device("meta"):  # no memory and no random numbers for what is about to be replaced
        model = ResNet(a)
    needed = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in needed if name.endswith("num_batches_tracked")}
    given = {**counters, **state}  # counters are of no use in eval mode, and old files lack them
    for name, tensor in needed.items():
        if name not in given:
            need = f"every parameter of a ResNet of depths {a.depths}"
            raise ModelError(f"{where}: has no {called(name)}", need=need, do=_WHOLE)
        if given[name].shape != tensor.shape:
            got = f"{where}: {called(name)} has shape {list(given[name].shape)}"
            raise ModelError(got, need=f"{list(tensor.shape)} for a ResNet of depths {a.depths}", do=_WHOLE)
        if given[name].is_floating_point() != tensor.is_floating_point():
            got = f"{where}: {called(name)} is {str(given[name].dtype).removeprefix('torch.')}"
            raise ModelError(got, need="floating point", do="Give weights that are not quantized")
    surplus = sorted(given.keys() - needed.keys())
    if surplus:
        raise ModelError(f"{where}: has {called(surplus[0])}", need=f"only what a ResNet of depths {a.depths} has", do=_WHOLE)
    model.load_state_dict({name: given[name].to(tensor.dtype) for name, tensor in needed.items()}, assign=True)
    return model.eval().requires_grad_(False)


def fold(model: ResNet) -> ResNet:
    """Each batch normalisation folded into its convolution, in place. Rounding moves the logits by 2e-6 of the largest; on a CPU
    without AVX-512 it takes 10 % off ResNet-18's time."""
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.normalization, nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(module.convolution, module.normalization)
            module.normalization = nn.Identity()
    return model.requires_grad_(False)


_WHOLE = "Give the weights of a plain ResNet with its classifier"


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
