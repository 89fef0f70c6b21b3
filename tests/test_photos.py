"""The 400 shared photographs, through the whole pipeline, against a straight loop of torchvision and Pillow."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from test_run import cli, table

from pipeline.disk import Disk
from pipeline.model.preprocessing import Preprocessing
from pipeline.storage import open_store
from pipeline.tar import Stream, members

RESOURCES = {"read": {"cpus_per_task": 0.1}, "preprocess": {"cpus_per_actor": 0.3}, "predict": {"cpus_per_actor": 1.6}}


@pytest.fixture(scope="module")
def photos(shared_data) -> dict[str, bytes]:
    """Encoded photographs by key."""
    found: dict[str, bytes] = {}
    for tar in sorted((shared_data / "photos").glob("*.tar")):
        with Stream(Disk(), Disk().head(str(tar))) as stream:
            images = (member for member in members(stream) if member.name.endswith(".jpg"))
            found |= {member.name.removesuffix(".jpg"): bytes(member.read()) for member in images}
    assert len(found) == 400
    return found


@pytest.fixture(scope="module")
def photo_model(photos, tmp_path_factory) -> str:
    from models import make_artifact

    return make_artifact(tmp_path_factory.mktemp("photo-model"), list(photos.values()), preprocessing=Preprocessing())


@pytest.fixture(scope="module")
def reference(photos, photo_model) -> dict[str, np.ndarray]:
    """Probabilities by key, from torchvision's model on Pillow's pixels, one image after the other."""
    from torchvision.models import resnet18

    network = resnet18(num_classes=400)
    network.load_state_dict(torch.load(Path(photo_model).parent / "weights.pth", weights_only=True))
    network.eval()
    mean, std = (np.array(values, np.float32) for values in (Preprocessing().mean, Preprocessing().std))
    result: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for key, data in photos.items():
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            scale = 256 / min(image.size)
            width, height = (256 if side == min(image.size) else int(side * scale) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - 224) / 2), round((height - 224) / 2)
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
            batch = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]
            result[key] = network(batch).softmax(dim=1)[0].numpy()
    return result


def check(rows: pa.Table, reference: dict[str, np.ndarray]) -> None:
    assert sorted(rows.column("key").to_pylist()) == sorted(reference)
    assert set(rows.column("status").to_pylist()) == {"ok"}
    for row in rows.to_pylist():
        expected = reference[row["key"]]
        assert row["label_id"] == int(expected.argmax()), row["key"]
        for item in row["topk"]:
            assert abs(item["score"] - expected[item["label_id"]]) <= 1e-3, row["key"]


def test_on_s3_as_on_disk_and_equal_to_the_reference(shared_data, photo_model, reference, s3, tmp_path, on_ray):  # noqa: PLR0917
    bucket = s3.bucket()
    for tar in sorted((shared_data / "photos").glob("*.tar")):
        s3.put(f"s3://{bucket}/photos/{tar.name}", tar.read_bytes())
    for name, source, out in (
        ("s3", f"s3://{bucket}/photos/", f"s3://{bucket}/labels"),
        ("disk", str(shared_data / "photos"), str(tmp_path / "labels")),
    ):
        path = tmp_path / f"{name}.yaml"
        wanted = {"name": name, "input": {"uri": source, "keep": ["cls"]}, "model": {"uri": photo_model}, "output": {"uri": out}}
        path.write_text(json.dumps(wanted | {"resources": RESOURCES}))
        code, stdout, stderr = cli("run", path, "--json")
        assert code == 0, stderr
        where = json.loads(stdout)["where"]
        code, stdout, stderr = cli("validate", path)
        assert code == 0, stdout + stderr
        assert "valid: 400 in = 400 ok + 0 failed" in stdout
        code, stdout, stderr = cli("run", path)
        assert code == 0, stderr
        assert "nothing to do" in stdout
    check(table(where), reference)
    store = open_store(f"s3://{bucket}/labels")
    objects = [item.uri for item in store.list(f"s3://{bucket}/labels/") if "/data/" in item.uri]
    on_s3 = pa.concat_tables([pq.read_table(io.BytesIO(store.read(uri))) for uri in objects])
    check(on_s3, reference)
    assert len(set(on_s3.column("label").to_pylist())) == 400, "a model that tells nothing apart proves nothing"
    truth = dict(zip(on_s3.column("key").to_pylist(), on_s3.column("cls").to_pylist(), strict=True))
    assert len(set(truth.values())) == 400


def test_as_parquet_and_as_loose_files(photos, photo_model, reference, tmp_path, on_ray):
    some = dict(list(photos.items())[:100])
    table_of = pa.table({"key": list(some), "image": pa.array(list(some.values()), pa.binary())})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table_of, tmp_path / "parquet/photos.parquet", row_group_size=20)
    (tmp_path / "loose").mkdir()
    for key, data in some.items():
        (tmp_path / "loose" / f"{key}.JPG").write_bytes(data)
    for kind, source in (("parquet", "parquet"), ("images", "loose")):
        path = tmp_path / f"{kind}.yaml"
        out = tmp_path / f"labels-{kind}"
        wanted = {"name": kind, "input": {"uri": str(tmp_path / source), "format": kind}, "model": {"uri": photo_model}}
        path.write_text(json.dumps(wanted | {"output": {"uri": str(out)}, "resources": RESOURCES}))
        code, stdout, stderr = cli("run", path, "--json")
        assert code == 0, stderr
        rows = table(json.loads(stdout)["where"])
        keys = [key.removesuffix(".JPG") for key in rows.column("key").to_pylist()]
        check(rows.set_column(0, "key", pa.array(keys)), {key: reference[key] for key in some})
