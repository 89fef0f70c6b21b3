"""What a model is: one folder in Hugging Face's layout, named by the digest of what it computes with.

The digest is the sha256 of the canonical JSON of {file name: sha256} over FILES, so it changes with one byte of weights,
preprocessing or labels and with nothing else. `artifact.json` stands outside of it: it repeats the sums, so that a plan gets the
digest without the weights, and says where the model came from. It is written last, so a folder that has it is whole. A folder
that transformers saved has none and opens all the same. README.md, the model card, stands outside of the digest too. The price:
weights are held in memory as bytes, 47 MB for ResNet-18, and pickled weights are refused here, they have to be imported once.

Nothing here imports torch before `make_artifact` and `build` are called.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.job.uris import absolute
from pipeline.model.huggingface import (
    MODELING,
    Architecture,
    modeling_code,
    read_config,
    read_preprocessor,
    write_config,
    write_preprocessor,
)
from pipeline.model.preprocessing import Preprocessing
from pipeline.rows import FETCH_LFS, LFS_POINTER
from pipeline.spec import S3
from pipeline.storage import Store, head_if_there, join, open_store, read_if_there

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.model.resnet import ResNet

CONFIG, PREPROCESSOR, WEIGHTS, INT8 = "config.json", "preprocessor_config.json", "model.safetensors", "model.int8.onnx"
#: What the digest covers, in the order of writing; the last two are optional.
FILES = (CONFIG, PREPROCESSOR, WEIGHTS, INT8, MODELING)
RECORD, CARD = "artifact.json", "README.md"
EPOCHS = "epochs"  # in `Origin.data`: what each came to


@dataclass(frozen=True)
class Origin:
    """Where a model came from; the part of artifact.json that no digest covers."""

    parents: tuple[str, ...] = ()
    """Digests of the artifacts, or names of the weights, that it was made from."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained or calibrated on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """How well it does."""
    command: str = ""
    """The exact command that made it."""


@dataclass(frozen=True)
class Artifact:
    """A model, read and checked. `files` holds those of FILES that were read, by name."""

    digest: str
    architecture: Architecture
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    files: Mapping[str, bytes] = field(repr=False, compare=False)
    origin: Origin = field(default_factory=Origin, compare=False)
    quantized: bool = False
    """There is a model.int8.onnx, whether it was read or not."""


def load_artifact(uri: str, s3: S3 | None = None, *, weights: bool = True) -> Artifact:
    """The artifact in the folder `uri`. With `weights` every file is read, hashed and held against artifact.json; without, the
    large ones are only looked for and artifact.json is believed, unless there is none.

    Raises ModelError when files are missing, do not match artifact.json, or describe what we cannot run.
    """
    store = open_store(uri, s3)
    record = _read_record(store, uri)
    files: dict[str, bytes] = {}
    sums: dict[str, str] = {}
    for name in FILES:
        if weights or record is None or name in (CONFIG, PREPROCESSOR):
            data = read_if_there(store, join(uri, name))
            if data is not None:
                check_fetched(data, join(uri, name))
                files[name], sums[name] = data, _sha256(data)
        elif head_if_there(store, join(uri, name)):
            sums[name] = record["files"].get(name, "")
    for name in FILES[:3]:
        if name not in sums:
            do = "Check the URI, or import the weights, such as resnet18.pth or pytorch_model.bin: nightlabel prepare import"
            raise ModelError(f"{absolute(uri)}: has no {name}", need=", ".join(FILES[:3]), do=do)
    if record is not None:
        _verify(record, sums, uri)
    return _open(files, sums, uri, _origin(record or {}))


def make_artifact(
    architecture: Architecture,
    state: Mapping[str, Tensor],
    *,
    labels: tuple[str, ...],
    preprocessing: Preprocessing,
    origin: Origin | None = None,
) -> Artifact:
    """An artifact of parameters with Hugging Face's names; they are kept as float32. Raises ModelError when they do not fit the
    architecture, or the labels its classes."""
    from safetensors.torch import save

    from pipeline.model.resnet import load_state

    model = load_state(architecture, state, "the weights")
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    files = {
        CONFIG: write_config(architecture, labels),
        PREPROCESSOR: write_preprocessor(preprocessing, "the preprocessing"),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        **({MODELING: modeling_code()} if architecture.stem == "small" else {}),
    }
    return with_files(files, origin=origin)


def with_files(files: Mapping[str, bytes], *, origin: Origin | None = None) -> Artifact:
    """An artifact of these FILES, in memory. Raises ModelError when they do not go together."""
    return _open(dict(files), {name: _sha256(data) for name, data in files.items()}, "the model", origin or Origin())


def save_artifact(artifact: Artifact, uri: str, s3: S3 | None = None, *, card: bytes | None = None) -> Artifact:
    """Write the folder, artifact.json last, never over a file that says something else. Saving the same model twice is no error.

    `card` becomes its README.md (see prepare.card), unless there is one: it is for people to edit, and no digest covers it.
    Raises ModelError when `uri` holds another model.
    """
    store = open_store(uri, s3)
    standing = _read_record(store, uri)
    if standing is not None and standing["digest"] != artifact.digest:
        raise ModelError(f"{uri}: holds {standing['digest']}", need=artifact.digest, do="Take an empty folder")
    sums = {name: _sha256(artifact.files[name]) for name in FILES if name in artifact.files}
    record = {"digest": artifact.digest, "files": sums, **asdict(artifact.origin)}
    for name in sums:
        data = artifact.files[name]
        if not store.create(join(uri, name), data) and read_if_there(store, join(uri, name)) != data:
            raise ModelError(
                f"{uri}: holds another {name}", need="none or the same, for nothing is overwritten", do="Take an empty folder"
            )
    if card is not None:
        store.create(join(uri, CARD), card)
    store.create(join(uri, RECORD), (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return load_artifact(uri, s3)


def check_fetched(data: bytes, where: str) -> None:
    """Raises ModelError for what Git LFS has in the place of a file, as a clone of Hugging Face's repositories does."""
    if data.startswith(LFS_POINTER):
        raise ModelError(f"{where}: a Git LFS pointer in place of the file", need="the file itself", do=FETCH_LFS)


