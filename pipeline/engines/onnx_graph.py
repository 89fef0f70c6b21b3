"""A ResNet as an ONNX graph in float32: `pixels` uint8 [N, 3, S, S] → `logits` and `features`, any N.

What runs on CPUs: ONNX Runtime labels with it at float32, OpenVINO at bfloat16, and a quantize job makes int8 of it. Written node
by node, for a ResNet has few kinds of them, and torch's exporter takes 4 s and one more dependency to find that out; this takes
0.4 s. Normalisation stands in the graph, so whoever runs it hands over crops as they come (as fast as numpy outside, within 2 %);
batch norms are folded, for a quantizer wants to see plain convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pipeline.artifact import Artifact, build
from pipeline.engines.onnx_engine import INPUT, OUTPUTS
from pipeline.model.resnet import ConvNorm, fold

OPSET, IR = 20, 10  # of 2023; onnxruntime 1.24, OpenVINO 2025 and the quantizer read both


def to_onnx(artifact: Artifact) -> bytes:
    """The artifact's network, serialised. Raises ModelError when its weights do not fit."""
    model: Any = fold(build(artifact))  # Any: torch's modules do not say what their children are
    seen = artifact.preprocessing
    graph = _Graph()
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) * 255 for values in (seen.mean, seen.std))
    x = graph.node("Cast", INPUT, to=TensorProto.FLOAT)
    x = graph.node("Mul", graph.node("Sub", x, graph.constant(mean)), graph.constant(1 / std))
    x = graph.convolution(x, model.resnet.embedder.embedder)
    if isinstance(model.resnet.embedder.pooler, nn.MaxPool2d):
        x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage in model.resnet.encoder.stages:
        for layer in stage.layers:
            x = graph.residual(x, layer)
    axes = graph.constant(np.array([2, 3], np.int64))
    logits, features = OUTPUTS
    graph.node("ReduceMean", x, axes, out=features, keepdims=0)
    linear = model.classifier[1]
    weights = graph.constant(linear.weight, "classifier.weight"), graph.constant(linear.bias, "classifier.bias")
    graph.node("Gemm", features, *weights, out=logits, transB=1)
    return graph.serialise(seen.size, {logits: linear.out_features, features: linear.in_features})


class _Graph:
    """Nodes and constants in the order of the arithmetic; a value is the name of what a node gives."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], out, **attributes))
        return out

    def constant(self, values: np.ndarray | Tensor, name: str = "") -> str:
        name = name or f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(values if isinstance(values, np.ndarray) else values.numpy())
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def convolution(self, x: str, folded: Any) -> str:
        module = folded.convolution
        shape: dict[str, Any] = {
            "kernel_shape": list(module.kernel_size),
            "strides": list(module.stride),
            "pads": [*module.padding * 2],
        }
        x = self.node("Conv", x, self.constant(module.weight), self.constant(module.bias), **shape)
        return self.node("Relu", x) if folded.relu else x

    def residual(self, x: str, layer: Any) -> str:
        short = self.convolution(x, layer.shortcut) if isinstance(layer.shortcut, ConvNorm) else x
        for convolution in layer.layer:
            x = self.convolution(x, convolution)
        return self.node("Relu", self.node("Add", x, short))

    def serialise(self, size: int, outputs: dict[str, int]) -> bytes:
        given = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["images", 3, size, size])
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["images", n]) for name, n in outputs.items()]
        graph = helper.make_graph(self.nodes, "resnet", [given], results, self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        data: bytes = helper.make_model(graph, opset_imports=opset, ir_version=IR).SerializeToString()
        return data
