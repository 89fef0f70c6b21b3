"""What a model is, in numbers: layers, parameters, multiplications, size, and what its folder says of where it came from.

All of it follows from the architecture and the size of the image, so `nightlabel model show` needs no torch and no weights and
takes 0.4 s. A multiply-accumulate (MAC) is counted for convolutions and the classifier alone, as is usual; normalisation,
ReLU and pooling would add 0.5 %. tests/test_show.py holds both counts against torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifact import FILES, INT8, RECORD, Artifact
from pipeline.model.huggingface import BOTTLENECK, RESNET_SIZES, RESNETS, Architecture
from pipeline.model.preprocessing import Preprocessing
from pipeline.spec import S3
from pipeline.storage import head_if_there, join, open_store

_WIDTH = 100  # columns of a line for a screen


@dataclass(frozen=True, slots=True)
class Layer:
    """A row of the table: what it does, what comes out (channels, then the edge of the square in pixels), what it costs."""

    name: str
    what: str
    channels: int
    edge: int
    parameters: int
    macs: int


def layers(architecture: Architecture, size: int) -> tuple[Layer, ...]:
    """The network from top to bottom for images of `size` pixels; a stage is one row."""
    rows = list(_stem_rows(architecture, size))
    for number in range(len(architecture.depths)):
        rows.append(_stage(architecture, number, rows[-1].channels, rows[-1].edge))
    features, classes = architecture.features, architecture.classes
    rows.append(Layer("average pool", f"{rows[-1].edge} × {rows[-1].edge}", features, 1, 0, 0))
    rows.append(Layer("fc", f"{features:,} to {classes:,}", classes, 1, (features + 1) * classes, features * classes))
    return tuple(rows)


def architecture_name(architecture: Architecture) -> str:
    """`ResNet-18`, with what sets it apart; `ResNet of 8 layers` when it is none of the known."""
    shape = architecture.layer_type, architecture.depths
    known = next((number for number, known_shape in RESNETS.items() if known_shape == shape), None)
    usual = architecture.embedding_size == 64 and architecture.hidden_sizes == RESNET_SIZES[architecture.layer_type]
    kernels = 2 if architecture.layer_type == "basic" else 3
    name = f"ResNet-{known}" if known and usual else f"ResNet of {kernels * sum(architecture.depths) + 2} layers"
    small = ", small-image stem" if architecture.stem == "small" else ""
    return name + small + (", stride in the 1 × 1 (v1)" if architecture.downsample_in_bottleneck else "")


def preprocessing_text(preprocessing: Preprocessing) -> str:
    """One line: what is done to an image before the model sees it."""
    size, edge = preprocessing.size, preprocessing.resize_edge
    return f"{size} × {size} pixels: shortest edge to {edge}, {preprocessing.resample}, then the centre square"


def numbers(artifact: Artifact) -> dict[str, Any]:
    """Name of the architecture, classes, parameters and MACs of one image."""
    table = layers(artifact.architecture, artifact.preprocessing.size)
    return {
        "architecture": architecture_name(artifact.architecture),
        "classes": len(artifact.labels),
        "parameters": sum(layer.parameters for layer in table),
        "macs": sum(layer.macs for layer in table),
    }


def file_sizes(uri: str, s3: S3 | None = None) -> dict[str, int]:
    """Bytes of the artifact's files in the folder `uri`."""
    store = open_store(uri, s3)
    found = {name: head_if_there(store, join(uri, name)) for name in FILES}
    return {name: item.size for name, item in found.items() if item}


def facts(artifact: Artifact, uri: str, sizes: dict[str, int]) -> dict[str, Any]:
    """What `nightlabel model show --json` prints."""
    return {
        "uri": uri,
        "digest": artifact.digest,
        **numbers(artifact),
        "labels": list(artifact.labels),
        "files": sizes,
        "int8": INT8 in sizes,
        "preprocessing": asdict(artifact.preprocessing),
        **asdict(artifact.origin),
        "layers": [asdict(layer) for layer in layers(artifact.architecture, artifact.preprocessing.size)],
    }


def lines(artifact: Artifact, uri: str, sizes: dict[str, int]) -> Iterator[str]:
    """The same for a screen."""
    known, origin = numbers(artifact), artifact.origin
    yield f"{uri}: {known['architecture']}, {known['classes']:,} classes"
    yield f"digest  {artifact.digest}"
    yield from _folded("labels  ", f"{', '.join(artifact.labels[:8])}{', …' if len(artifact.labels) > 8 else ''}")
    counts = f"{millions(known['parameters'])} parameters, {giga(known['macs'])} an image"
    yield f"size    {counts}, {sum(sizes.values()) / 1e6:,.1f} MB"
    yield "files   " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items() if size >= 1e5)
    yield f"sees    {preprocessing_text(artifact.preprocessing)}"
    yield f"        mean {_triple(artifact.preprocessing.mean)}, std {_triple(artifact.preprocessing.std)}"
    yield from _folded("from    ", ", ".join(origin.parents) or "a random start, or not recorded")
    yield from _fact_lines("data    ", {name: plain(value) for name, value in origin.data.items()}, nothing="not recorded")
    yield from _fact_lines("metrics ", {name: figure(value) for name, value in origin.metrics.items()}, nothing="none recorded")
    yield f"command {origin.command or 'not recorded'}"
    yield ""
    yield from _table(layers(artifact.architecture, artifact.preprocessing.size))


