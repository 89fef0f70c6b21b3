"""Daft as in its published benchmark of image classification: Daft decodes, torchvision's transform by row, a class labels."""

from __future__ import annotations

import os
from pathlib import Path

import daft
import numpy as np
import torch
from common import arguments, autocast, network, paths, told
from torchvision import transforms
from torchvision.models import ResNet18_Weights, resnet18

transform = transforms.Compose([transforms.ToTensor(), ResNet18_Weights.DEFAULT.transforms()])


@daft.cls(max_concurrency=1)
class Labeller:
    def __init__(self, args: object) -> None:
        self.args, self.model = args, network(args.model, resnet18)

    @daft.method.batch(return_dtype=daft.DataType.int64(), batch_size=100)
    def __call__(self, images: daft.Series, names: daft.Series) -> list[int]:
        if len(images) == 0:
            return []
        with torch.inference_mode(), autocast(self.args.precision):
            batch = torch.from_numpy(np.array(images.to_pylist())).to(memory_format=torch.channels_last)
            ids = self.model(batch).argmax(dim=1).tolist()
        told(self.args.out, names.to_pylist(), ids)
        return ids


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # Daft runs the class in a process that knows nothing of this folder
    args = arguments()
    frame = daft.from_pydict({"path": paths(args)})
    frame = frame.with_column("decoded", frame["path"].url.download().image.decode(mode=daft.ImageMode.RGB))
    seen = daft.DataType.tensor(dtype=daft.DataType.float32(), shape=(3, 224, 224))
    frame = frame.with_column("seen", frame["decoded"].apply(func=lambda image: transform(image), return_dtype=seen))
    frame = frame.with_column("label", Labeller(args)(daft.col("seen"), daft.col("path")))
    frame.select("path", "label").write_parquet(str(args.out / "parquet"))
