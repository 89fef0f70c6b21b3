"""Images a second and memory of training, by precision; `training.py amp` prints them."""

from __future__ import annotations

import statistics
import time
from typing import Any


def amp(device: str, count: int, *, batch: int | None = None, size: int = 224) -> list[dict[str, Any]]:
    """One step of training after the other on made-up pixels: nothing but the model is measured."""
    names = ("float32", "float16", "bfloat16") if device == "cuda" else ("float32", "bfloat16")
    rows = [{"precision": name, **steps(name, device, count, batch=batch, size=size)} for name in names]
    return [row | {"speed": row["images_per_second"] / rows[0]["images_per_second"]} for row in rows]


def steps(name: str, device: str, count: int, *, batch: int | None, size: int) -> dict[str, float]:
    """Median images a second of five times `count` steps of `batch` images, without it 256 on a GPU, else 32, of `size` pixels;
    the most memory on a GPU."""
    import torch

    from pipeline.job.training import RandomNetwork
    from pipeline.model.preprocessing import Preprocessing
    from pipeline.prepare.finetune import starting_network
    from pipeline.prepare.learner import CrossEntropy, Normalise, decay_groups

    dtype, cuda = getattr(torch, name), device == "cuda"
    batch = batch or (256 if cuda else 32)
    network = starting_network(None, RandomNetwork(), tuple(map(str, range(1000))), seed=0).train()
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decay_groups(network, 0.05), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    normalise, objective = Normalise(Preprocessing()).to(device), CrossEntropy(0.1)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    targets = torch.nn.functional.one_hot(torch.arange(batch, device=device) % 1000, 1000).float()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rates = []
    for _ in range(6):
        since = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
                loss = objective(network, normalise(pixels), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if cuda:
            torch.cuda.synchronize()
        rates.append(batch * count / (time.perf_counter() - since))
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")
    return {"images_per_second": statistics.median(rates[1:]), "memory_mib": memory}  # the first is warm-up
