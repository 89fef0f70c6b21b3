"""Random changes of a training image, by torchvision, so that a model learns what does not matter: where a thing stands, how
large it is, in what light. The crop is cut from the whole image and resized once, with the artifact's own filter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pipeline.errors import JobError
from pipeline.job.training import Augment
from pipeline.model.preprocessing import Preprocessing
from pipeline.preprocess import resize_and_crop


class Augmentation:
    """uint8 [H, W, 3] of any size → uint8 [3, S, S], by torch's random numbers of the moment.

    With `crop` of (1, 1) the geometry is that of predicting; else a random crop of that share of the area and of an aspect ratio
    from 3/4 to 4/3 (arXiv 1409.4842) is resized. Raises JobError for a shift out of the picture.
    """

    def __init__(self, preprocessing: Preprocessing, wanted: Augment) -> None:
        if wanted.shift >= preprocessing.size:
            got = f"training.augment.shift is {wanted.shift} and the model sees {preprocessing.size} pixels"
            raise JobError(got, need="less than that, or nothing is left to see", do="Lower it")
        self._preprocessing = preprocessing
        steps: list[torch.nn.Module] = []
        self._crops = wanted.crop != (1.0, 1.0)
        if self._crops:
            filter_ = InterpolationMode(preprocessing.resample)
            steps.append(v2.RandomResizedCrop(preprocessing.size, scale=wanted.crop, interpolation=filter_, antialias=True))
        if wanted.shift:
            steps.append(v2.RandomCrop(preprocessing.size, padding=wanted.shift))
        if wanted.flip:
            steps.append(v2.RandomHorizontalFlip())
        if wanted.jitter:
            steps.append(v2.ColorJitter(brightness=wanted.jitter, contrast=wanted.jitter, saturation=wanted.jitter))
        fill = [round(255 * level) for level in preprocessing.mean]
        if wanted.trivial:
            steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=fill))
        if wanted.erase:  # arXiv 1708.04896
            steps.append(v2.RandomErasing(wanted.erase, value=fill))
        self._change = v2.Compose(steps) if steps else torch.nn.Identity()

    def __call__(self, image: np.ndarray) -> Tensor:
        if self._crops:
            pixels = torch.from_numpy(image).permute(2, 0, 1)
        else:
            crop = resize_and_crop(image, self._preprocessing)
            # In one piece, for torchvision's steps take a fifth longer with a view; torch warns of what is not to be written to.
            pixels = torch.from_numpy(np.require(crop, requirements=["C", "W"]))
        changed: Tensor = self._change(pixels)
        return changed.contiguous()
