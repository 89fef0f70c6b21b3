"""The `config.json` of a folder as timm writes and publishes them: which network it is, what that wants to see, its labels."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.preprocessing import Preprocessing

_PLAIN = re.compile(r"(tv_)?resnet(18|34|50|101|152)")
_ARGS = {"in_chans": 3, "global_pool": "avg"}
_DO = "Import its weights file with a preprocessing of your own, if it is a plain ResNet after all"


def read_timm(data: bytes, where: str) -> tuple[tuple[str, ...] | None, Preprocessing] | None:
    """(labels, None where timm says none; the preprocessing), or None for a config that is not timm's. Raises ModelError for a
    network that is no plain ResNet, which its weights would not show, and for what we would not prepare as timm does."""
    try:
        config = json.loads(data)
    except ValueError:
        return None
    if not isinstance(config, dict) or not {"architecture", "pretrained_cfg"} <= config.keys():
        return None
    name, seen = config["architecture"], config["pretrained_cfg"]
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ModelError(f"{where}: architecture is {name!r}", need="resnet18, 34, 50, 101 or 152, plain", do=_DO)
    for arg, value in [("global_pool", config.get("global_pool", "avg")), *(config.get("model_args") or {}).items()]:
        if arg != "num_classes" and value != _ARGS.get(arg):
            raise ModelError(f"{where}: {arg} is {value!r}", need="a plain ResNet", do=_DO)
    return _labels(config, where), _preprocessing(seen, where)


def _labels(config: dict[str, Any], where: str) -> tuple[str, ...] | None:
    names = config.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{where}: label_names is {names!r}", need="a list of names", do="Mend it")
    return tuple(names)


def _preprocessing(seen: Any, where: str) -> Preprocessing:
    try:
        channels, height, width = seen["input_size"]
        if (channels, height, seen.get("crop_mode", "center")) != (3, width, "center"):
            raise ValueError(
                f"input_size is {seen['input_size']}, crop_mode {seen.get('crop_mode')}, required: a centre square of RGB"
            )
        return Preprocessing(height, seen["crop_pct"], seen["interpolation"], tuple(seen["mean"]), tuple(seen["std"]))
    except (KeyError, TypeError, ValueError) as error:
        need = "input_size, crop_pct, interpolation, mean and std, as timm writes them"
        raise ModelError(
            f"{where}: pretrained_cfg: {error}", need=need, do="Mend it, or import the weights file alone"
        ) from error
