"""The model card: one page that tells a stranger what a model is, where it came from, how good it is, and where it is not.

It is Hugging Face's kind, front matter and Markdown, and says nothing that artifact.json does not: the same artifact gives the
same bytes, no date among them. No licence is claimed, since that of weights and photographs is not ours to know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from pipeline.artifact import INT8, Artifact
from pipeline.errors import one_line
from pipeline.model.describe import figure, giga, millions, numbers, plain, preprocessing_text

#: Weights by torchvision's name, the only one that a parent has: all others are digests and paths, and a relative path looks
#: like a name on a hub.
LIBRARY_NAME = re.compile(r"ResNet\d+_Weights\.\w+")
_ACCURACIES = ("accuracy", "top1")
#: What Markdown or HTML would take for markup in a class or a glob; a `_` between letters is none.
_MARKUP = re.compile(r"[\\`*<\[~]|(?<![^\W_])_|_(?![^\W_])")
_WIDEST = 300  # characters of one fact: settings of a training are 400 and would take a quarter of the page


def model_card(artifact: Artifact, *, name: str, limits: Sequence[str] = ()) -> bytes:
    """README.md of an artifact, for `save_artifact(…, card=…)`. `limits` are further sentences about what it is not good for."""
    parts = ["---", yaml.safe_dump(_front_matter(artifact), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    parts += _what(artifact, name)
    parts += _use(artifact)
    parts += ["## Data", "", *_facts(artifact.origin.data, "Not recorded."), ""]
    parts += ["## Metrics", "", *_metrics(artifact), ""]
    parts += _lineage(artifact)
    parts += ["## Limits", "", *(f"* {sentence}" for sentence in (*_limits(artifact), *limits))]
    return ("\n".join(parts) + "\n").encode()


def folder_name(uri: str) -> str:
    """Last part of a URI or path: what a model is called when nobody says."""
    return uri.rstrip("/").rpartition("/")[2] or "model"


def _front_matter(artifact: Artifact) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "nightlabel"],
    }
    if any(name in artifact.origin.metrics for name in _ACCURACIES):
        front["metrics"] = ["accuracy"]
    names = [parent for parent in artifact.origin.parents if LIBRARY_NAME.fullmatch(parent)]
    if names:
        front["base_model"] = names[0] if len(names) == 1 else names
    return front


def _what(artifact: Artifact, name: str) -> Iterator[str]:
    known = numbers(artifact)
    size = sum(len(data) for data in artifact.files.values())
    shown = _literal(", ".join(artifact.labels[:10])) + (", …" if len(artifact.labels) > 10 else ".")
    yield f"# {_literal(name)}"
    yield ""
    yield f"A {known['architecture']} that puts images into {known['classes']:,} classes: {shown}"
    yield ""
    yield f"* {millions(known['parameters'])} parameters, {giga(known['macs'])} an image, {size / 1e6:,.1f} MB."
    yield f"* It sees {preprocessing_text(artifact.preprocessing)}."
    yield f"* Digest `{artifact.digest}`."
    yield ""


def _use(artifact: Artifact) -> Iterator[str]:
    trust = ", trust_remote_code=True" if artifact.architecture.stem == "small" else ""
    folder = '"path/to/this/folder"'
    yield "## Use"
    yield ""
    yield "In a job file of nightlabel, `model: {uri: path/to/this/folder}`; or, with transformers:"
    yield ""
    yield "```python"
    yield "from transformers import AutoImageProcessor, AutoModelForImageClassification"
    yield ""
    yield f"processor = AutoImageProcessor.from_pretrained({folder})"
    yield f"model = AutoModelForImageClassification.from_pretrained({folder}{trust})"
    yield "```"
    yield ""


def _metrics(artifact: Artifact) -> Iterator[str]:
    if not artifact.origin.metrics:
        yield "None recorded; a job of `kind: evaluate` measures them."
        return
    yield "| metric | value |"
    yield "|---|---|"
    for name, value in artifact.origin.metrics.items():
        yield f"| {_cell(name)} | {_cell(figure(value))} |"


def _lineage(artifact: Artifact) -> Iterator[str]:
    parents = artifact.origin.parents
    yield "## Lineage"
    yield ""
    yield f"Made from {', '.join(f'`{parent}`' for parent in parents)}." if parents else "No parent is recorded."
    if artifact.origin.command:
        yield ""
        yield from ("```sh", artifact.origin.command, "```")
    yield ""


def _limits(artifact: Artifact) -> Iterator[str]:
    origin = artifact.origin
    if not origin.metrics:
        yield "How well it does is not recorded: measure it on images of your own before you rely on it."
    if "epoch" in origin.metrics and "accuracy" in origin.metrics:
        yield "Accuracy was measured on validation images that also chose the epoch, so it is a little too good."
        if (trained_on := origin.data.get("validation_also_trained_on", 0)) > 0:
            yield f"{trained_on:,} of the validation images were trained on, so it may be much too good."
    elif "epoch" in origin.metrics:
        yield "How often it is right is not known: it was judged by its agreement with its teacher, which may be wrong."
    yield "Images unlike those it was trained on get a label too, often with a high score."
    yield "The preprocessing is part of the model: other sizes, crops or filters cost accuracy without an error."
    yield f'Every image gets one of its {len(artifact.labels):,} classes; none of them means "something else".'
    if INT8 in artifact.files:
        yield f"`{INT8}` is what precision int8 runs; it gives other scores than the weights in float32."


def _facts(facts: Any, nothing: str) -> Iterator[str]:
    if not facts:
        yield nothing
    for name, value in facts.items():
        text = plain(value)
        yield f"* {name}: {_literal(text if len(text) <= _WIDEST else text[: _WIDEST - 1] + '…')}"


def _literal(text: str) -> str:
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