def millions(number: int) -> str:
    """`11.69 M`; small numbers as they are."""
    return f"{number / 1e6:,.2f} M" if number >= 10_000 else f"{number:,}"


def giga(macs: int) -> str:
    """`1.81 GMACs`, or `3.2 MMACs` for what would be 0.00."""
    return f"{macs / 1e9:,.2f} GMACs" if macs >= 10**8 else f"{macs / 1e6:,.1f} MMACs"


def figure(value: float) -> str:
    """A metric: four digits of a share, a count whole."""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 10_000 else f"{value:,.0f}"


def plain(value: Any) -> str:
    """A value of artifact.json as a reader wants it: no brackets, no quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, dict) for row in value):
        return f"{len(value):,} in {RECORD}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _stem_rows(architecture: Architecture, size: int) -> tuple[Layer, ...]:
    channels, small = architecture.embedding_size, architecture.stem == "small"
    kernel, stride = (3, 1) if small else (7, 2)
    edge = _after(size, stride)
    parameters, macs = _convolution(3, channels, kernel, edge)
    first = Layer("conv1", f"{kernel} × {kernel}, stride {stride}", channels, edge, parameters, macs)
    return (first,) if small else (first, Layer("maxpool", "3 × 3, stride 2", channels, _after(edge, 2), 0, 0))


def _stage(architecture: Architecture, number: int, inputs: int, edge: int) -> Layer:
    depth, outputs = architecture.depths[number], architecture.hidden_sizes[number]
    stride = architecture.stride(number)
    blocks = [_block(architecture, (inputs, outputs), edge, stride)]
    after = _after(edge, stride)
    blocks += [_block(architecture, (outputs, outputs), after, 1)] * (depth - 1)
    what = f"{depth} {architecture.layer_type} {'block' if depth == 1 else 'blocks'}" + (
        f", stride {stride}" if stride > 1 else ""
    )
    return Layer(f"stage {number + 1}", what, outputs, after, sum(cost[0] for cost in blocks), sum(cost[1] for cost in blocks))


def _block(architecture: Architecture, channels: tuple[int, int], edge: int, stride: int) -> tuple[int, int]:
    """(parameters, MACs) of one block with its shortcut."""
    inputs, outputs = channels
    after = _after(edge, stride)
    if architecture.layer_type == "basic":
        costs = [_convolution(inputs, outputs, 3, after), _convolution(outputs, outputs, 3, after)]
    else:
        narrow = outputs // BOTTLENECK
        first = after if architecture.downsample_in_bottleneck else edge
        costs = [
            _convolution(inputs, narrow, 1, first),
            _convolution(narrow, narrow, 3, after),
            _convolution(narrow, outputs, 1, after),
        ]
    if inputs != outputs or stride != 1:
        costs.append(_convolution(inputs, outputs, 1, after))
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


def _convolution(inputs: int, outputs: int, kernel: int, edge: int) -> tuple[int, int]:
    """(parameters, MACs) of a convolution without bias and the normalisation after it, with weight and bias."""
    kernels = inputs * outputs * kernel * kernel
    return kernels + 2 * outputs, kernels * edge * edge


def _after(edge: int, stride: int) -> int:
    """Edge after an odd kernel that is padded by half of itself."""
    return (edge - 1) // stride + 1


def _table(table: tuple[Layer, ...]) -> Iterator[str]:
    yield f"{'layer':<13} {'what':<28} {'output':>17} {'parameters':>11} {'MACs':>13}"
    for layer in table:
        output = f"{layer.channels:,} × {layer.edge} × {layer.edge}"
        costs = f"{layer.parameters:>11,} {layer.macs:>13,}" if layer.parameters else f"{'-':>11} {'-':>13}"
        yield f"{layer.name:<13} {layer.what:<28} {output:>17} {costs}"
    yield f"{'all':<13} {'':<28} {'':>17} {sum(r.parameters for r in table):>11,} {sum(r.macs for r in table):>13,}"


def _fact_lines(head: str, facts: dict[str, str], *, nothing: str) -> Iterator[str]:
    """A fact a line, their values one below the other."""
    if not facts:
        yield head + nothing
    widest = max(map(len, facts), default=0)
    for name, text in facts.items():
        yield from _folded(f"{head}{name:<{widest}}  ", text)
        head = " " * len(head)


def _folded(head: str, text: str) -> Iterator[str]:
    """Broken behind commas, and indented as far as it begins, where it would be wider than _WIDTH; a longer word stays whole."""
    first, *others = text.split(", ")
    line = head + first
    for piece in others:
        if len(f"{line}, {piece},") <= _WIDTH:
            line = f"{line}, {piece}"
        else:
            yield f"{line},"
            line = " " * len(head) + piece
    yield line


def _triple(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
