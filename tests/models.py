"""Random models whose predictions differ from image to image, so that equal labels prove something."""

from __future__ import annotations

from pathlib import Path

import torch
from shards import picture

from pipeline.decode import decode
from pipeline.model.preprocessing import Preprocessing
from pipeline.prepare.importer import import_model
from pipeline.preprocess import resize_and_crop


def make_artifact(folder: Path, images: list[bytes], *, preprocessing: Preprocessing, seed: int = 0) -> str:
    """An artifact of a ResNet-18 with random weights that has learned `images` by heart, one class each; its folder.

    The classifier is the nearest neighbour among the features of `images`, so an image's own class wins by half its squared
    distance to the next one, whatever the lengths of the two; 4 logits is the median.
    """
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    classes = len(images)
    network = resnet18(num_classes=classes)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    crops = [torch.as_tensor(resize_and_crop(decode(image, max_pixels=10**8), preprocessing)) for image in images]
    batches = [(torch.stack(crops[at : at + 40]).float() / 255 - mean) / std for at in range(0, classes, 40)]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    features = torch.nn.Sequential(*list(network.children())[:-1])
    with torch.no_grad():
        features.train()(batches[0])
        network.eval()
        seen = torch.cat([features(batch).flatten(1) for batch in batches])
        centred = seen - seen.mean(dim=0)
        scale = 8 / torch.pdist(centred).square().median()
        network.fc.weight.copy_(scale * centred)
        network.fc.bias.copy_(-network.fc.weight @ seen.mean(dim=0) - scale / 2 * centred.square().sum(dim=1))
    weights = folder / "weights.pth"
    torch.save(network.state_dict(), weights)
    labels = tuple(f"class {number}" for number in range(classes))
    import_model(str(weights), str(folder / "artifact"), labels=labels, preprocessing=preprocessing)
    return str(folder / "artifact")


def small_artifact(folder: Path, *, seed: int = 0) -> str:
    pictures = [picture(number) for number in range(8)]
    return make_artifact(folder, pictures, preprocessing=Preprocessing(size=32), seed=seed)
