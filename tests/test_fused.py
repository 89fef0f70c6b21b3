"""The fused network against the plain one, for every kind of layer; here by separate kernels, on a GPU by cuDNN's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.engines.fused import Fused
from pipeline.engines.scores import Wanted
from pipeline.engines.torch_engine import TorchEngine
from pipeline.model.huggingface import Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet, fold

BASIC, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
NETWORKS = {
    "ResNet-18": Architecture("basic", (2, 2, 2, 2), BASIC, classes=10),
    "ResNet-50": Architecture("bottleneck", (3, 4, 6, 3), WIDE, classes=10),
    "v1 bottleneck": Architecture("bottleneck", (1, 2), (32, 64), classes=4, embedding_size=16, downsample_in_bottleneck=True),
    "small stem": Architecture("basic", (1, 1), (8, 16), classes=4, embedding_size=8, stem="small"),
    "all strided": Architecture("bottleneck", (2, 1), (32, 64), classes=4, embedding_size=8, downsample_in_first_stage=True),
    "odd widths": Architecture("basic", (1, 2), (7, 13), classes=4, embedding_size=5),
}


def network(architecture: Architecture) -> ResNet:
    """Random weights whose batch normalisations do something."""
    torch.manual_seed(0)
    model = ResNet(architecture).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return fold(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_plain_network(name: str) -> None:
    model = network(NETWORKS[name])
    x = torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, found = model.features(x), Fused(model, torch.float32)(x)
    assert found.dtype == torch.float32
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_on_a_gpu_is_near_the_plain_network(name: str, dtype: torch.dtype, bound: float) -> None:
    model = network(NETWORKS[name])
    x = torch.randn(8, 3, 64, 64)
    with torch.inference_mode():
        expected = model.features(x)
        fused = Fused(model.cuda(), dtype)
        found = fused(x.to("cuda", dtype, memory_format=torch.channels_last)).cpu()
    assert float((found - expected).norm() / expected.norm()) < bound
    if name.startswith("ResNet"):
        assert fused.stem.fused, "cuDNN has these"
        assert all(one.fused for layer in fused.layers for one in (*layer.before, layer.last)), "cuDNN has these"


def test_half_precision_is_its_own_copy_and_pools_in_float32() -> None:
    model = network(NETWORKS["small stem"])
    fused = Fused(model, torch.bfloat16)
    with torch.inference_mode():
        found = fused(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert (found.dtype, fused.stem.weight.dtype) == (torch.float32, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_that_is_not_folded_is_a_bug() -> None:
    with pytest.raises(ValueError, match="not folded"):
        Fused(ResNet(NETWORKS["small stem"]).eval(), torch.float32)


def test_memory_that_runs_out_is_not_taken_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    fused = Fused(network(NETWORKS["small stem"]), torch.float32)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused(torch.randn(2, 3, 32, 32))
    assert fused.stem.fused


@pytest.mark.parametrize(
    ("batch_size", "counts"), [(16, [16, 8]), (10, [10, 3]), (64, [32]), (256, [32]), (512, [32]), (3, [3] * 7 + [2])]
)
def test_a_batch_of_an_odd_size_is_padded_and_the_scores_are_the_same(batch_size: int, counts: list[int]) -> None:
    model, seen = network(NETWORKS["small stem"]), []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return Fused(model, torch.float32)(x)

    pixels = np.random.default_rng(0).integers(0, 256, (23, 3, 32, 32), dtype=np.uint8)
    engine = TorchEngine(
        model, Preprocessing(size=32), wanted=Wanted(2), precision="float32", device="cpu", batch_size=batch_size
    )
    expected = engine(pixels)
    engine.features, engine.fused = watched, True  # as on a GPU
    found = engine(pixels)
    assert seen[-len(counts) :] == counts
    assert all(count <= batch_size for count in seen)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
