"""A ResNet's parameters: by which names they go, torchvision's or Hugging Face's, and what network they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.errors import ModelError
from pipeline.model.huggingface import Architecture

#: A parameter that every ResNet has, by torchvision's name and Hugging Face's. What stands before it is a wrapper's prefix:
#: `module.`, `model.`, `_orig_mod.` and the like.
_ANCHORS = ("layer1.0.conv1.weight", "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight")
_STEM, _HEAD = "resnet.embedder.embedder.convolution.weight", "classifier.1.weight"
_OUTER = {"conv1": "resnet.embedder.embedder.convolution", "bn1": "resnet.embedder.embedder.normalization", "fc": "classifier.1"}
_PARTS = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
_INNER = re.compile(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)")
_OURS = re.compile(
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)"
)
_LAYER = re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.weight")


def to_huggingface(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The ResNet inside a state dict by Hugging Face's names, without a wrapper's prefix. Raises ModelError if there is none."""
    anchors = _anchors(state)
    if not anchors:
        do = "Give the state dict of a torchvision, timm or Hugging Face ResNet"
        raise ModelError(f"{where}: has no {_ANCHORS[0]} among its {len(state)} tensors", need="a ResNet, plain", do=do)
    prefixes = list(dict.fromkeys(prefix for prefix, _ in anchors))
    if len(prefixes) > 1:
        got = f"{where}: holds {len(prefixes)} ResNets, under {', '.join(repr(prefix) for prefix in prefixes[:4])}"
        raise ModelError(got, need="one", do="Save the state dict of the one that is wanted by itself")
    (prefix,) = prefixes
    return {_renamed(name.removeprefix(prefix)): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _anchors(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Prefix and anchor of every ResNet in a state dict."""
    ends = ((name, anchor) for name in state for anchor in _ANCHORS if name == anchor or name.endswith(f".{anchor}"))
    return [(name.removesuffix(anchor), anchor) for name, anchor in ends]


def usual_name(state: Mapping[str, Tensor], name: str) -> str:
    """What the parameter of Hugging Face's `name` is called in a state dict that has a ResNet, or would be if it were there."""
    prefix, anchor = _anchors(state)[0]
    return prefix + (name if anchor == _ANCHORS[1] else _torchvisions(name))


def infer_architecture(state: Mapping[str, Tensor], where: str, called: Callable[[str], str] = str) -> Architecture:
    """The architecture of parameters with Hugging Face's names, from the names and shapes. Strides leave no trace: torchvision's
    are assumed. Raises ModelError, with what they are `called` in the file, when stem, stages or classifier are missing, or when
    that is of one class."""
    places = [tuple(int(number) for number in found.groups()) for name in state if (found := _LAYER.fullmatch(name))]
    last = max(k for _, _, k in places)
    depths = tuple(
        1 + max((j for i, j, _ in places if i == stage), default=0) for stage in range(1 + max(i for i, _, _ in places))
    )
    ends = [f"resnet.encoder.stages.{i}.layers.0.layer.{last}.convolution.weight" for i in range(len(depths))]
    for name in (_STEM, _HEAD, *ends):
        if name not in state:
            do = "Give the weights of a plain ResNet with its classifier"
            raise ModelError(f"{where}: has no {called(name)}", need="a whole ResNet", do=do)
    if len(state[_HEAD]) == 1:
        need = "two or more, for by softmax every image has the only one, with a score of 1"
        do = "Save the weights of its classifier below a row of zeros, which says the same of two classes"
        raise ModelError(f"{where}: {called(_HEAD)} is of one class, as for a sigmoid", need=need, do=do)
    return Architecture(
        layer_type="bottleneck" if last == 2 else "basic",
        depths=depths,
        hidden_sizes=tuple(len(state[name]) for name in ends),
        classes=len(state[_HEAD]),
        embedding_size=len(state[_STEM]),
        stem="small" if state[_STEM].shape[-1] == 3 else "standard",
    )


def _renamed(name: str) -> str:
    head, _, rest = name.partition(".")
    if head in _OUTER:
        return f"{_OUTER[head]}.{rest}"
    found = _INNER.fullmatch(name)
    if found is None:
        return name
    stage, layer, kind, number, shortcut, leaf = found.groups()
    place = f"layer.{int(number) - 1}" if kind else "shortcut"
    return f"resnet.encoder.stages.{int(stage) - 1}.layers.{layer}.{place}.{_PARTS[kind or shortcut]}.{leaf}"


def _torchvisions(name: str) -> str:
    """The inverse of `_renamed`."""
    for theirs, ours in _OUTER.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    found = _OURS.fullmatch(name)
    if found is None:
        return name
    stage, layer, number, part, leaf = found.groups()
    norm = part == "normalization"
    place = f"downsample.{int(norm)}" if number is None else f"{'bn' if norm else 'conv'}{int(number) + 1}"
    return f"layer{int(stage) + 1}.{layer}.{place}.{leaf}"
