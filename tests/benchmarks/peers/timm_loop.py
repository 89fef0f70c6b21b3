"""timm's own dataset, loader and model in the loop of its inference script, two workers, channels last."""

from __future__ import annotations

import timm
import torch
from common import arguments, autocast, network, told
from timm.data import create_dataset, create_loader

if __name__ == "__main__":
    args = arguments()
    model = network(args.model, lambda num_classes: timm.create_model("resnet18", num_classes=num_classes))
    dataset = create_dataset("", root=str(args.photos), class_map={args.photos.name: 0, "": 0})
    loader = create_loader(
        dataset,
        input_size=(3, 224, 224),
        batch_size=32,
        use_prefetcher=False,
        interpolation="bilinear",
        crop_pct=0.875,
        num_workers=2,
        device=torch.device("cpu"),
    )
    at, names = 0, dataset.filenames()
    with torch.inference_mode(), autocast(args.precision):
        for batch, _ in loader:
            ids = model(batch.to(memory_format=torch.channels_last)).argmax(dim=1).tolist()
            told(args.out, names[at : at + len(ids)], ids)
            at += len(ids)
