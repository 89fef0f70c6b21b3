"""Weights from elsewhere → artifact: torchvision's by name, state dicts in files, folders of Hugging Face's and of timm's.

The architecture is read off the names and shapes of the parameters; what is not a plain ResNet by these is refused. Strides,
pooling and blur leave no trace in them: those of a plain one are assumed, and whoever imports is told. Pickles are read with
`weights_only`, which runs no code. What a file cannot say, labels and preprocessing, is taken to be ImageNet's and torchvision's,
and can be given.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.artifact import CONFIG, PREPROCESSOR, WEIGHTS, Artifact, Origin, check_fetched, make_artifact, save_artifact
from pipeline.errors import InputMissing, ModelError, Temporary, first_line
from pipeline.model.huggingface import Architecture, read_config, read_preprocessor
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import load_state
from pipeline.prepare.card import LIBRARY_NAME, folder_name, model_card
from pipeline.prepare.parameters import infer_architecture, to_huggingface, usual_name
from pipeline.prepare.timm_config import read_timm
from pipeline.storage import join, open_store

WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_NESTS = ("state_dict", "model_state_dict", "model")  # Lightning, many training scripts, torchvision's references


@dataclass(frozen=True)
class Source:
    """Parameters, and what came with them."""

    state: Mapping[str, Tensor]
    architecture: Architecture | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def import_model(
    source: str,
    out_uri: str,
    *,
    labels: tuple[str, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    command: str = "",
) -> Artifact:
    """Write `source` as an artifact to `out_uri`: torchvision's name of weights (`ResNet18_Weights.IMAGENET1K_V1`), a file with a
    state dict (.safetensors, .pth, .pt, .bin, .ckpt), or a folder of transformers or timm, as the Hugging Face Hub has them.

    `labels` and `preprocessing` replace what the source says. A state dict says nothing: 1,000 classes get ImageNet's labels,
    others class_0 and so on; the crop is torchvision's, 256 → 224 bilinear (preprocessing.PRESETS has two more).
    Raises ModelError, and Temporary when a download fails.
    """
    if LIBRARY_NAME.fullmatch(source):
        found = _torchvision(source)
    elif source.endswith(WEIGHTS_FILES):
        found = Source(_parameters(_fetch(source), source))
    else:
        found = _folder(source, preprocessing)
    state, called = to_huggingface(found.state, source), partial(usual_name, found.state)
    wrong = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        got = f"{source}: {called(wrong[0])} holds nan or infinity"
        raise ModelError(got, need="finite numbers", do="Take an earlier checkpoint of the training")
    seen = infer_architecture(state, source, called)
    architecture = replace(found.architecture, classes=seen.classes) if found.architecture else seen
    load_state(architecture, state, source, called)  # what is wrong is said in the file's own words
    artifact = make_artifact(
        architecture,
        state,
        labels=labels or found.labels or default_labels(seen.classes),
        preprocessing=preprocessing or found.preprocessing or Preprocessing(),
        origin=Origin(parents=(source,), command=command),
    )
    return save_artifact(artifact, out_uri, card=model_card(artifact, name=folder_name(out_uri)))


def default_labels(classes: int) -> tuple[str, ...]:
    """ImageNet's names for 1,000 classes, class_0 and so on for any other number."""
    if classes != 1000:
        return tuple(f"class_{i}" for i in range(classes))
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def crop_share(size: int, edge: int) -> float:
    """The crop_pct with which `Preprocessing.resize_edge` is `edge`: size / edge, or the number below it where int() rounds down
    what binary fractions miss by 1e-16, as for 17 of 25."""
    share = size / edge
    return share if int(size / share) == edge else math.nextafter(share, 0)


def _torchvision(name: str) -> Source:
    from torchvision.models import get_weight

    try:
        weights = get_weight(name)
    except (ValueError, AttributeError, KeyError):
        do = "Take one such as ResNet18_Weights.IMAGENET1K_V1"
        raise ModelError(f"{name}: torchvision has no such weights", do=do) from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, HTTPException, RuntimeError) as error:
        do = "Try again, or fetch the file elsewhere and import it by its path"
        raise Temporary(f"{name}: the download failed ({error})", do=do) from error
    crop = weights.transforms()
    size, edge = int(crop.crop_size[0]), int(crop.resize_size[0])
    wanted = Preprocessing(size, crop_share(size, edge), crop.interpolation.value, tuple(crop.mean), tuple(crop.std))
    return Source(state, labels=tuple(weights.meta["categories"]), preprocessing=wanted)


def _folder(uri: str, preprocessing: Preprocessing | None) -> Source:
    config, where = _fetch(join(uri, CONFIG)), join(uri, CONFIG)
    architecture: Architecture | None = None
    if (timm := read_timm(config, where)) is not None:
        labels, preprocessing = timm[0], preprocessing or timm[1]
    else:
        architecture, labels = read_config(config, where)
    if preprocessing is None:
        where, do = join(uri, PREPROCESSOR), "Restore it, or say what the model was trained to see with --preprocessing"
        preprocessing = read_preprocessor(_fetch(where, do), where)
    try:
        place = join(uri, WEIGHTS)
        data = open_store(uri).read(place)
    except InputMissing:
        place = join(uri, "pytorch_model.bin")
        data = _fetch(place)
    return Source(_parameters(data, place), architecture, labels, preprocessing)


_GIVE = (
    f"Give a file ({', '.join(WEIGHTS_FILES)}), a Hugging Face folder, which hf download NAME --local-dir FOLDER makes, or a "
    "name such as ResNet18_Weights.IMAGENET1K_V1"
)


def _fetch(uri: str, do: str = _GIVE) -> bytes:
    try:
        return open_store(uri).read(uri)
    except InputMissing as error:
        raise ModelError(f"{uri}: not found", do=do) from error


def _parameters(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a file, of the innermost state dict when it is nested."""
    check_fetched(data, where)
    try:
        if where.endswith(".safetensors"):
            return load(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks users to report odd pickles to it; ours are told in a sentence
            found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        need = "a pickle of nothing but tensors, since any other can run code"
        raise ModelError(f"{where}: {_first(error)}", need=need, do="Save model.state_dict() alone") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{where}: cannot be read ({_first(error)})", do="Fetch or export the file again") from error
    except Exception as error:  # a damaged pickle trips the unpickler up in any way: KeyError, TypeError, AssertionError
        raise ModelError(f"{where}: cannot be read ({type(error).__name__})", do="Fetch or export the file again") from error
    while isinstance(found, Mapping) and (nest := next((n for n in _NESTS if isinstance(found.get(n), Mapping)), None)):
        found = found[nest]
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _first(error: Exception) -> str:
    return first_line(error).split(". ")[0].rstrip(".")
