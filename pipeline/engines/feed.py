"""Crops in the host's memory → batches on the device: pinned memory that is used again, copies beside the computing.

Two buffers in pinned memory and two on the device, each pair with its events: while one batch computes the next one is copied.
Nothing is allocated for a batch, so what a block takes of the GPU's memory does not depend on how far the host runs ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class _Slot:
    pinned: Tensor  # uint8 [capacity, 3, S, S]
    device: Tensor  # the same
    copied: torch.cuda.Event  # the copy from pinned to device is over
    used: torch.cuda.Event  # what read `device` is over


class Feed:
    """A callable that brings images to a CUDA device. One thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.slots: tuple[_Slot, ...] = ()
        self.at = 0

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """The images on the device, uint8 [N, 3, S, S], for work that is put on the current stream before the next
        call; the call after that writes over them. Returns while the copy is under way."""
        count = len(pixels)
        if not self.slots or self.slots[0].pinned.shape[1:] != pixels.shape[1:] or len(self.slots[0].pinned) < count:
            self._make((1 << (count - 1).bit_length(), *pixels.shape[1:]))  # not anew for every block that is a little larger
        computing = torch.cuda.current_stream(self.device)
        self.slots[self.at].used.record(computing)  # the batch before this one, whose work is on the stream by now
        self.at = 1 - self.at
        slot = self.slots[self.at]
        slot.copied.synchronize()
        np.copyto(slot.pinned[:count].numpy(), pixels)
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(slot.used)
            slot.device[:count].copy_(slot.pinned[:count], non_blocking=True)
            slot.copied.record(self.copying)
        computing.wait_event(slot.copied)
        return slot.device[:count]

    def _make(self, shape: tuple[int, ...]) -> None:
        torch.cuda.synchronize(self.device)  # nobody reads the old ones any more
        self.slots = ()
        made = []
        for _ in range(2):
            pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            device = torch.empty(shape, dtype=torch.uint8, device=self.device)
            made.append(_Slot(pinned, device, torch.cuda.Event(), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self.slots = tuple(made)