def build(artifact: Artifact) -> ResNet:
    """The network with its weights, float32, in eval mode, without gradients. Raises ModelError when the weights do not fit."""
    from safetensors.torch import load

    from pipeline.model.resnet import load_state

    return load_state(artifact.architecture, load(artifact.files[WEIGHTS]), WEIGHTS)


def digest_of(sums: Mapping[str, str]) -> str:
    """`sha256:` and the sum over {file name: sha256} as JSON without spaces, names sorted."""
    return "sha256:" + _sha256(json.dumps(sums, sort_keys=True, separators=(",", ":")).encode())


def _open(files: dict[str, bytes], sums: Mapping[str, str], uri: str, origin: Origin) -> Artifact:
    architecture, labels = read_config(files[CONFIG], join(uri, CONFIG))
    preprocessing = read_preprocessor(files[PREPROCESSOR], join(uri, PREPROCESSOR))
    if WEIGHTS in files:
        classes = _classes(files[WEIGHTS], join(uri, WEIGHTS))
        if classes != len(labels):
            got = f"{uri}: the weights have {classes} classes, {CONFIG} names {len(labels)} labels"
            raise ModelError(got, need="a label for every class", do="Complete id2label, or import with labels")
    return Artifact(digest_of(sums), architecture, labels, preprocessing, files, origin, INT8 in sums)


def _classes(data: bytes, where: str) -> int:
    """Rows of the classifier, from the header of a safetensors file: 8 bytes of length, JSON, then the tensors."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        length, header, end = 0, {}, math.inf
    if 8 + length + end != len(data):
        raise ModelError(f"{where}: is damaged or not a safetensors file", do="Fetch or export the model again")
    if "classifier.1.weight" not in header:
        do = "Take a ResNetForImageClassification, or import the weights"
        raise ModelError(f"{where}: has no classifier.1.weight", need="a classifier, to label images", do=do)
    return int(header["classifier.1.weight"]["shape"][0])


def _verify(record: Mapping[str, Any], sums: Mapping[str, str], uri: str) -> None:
    for name in FILES:
        if record["files"].get(name) != sums.get(name):
            need = f"{record['files'].get(name, 'none')}, as in {RECORD}, not {sums.get(name, 'none') or 'one'}"
            raise ModelError(f"{uri}: {name} is not the one it was saved with", need=need, do="Fetch or save the model again")
    if record["digest"] != digest_of(sums):
        got = f"{uri}: {RECORD} says {record['digest']}"
        raise ModelError(got, need=f"{digest_of(sums)}, the digest of its files", do="Fetch or save the model again")


def _read_record(store: Store, uri: str) -> dict[str, Any] | None:
    data = read_if_there(store, join(uri, RECORD))
    if data is None:
        return None
    try:
        record = json.loads(data)
        record = {**record, "digest": str(record["digest"]), "files": dict(record["files"])}
        _origin(record)
    except (ValueError, TypeError, KeyError):
        do = "Remove the file, or fetch the model again"
        raise ModelError(
            f"{join(uri, RECORD)}: is not an artifact's record", need="JSON with a digest and the sums of the files", do=do
        ) from None
    return record


def _origin(record: Mapping[str, Any]) -> Origin:
    return Origin(
        parents=tuple(record.get("parents", ())),
        data=dict(record.get("data", {})),
        metrics=dict(record.get("metrics", {})),
        command=str(record.get("command", "")),
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
