"""An artifact's network as an ONNX graph in float32: `pixels` uint8 [N, 3, S, S] → `logits` and `features`, any N.

Normalisation stands in the graph, so whoever runs it hands over crops as they come and needs nothing of the artifact; as fast as
numpy outside, within 2 % (LOG.md, 2026-11-25). Batch norms are folded first, for a quantizer wants to see plain convolutions. The
price: torch's exporter and onnxscript take 4 s the first time, so this belongs to preparation and not to the way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.artifact import Artifact, build
from pipeline.errors import ModelError
from pipeline.onnx_engine import INPUT, OUTPUTS, OnnxEngine
from pipeline.preprocessing import Preprocessing
from pipeline.resnet import ResNet, fold
from pipeline.scores import Wanted

OPSET = 20
_TOLERANCE = 1e-3  # of probabilities; float32 of two libraries differs by 1e-6, float16 rounds by 2e-4


class Whole(nn.Module):
    """From crops to (logits, features), the normalisation included."""

    mean: Tensor
    scale: Tensor

    def __init__(self, model: ResNet, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("mean", mean * 255)
        self.register_buffer("scale", 1 / (std * 255))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features((pixels.float() - self.mean) * self.scale)
        return self.model.classifier(features), features


def to_onnx(artifact: Artifact) -> bytes:
    """The graph, checked against torch on random pixels. Raises ModelError when its scores are not finite; RuntimeError when the
    two differ, which is a bug."""
    whole = Whole(fold(build(artifact)), artifact.preprocessing).eval()
    size = artifact.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    program = torch.onnx.export(
        whole,
        (torch.from_numpy(pixels),),
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: {0: torch.export.Dim("images")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo there is one
    model: bytes = program.model_proto.SerializeToString()
    _check(model, whole, pixels)
    return model


def _check(model: bytes, whole: Whole, pixels: np.ndarray) -> None:
    scores = OnnxEngine(model, wanted=Wanted(probabilities=True), batch_size=1)(pixels, np.arange(len(pixels)))
    if not scores.finite.all():
        raise ModelError("the model's scores of random pixels are not finite numbers", do="Train or import it again")
    with torch.inference_mode():
        want = whole(torch.from_numpy(pixels))[0].softmax(dim=1).numpy()
    assert scores.probabilities is not None  # wanted
    off = float(np.abs(scores.probabilities - want).max())
    if off > _TOLERANCE:
        raise RuntimeError(f"the exported graph differs from torch by {off:.2g} in its probabilities")
