"""What a model wants to see: the size, the crop, the filter and the normalisation that its weights were trained with.

The artifact carries this and the job cannot contradict it: three "ResNet-18" preprocessings are about (Hugging Face 224/0.875
bicubic, torchvision 256 → 224 bilinear, timm 0.95 bicubic) and the wrong one costs accuracy without an error. Kept apart from the
stage so that whoever reads an artifact needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

#: Part of the fingerprint: raise it when the same image and the same `Preprocessing` give other pixels.
PREPROCESSING_VERSION = 1

MAX_EDGE = 8192  # twice the largest size: a square of it is 200 MB

Resample = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize the shortest edge to `resize_edge`, cut the centre square of `size` pixels, then (x / 255 - mean) / std per channel.

    Raises ValueError for values no image can be prepared with.
    """

    size: int = 224
    """Edge of the square the model sees, pixels."""
    crop_pct: float = 0.875
    """Share of the resized shortest edge that the crop keeps, over 0 up to 1."""
    resample: Resample = "bilinear"
    """Filter of the antialiased resize."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of R, G, B on the scale 0..1 (ImageNet)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of R, G, B on the scale 0..1 (ImageNet)."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ValueError(f"size is {self.size}, required: 1 to 4096 pixels")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, required: over 0, up to 1")
        if self.size / self.crop_pct >= MAX_EDGE + 1:  # which may be infinite, and resize_edge cannot
            resized = f"crop_pct is {self.crop_pct}, so images are resized to {self.size / self.crop_pct:,.0f} pixels"
            raise ValueError(f"{resized}, required: at most {MAX_EDGE:,}, the size over crop_pct")
        if self.resample not in get_args(Resample):
            raise ValueError(f"resample is {self.resample!r}, required: one of {', '.join(get_args(Resample))}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values}, required: three finite numbers, for R, G and B")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, required: numbers over 0, they divide")
        if not 0 <= min(self.mean) <= max(self.mean) <= 1 or max(self.std) > 1:
            raise ValueError(
                f"mean is {self.mean} and std {self.std}, required: on the scale 0 to 1; divide those of 0 to 255 by 255"
            )

    @property
    def resize_edge(self) -> int:
        """Shortest edge before the crop, pixels, rounded down as Hugging Face and timm do: 224/0.875 gives 256."""
        return int(self.size / self.crop_pct)

    def placement(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where the crop lies in an image of so many pixels: width and height that the image is resized to, then the crop's left
        and top. The long edge is rounded down and the corner to the nearest even, as torchvision's Resize and CenterCrop do.
        transformers rounds the corner down: where a half is left, in 18 of 100 photographs, its crop lies a pixel beside."""
        short = min(width, height)
        new_width, new_height = int(self.resize_edge * width / short), int(self.resize_edge * height / short)
        return new_width, new_height, round((new_width - self.size) / 2), round((new_height - self.size) / 2)

    def is_strip(self, width: int, height: int) -> bool:
        """Is most of the image cut away? A strip of 1 × 65,535 pixels would be resized to 13 GB."""
        new_width, new_height, *_ = self.placement(width, height)
        return new_width * new_height > 4 * self.resize_edge**2


Preset = Literal["torchvision", "huggingface", "timm"]
#: How the three train and measure ResNets on ImageNet. A file of weights cannot say which of them it came from.
PRESETS: dict[Preset, Preprocessing] = {
    "torchvision": Preprocessing(),
    "huggingface": Preprocessing(resample="bicubic"),
    "timm": Preprocessing(crop_pct=0.95, resample="bicubic"),
}
