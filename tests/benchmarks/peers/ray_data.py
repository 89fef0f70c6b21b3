"""Ray Data as its guide to images and batch inference has it: read_images, a transform by row, the model in an actor.

`--script daft` does as the Ray Data script in Daft's published benchmark of image classification: PIL and ToTensor before the
transform, batches of 100.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import arguments, autocast, network, own_ray, told
from torchvision import transforms
from torchvision.models import ResNet18_Weights, resnet18

DAFT = "--script=daft" in sys.argv
if DAFT:
    sys.argv.remove("--script=daft")
preset = ResNet18_Weights.DEFAULT.transforms()


def transformed(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    if DAFT:
        image = transforms.ToTensor()(Image.fromarray(row.pop("image")).convert("RGB"))
    else:
        image = torch.as_tensor(row.pop("image")).permute(2, 0, 1)
    return row | {"seen": preset(image).numpy()}


class Labeller:
    def __init__(self, args: Any) -> None:
        self.args, self.model = args, network(args.model, resnet18)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode(), autocast(self.args.precision):
            ids = self.model(torch.from_numpy(batch["seen"]).to(memory_format=torch.channels_last)).argmax(dim=1).numpy()
        told(self.args.out, list(batch["path"]), ids.tolist())
        return {"path": batch["path"], "label": ids}


if __name__ == "__main__":
    args = arguments()
    own_ray()
    import ray

    dataset = ray.data.read_images(str(args.photos), mode="RGB", include_paths=True).map(transformed)
    labelled = dataset.map_batches(Labeller, fn_constructor_args=(args,), batch_size=100 if DAFT else 32, concurrency=1)
    labelled.write_parquet(str(args.out / "parquet"))
