"""Random changes of training images, so that a model learns what does not matter: where a thing stands, how large it is.

One affine map per image does the crop, the shift and the flip at once, in one pass of bilinear sampling over the uint8 batch.
The price: images shrunk below half would alias, so `scale` starts at 0.5, and nothing is turned or recoloured.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.quantity import Model

Scale = Annotated[float, Field(ge=0.5, le=4)]


class Augment(Model):
    """How far an image may be changed; every image draws its own amounts. (1, 1), 0 and off change nothing."""

    scale: tuple[Scale, Scale] = (1.0, 1.0)
    """Range of the enlargement; (1, 1.5) crops down to two thirds of the edge."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Longest shift in each direction, as a share of the edge; what comes in repeats the border."""
    flip: bool = False
    """Mirror half of the images left to right; wrong for digits, letters and signs."""

    @property
    def idle(self) -> bool:
        return self.scale == (1.0, 1.0) and self.shift == 0 and not self.flip


def augment(pixels: Tensor, wanted: Augment) -> Tensor:
    """uint8 [N, 3, S, S] → the same, changed at random by torch's CPU generator; `pixels` itself when nothing is wanted."""
    if wanted.idle:
        return pixels
    count = len(pixels)
    low, high = wanted.scale
    zoom = 1 / (low + (high - low) * torch.rand(count))  # the share of the edge that is looked at
    shift = (2 * torch.rand(count, 2) - 1) * (2 * wanted.shift)  # the grid runs from -1 to 1
    side = 1 - 2 * (torch.rand(count) < 0.5).float() if wanted.flip else torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * side, zoom, shift
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    images = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return images.round_().to(torch.uint8)  # bilinear weights sum to 1: nothing leaves 0..255
