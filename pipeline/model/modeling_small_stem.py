"""A ResNet with a stem for images of 32 or 64 pixels, for transformers, which has none.

An artifact of such a network holds this very file, and opens with `trust_remote_code=True`. Nothing of ours imports it.
"""

from __future__ import annotations

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


class SmallStemConfig(ResNetConfig):
    model_type = "resnet-small-stem"


class SmallStemResNet(ResNetForImageClassification):
    """transformers' ResNet, its 7 × 7 convolution of stride 2 and its pooling replaced by a 3 × 3 convolution of stride 1."""

    config_class = SmallStemConfig

    def __init__(self, config: SmallStemConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False)
        stem.pooler = nn.Identity()
        self.post_init()
