"""The state of a training on disk: the last epoch's and the best one's, each there whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

LAST, BEST = "last.ckpt", "best.ckpt"


class OneStep(TorchCheckpointIO):
    """A checkpoint is there whole or not at all. Lightning moves it from the temporary folder, which may be another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace(Path(path), buffer.getvalue())


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
