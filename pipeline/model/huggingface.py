"""The two JSON files of a Hugging Face ResNet folder, in our words and back.

`config.json` says the architecture and the labels, `preprocessor_config.json` what the model wants to see. What our ResNet or
our resize cannot do as transformers does it is refused here, with a sentence: a model that runs slightly wrong is worse than one
that does not run. Needs no torch and no transformers, so `plan` can read a model in milliseconds. Defaults are those of
transformers' ResNetConfig and ConvNextImageProcessor (version 5), which leaves out of the files what equals them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ModelError
from pipeline.model.preprocessing import Preprocessing, Resample

Stem = Literal["standard", "small"]
_MODEL_TYPES: dict[str, Stem] = {"resnet": "standard", "resnet-small-stem": "small"}
_SHAPE: dict[str, Any] = {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "embedding_size": 64}
#: The module that teaches transformers the small stem; it stands in the folder of such a model, under this name.
MODELING = "modeling_small_stem.py"
_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_PROCESSORS = ("ConvNextImageProcessor", "ConvNextImageProcessorFast", "ConvNextImageProcessorPil", "ConvNextFeatureExtractor")
#: From this edge on ConvNextImageProcessor warps the image to a square instead of cropping.
WARPS_FROM = 384
_SMALL_STEM = {
    "auto_map": {
        "AutoConfig": "modeling_small_stem.SmallStemConfig",
        "AutoModelForImageClassification": "modeling_small_stem.SmallStemResNet",
    }
}
_IMPORT = "Take the folder of a ResNetForImageClassification, or import its weights with a preprocessing of your own"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A residual network: `depths[i]` layers of `hidden_sizes[i]` channels in stage i. ResNet-18 is basic, (2, 2, 2, 2)."""

    layer_type: str
    depths: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    classes: int
    embedding_size: int = 64
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    stem: Stem = "standard"
    """standard: 7 × 7 of stride 2 and pooling; small: 3 × 3 of stride 1, for 32 or 64 pixels, which transformers lacks."""

    @property
    def features(self) -> int:
        """Length of the embedding: what the classifier sees."""
        return self.hidden_sizes[-1]

    def stride(self, stage: int) -> int:
        """Of the first layer of a stage; all others have 1."""
        return 2 if stage > 0 or self.downsample_in_first_stage else 1


#: The family of arXiv 1512.03385: by the number of layers the kind of block and the depths; by the kind the hidden sizes.
RESNETS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
BOTTLENECK = 4  # how many times narrower a bottleneck is than its output
RESNET_SIZES = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}


def resnet(layers: int, classes: int, *, stem: Stem = "standard") -> Architecture:
    """The member of the family with so many layers."""
    kind, depths = RESNETS[layers]
    return Architecture(kind, depths, RESNET_SIZES[kind], classes, stem=stem)


def read_config(data: bytes, where: str) -> tuple[Architecture, tuple[str, ...]]:
    """`config.json` as (architecture, labels in the order of their ids). Raises ModelError."""
    config = _json_object(data, where)
    model_type = _field({"model_type": None, **config}, where, "model_type", tuple(_MODEL_TYPES))
    for field, allowed in {"hidden_act": ("relu",), "num_channels": (3,)}.items():
        _field(config, where, field, allowed)
    labels = _labels(config, where)
    given = {**_SHAPE, **config}
    depths, hidden_sizes = (_sizes(given[name]) for name in ("depths", "hidden_sizes"))
    if len(depths) != len(hidden_sizes) or not depths or not _is_size(given["embedding_size"]):
        got = f"{where}: {', '.join(f'{name} {given[name]}' for name in _SHAPE)} do not describe a network"
        need = "a list of depths, one of as many hidden_sizes, and a size, whole numbers over 0"
        raise ModelError(got, need=need, do="Restore the file")
    architecture = Architecture(
        layer_type=_field(config, where, "layer_type", ("bottleneck", "basic")),
        depths=depths,
        hidden_sizes=hidden_sizes,
        classes=len(labels),
        embedding_size=given["embedding_size"],
        downsample_in_first_stage=bool(config.get("downsample_in_first_stage", False)),
        downsample_in_bottleneck=bool(config.get("downsample_in_bottleneck", False)),
        stem=_MODEL_TYPES[model_type],
    )
    return architecture, labels


