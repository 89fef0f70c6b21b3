"""What every peer gets and leaves: a folder of JPEG files, torchvision's weights, a precision; labels, and when they came."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path, help="a folder of .jpg")
    parser.add_argument("model", type=Path, help="an artifact; weights.pth beside it has torchvision's names")
    parser.add_argument("out", type=Path, help="a folder to be made")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    args.out.mkdir()
    return args


def paths(args: argparse.Namespace) -> list[str]:
    return sorted(map(str, args.photos.glob("*.jpg")))


def told(out: Path, names: list[str], ids: list[int]) -> None:
    """A batch of labels: one appended line with the time and what was found. Called by whichever process has the labels."""
    pairs = ",".join(f"{Path(name).stem}={number}" for name, number in zip(names, ids, strict=True))
    with (out / "labels").open("a") as file:
        file.write(f"{time.time()} {pairs}\n")


def network(model: Path, make: Any) -> Any:
    """A ResNet-18 of torchvision's names, by `make(num_classes=…)`, in eval mode and channels last."""
    import torch

    state = torch.load(model.parent / "weights.pth", weights_only=True)
    built = make(num_classes=len(state["fc.bias"]))
    built.load_state_dict(state)
    return built.eval().to(memory_format=torch.channels_last)


def autocast(precision: str) -> Any:
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def own_ray() -> None:
    """A Ray of this process alone, that asks for no token and tells nobody."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    here = str(Path(__file__).parent)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
