"""The part of the command line that is about models: bring one in, look at one. Prints, like `cli`, which catches and exits."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import AsJson
from pipeline.commands.printing import print_json, put
from pipeline.errors import JobError, ModelError
from pipeline.model.preprocessing import PRESETS, Preprocessing, Preset

if TYPE_CHECKING:
    from pipeline.artifact import Artifact

prepare = typer.Typer(no_args_is_help=True, help="Make and import models.")
model = typer.Typer(no_args_is_help=True, help="Look at models.")

Labels = Annotated[
    Path | None,
    typer.Option(
        help="Text file with one label a line, or a JSON list. Absent: those of the source; a file of weights has none."
    ),
]
_CHOICE = f"{', '.join(list(PRESETS)[:-1])} or {list(PRESETS)[-1]}"


@model.command()
def show(
    folder: Annotated[str, typer.Argument(help="Folder of the artifact; local or s3://.")],
    as_json: AsJson = False,
) -> None:
    """Print architecture, classes, parameters, GMACs, size, preprocessing, lineage, metrics and the layers of an artifact."""
    from pipeline.artifact import load_artifact
    from pipeline.model.describe import facts, file_sizes, lines

    artifact, sizes = load_artifact(folder, weights=False), file_sizes(folder)
    if as_json:
        print_json(facts(artifact, folder, sizes))
        return
    for line in lines(artifact, folder, sizes):
        put(line)


@prepare.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(help="Hugging Face or timm folder, weights file (.pth, .safetensors), or torchvision weights name."),
    ],
    out: Annotated[str, typer.Argument(help="Folder of the new artifact; local or s3://.")],
    *,
    labels: Labels = None,
    preprocessing: Annotated[
        Preset | None,
        typer.Option(
            help="What the weights were trained to see: torchvision 256 → 224 bilinear, huggingface 224/0.875 bicubic, timm "
            "224/0.95 bicubic. Absent: what the source says, and torchvision's for a file, which says nothing."
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Another size than 224, in pixels, with --preprocessing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a ResNet as an artifact: one folder with weights, preprocessing and labels, named by its digest."""
    from pipeline.model.describe import architecture_name, millions, numbers, preprocessing_text
    from pipeline.prepare.importer import WEIGHTS_FILES, import_model

    wanted = _preprocessing(preprocessing, size)
    _check_source(source, WEIGHTS_FILES)
    words = ["nightlabel", "prepare", "import", source, out]
    for name, value in (("labels", labels), ("preprocessing", preprocessing), ("size", size)):
        words += [f"--{name}", str(value)] if value is not None else []
    names = tuple(_labels(labels)) if labels else None
    artifact = import_model(source, out, labels=names, preprocessing=wanted, command=shlex.join(words))
    if as_json:
        print_json({"uri": out, "digest": artifact.digest, "classes": len(artifact.labels)})
        return
    count = millions(numbers(artifact)["parameters"])
    put(f"{out}: {architecture_name(artifact.architecture)}, {len(artifact.labels):,} classes, {count} parameters")
    put(f"digest  {artifact.digest}")
    put(f"sees    {preprocessing_text(artifact.preprocessing)}{_known(artifact.preprocessing)}")
    put(f"        not what it was trained with? Import into another folder with --preprocessing {_CHOICE}")
    for line in _assumed(artifact, named=labels is not None) if source.endswith(WEIGHTS_FILES) else ():
        put(line)
    put(f"next    nightlabel model show {shlex.quote(out)}")


def _check_source(source: str, weights: tuple[str, ...]) -> None:
    """Raises ModelError for a file that is none of `weights`, which would be looked into as if it were a folder."""
    if not source.endswith(weights) and Path(source).is_file():
        got = f"{source} is {'a job file' if source.endswith(('.yaml', '.yml')) else 'a file'}"
        need = f"a model: a folder of Hugging Face's or timm's, or a file of weights ({', '.join(weights)})"
        raise ModelError(got, need=need, do="Give one of these, or a name such as ResNet18_Weights.IMAGENET1K_V1")


def _assumed(artifact: Artifact, *, named: bool) -> Iterator[str]:
    """What a file of weights does not say."""
    stem = "a 3 × 3 stem of stride 1 without pooling" if artifact.architecture.stem == "small" else "a plain ResNet's"
    yield f"assumed {stem}: strides, pooling and blur cannot be told from weights"
    if not named:
        made_up = artifact.labels[0] == "class_0"
        labels = f"labels {', '.join(artifact.labels[:2])} and so on" if made_up else "ImageNet's labels"
        yield f"assumed {labels}: a file of weights names none. Yours? Import into another folder with --labels FILE"


def _preprocessing(preset: Preset | None, size: int | None) -> Preprocessing | None:
    if preset is None:
        if size is not None:
            need = "the crop and filter that go with it"
            raise JobError(f"--size {size} alone", need=need, do=f"Add --preprocessing {_CHOICE}")
        return None
    try:
        return replace(PRESETS[preset], size=PRESETS[preset].size if size is None else size)
    except ValueError as error:
        raise JobError(f"--size: {error}", do="Give another size") from None


def _known(preprocessing: Preprocessing) -> str:
    name = next((name for name, known in PRESETS.items() if replace(known, size=preprocessing.size) == preprocessing), None)
    return f", as {name} does" if name else ""


def _labels(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows writes a mark in front
        values = json.loads(text) if path.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: {error}", need="a label a line, or a JSON list of labels", do="Check the file") from error
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise JobError(
            f"{path}: holds something else than labels", need="a label a line, or a JSON list of labels", do="Check the file"
        )
    return values