def write_config(architecture: Architecture, labels: tuple[str, ...]) -> bytes:
    """The inverse of `read_config`."""
    small = architecture.stem == "small"
    return _json_bytes(
        {
            "architectures": ["SmallStemResNet" if small else "ResNetForImageClassification"],
            **(_SMALL_STEM if small else {}),
            "model_type": next(name for name, stem in _MODEL_TYPES.items() if stem == architecture.stem),
            "layer_type": architecture.layer_type,
            "depths": list(architecture.depths),
            "hidden_sizes": list(architecture.hidden_sizes),
            "embedding_size": architecture.embedding_size,
            "downsample_in_first_stage": architecture.downsample_in_first_stage,
            "downsample_in_bottleneck": architecture.downsample_in_bottleneck,
            "hidden_act": "relu",
            "num_channels": 3,
            "dtype": "float32",
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    )


def modeling_code() -> bytes:
    """The content of MODELING."""
    return (Path(__file__).parent / MODELING).read_bytes()


def read_preprocessor(data: bytes, where: str) -> Preprocessing:
    """`preprocessor_config.json` as `Preprocessing`. Raises ModelError for what we would not do as transformers does."""
    config = _json_object(data, where)
    kind = config.get("image_processor_type", config.get("feature_extractor_type"))
    _field({"image_processor_type": kind}, where, "image_processor_type", _PROCESSORS)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        _field(config, where, step, (True,))
    for step in ("do_center_crop", "do_pad"):
        _field(config, where, step, (None, False))
    _field(config, where, "rescale_factor", (1 / 255,))
    resample = _RESAMPLE[_field(config, where, "resample", (3, 2))]
    size = config.get("size", WARPS_FROM)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size  # folders of 2022 have a bare number
    share = config.get("crop_pct")
    if edge is None or not _is_size(edge):
        raise ModelError(f"{where}: the shortest edge is {edge!r}", need="a whole number over 0", do=_IMPORT)
    try:
        preprocessing = Preprocessing(
            size=edge,
            crop_pct=224 / 256 if share is None else float(share),
            resample=resample,
            mean=_triple(config.get("image_mean", (0.5, 0.5, 0.5))),
            std=_triple(config.get("image_std", (0.5, 0.5, 0.5))),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(f"{where}: {error}", do=_IMPORT) from None
    _refuse_warp(preprocessing, where)
    return preprocessing


def write_preprocessor(preprocessing: Preprocessing, where: str) -> bytes:
    """The inverse of `read_preprocessor`. Raises ModelError for a size at which transformers would warp."""
    _refuse_warp(preprocessing, where)
    return _json_bytes(
        {
            "image_processor_type": "ConvNextImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": preprocessing.size},
            "crop_pct": preprocessing.crop_pct,
            "resample": next(number for number, name in _RESAMPLE.items() if name == preprocessing.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocessing.mean),
            "image_std": list(preprocessing.std),
        }
    )


def _labels(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = config.get("id2label")
    if given is None:  # transformers leaves out what it would make up
        count = config.get("num_labels", 2)
        if not _is_size(count):
            raise ModelError(f"{where}: num_labels is {count!r}", need="a whole number over 0", do="Restore the file")
        return tuple(f"LABEL_{i}" for i in range(count))
    labels = {str(i): label for i, label in given.items()} if isinstance(given, dict) else {}
    ids = [str(i) for i in range(len(labels))]
    if not labels or set(labels) != set(ids) or not all(isinstance(label, str) for label in labels.values()):
        got = f"{where}: id2label has {len(labels)} entries that are not 0 to {len(labels) - 1} with a name each"
        raise ModelError(got, need="every class id once, from 0 on", do="Complete id2label")
    return tuple(labels[i] for i in ids)


def _sizes(values: Any) -> tuple[int, ...]:
    """A list of sizes, or none where it is no such list."""
    return tuple(values) if isinstance(values, list) and all(map(_is_size, values)) else ()


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _field(config: Mapping[str, Any], where: str, field: str, allowed: tuple[Any, ...]) -> Any:
    """The field, or the first of the allowed values, which is transformers' default."""
    got = config.get(field, allowed[0])
    if got not in allowed:
        raise ModelError(f"{where}: {field} is {got!r}", need=" or ".join(map(repr, allowed)), do=_IMPORT)
    return got


def _refuse_warp(preprocessing: Preprocessing, where: str) -> None:
    if preprocessing.size >= WARPS_FROM:
        got = f"{where}: size is {preprocessing.size} pixels, at which Hugging Face's processor warps instead of cropping"
        raise ModelError(got, need=f"below {WARPS_FROM}", do="Take a smaller size")


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3))
    return red, green, blue


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{where}: is not a JSON object", do="Restore the file from where the model came")
    return value


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
