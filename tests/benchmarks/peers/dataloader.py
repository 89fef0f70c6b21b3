"""torch's DataLoader with torchvision's transforms, two workers: what most people write first."""

from __future__ import annotations

import torch
from common import arguments, autocast, network, paths, told
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.models import ResNet18_Weights, resnet18


class Files(Dataset):
    def __init__(self, names: list[str]) -> None:
        self.names, self.transform = names, ResNet18_Weights.DEFAULT.transforms()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, str]:
        return self.transform(default_loader(self.names[at])), self.names[at]


if __name__ == "__main__":
    args = arguments()
    model = network(args.model, resnet18)
    with torch.inference_mode(), autocast(args.precision):
        for batch, names in DataLoader(Files(paths(args)), batch_size=32, num_workers=2):
            logits = model(batch.to(memory_format=torch.channels_last))
            told(args.out, list(names), logits.argmax(dim=1).tolist())
