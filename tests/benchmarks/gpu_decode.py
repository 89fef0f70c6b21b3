"""The decoding ceilings of gpu.py: crops by plain processes on the CPU's cores, pixels by nvJPEG.

Kept apart, with nothing heavy at the top but torch: a fork server imports this once and every process starts from there, where
sixteen that imported torch each for itself took 30 s.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shards import is_decoded

from pipeline.decode import decode
from pipeline.model.preprocessing import Preprocessing
from pipeline.preprocess import Prepare

MAX_PIXELS = 10**8
BATCH = 1024  # of nvJPEG: 15,041 img/s of an H100's hardware decoders, 11,173 in batches of 256, 6,692 of 64
HYBRID = ":fancy_upsampling=1 :hybrid_huffman_threshold=0"


def fork_server() -> Any:
    """Starts processes that have this module imported already, and have never seen CUDA."""
    context, here = multiprocessing.get_context("forkserver"), Path(__file__).resolve().parent
    places = [str(here), str(here.parent), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(places))  # the server preloads by name, and knows no other path
    context.set_forkserver_preload([Path(__file__).stem])
    return context


def decoding(images: list[bytes], seconds: float, lines: tuple[Any, Any]) -> None:
    """One process: images a second of the CPU's decode and resize, from the moment at which all are ready."""
    torch.set_num_threads(1)
    prepare, (gate, results) = Prepare(Preprocessing(), MAX_PIXELS), lines
    for image in images[:20]:
        prepare(memoryview(image))
    gate.wait()
    since, done = time.perf_counter(), 0
    while time.perf_counter() - since < seconds:
        prepare(memoryview(images[done % len(images)]))
        done += 1
    results.put(done / (time.perf_counter() - since))


def on_cores(images: list[bytes], seconds: float, processes: int) -> float:
    """Images a second of so many processes together."""
    server = fork_server()
    gate, results = server.Barrier(processes), server.Queue()
    lines = (gate, results)
    workers = [server.Process(target=decoding, args=(images, seconds, lines), daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rate = sum(results.get(timeout=60 + seconds) for _ in workers)
    for worker in workers:
        worker.join()
    return float(rate)


def decoders(nvimgcodec: Any) -> dict[str, Callable[[], Any]]:
    """By name, what makes a decoder. GPU_ONLY alone opens no JPEG: its Huffman stage belongs to the hybrid."""
    kinds, made = nvimgcodec.BackendKind, nvimgcodec.Backend
    hardware, cuda = [made(kinds.HW_GPU_ONLY)], [made(kinds.GPU_ONLY), made(kinds.HYBRID_CPU_GPU)]
    both = [made(kinds.HW_GPU_ONLY, load_hint=0.7), *cuda]
    return {
        "hardware": lambda: nvimgcodec.Decoder(backends=hardware, options=":fancy_upsampling=1"),
        "CUDA": lambda: nvimgcodec.Decoder(backends=cuda, options=HYBRID),
        "hardware and CUDA": lambda: nvimgcodec.Decoder(backends=both, options=":fancy_upsampling=1"),
    }


def on_gpu(measure: Callable[[str, int, Callable[[], object]], None], images: list[bytes]) -> dict[str, Any]:
    """Measures nvJPEG; of every decoder how far its pixels are from the CPU's, and how many damaged images it lets through."""
    try:
        from nvidia import nvimgcodec
    except ImportError:
        print("decode: nvJPEG -  (nvImageCodec is not installed)")
        return {}
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
    batch = (images * (BATCH // len(images) + 1))[:BATCH]
    broken, found = damaged(images[:50]), {}

    def decoded(decoder: Any, encoded: list[bytes]) -> list[Any]:
        return list(decoder.decode([nvimgcodec.CodeStream(image) for image in encoded], params=params)) if encoded else []

    def step(decoder: Any) -> None:
        lost = sum(image is None for image in decoded(decoder, batch))
        if lost:
            raise RuntimeError(f"{lost} of {len(batch)} are not decoded")

    for name, make in decoders(nvimgcodec).items():
        try:
            decoder = make()
            some = decoded(decoder, images[:64])
        except RuntimeError as error:
            print(f"decode: nvJPEG, {name} -  ({str(error).splitlines()[0][:80]})", flush=True)
            continue
        measure(f"decode: nvJPEG, {name}", len(batch), lambda decoder=decoder: step(decoder))
        taken = {kind: sum(image is not None for image in decoded(decoder, refused)) for kind, refused in broken.items()}
        off = levels(images[:64], some)
        found[name] = {"levels from the CPU's": off, "decoded though refused": taken}
        told = ", ".join(f"{kind} {taken[kind]} of {len(refused)}" for kind, refused in broken.items())
        print(f"{'':44} {off} levels off at most; decodes: {told}", flush=True)
    return found


def levels(images: list[bytes], found: list[Any]) -> int:
    """The largest difference of a pixel, of 255, between nvJPEG's images and libjpeg's as `decode` has them."""
    worst = 0
    for data, image in zip(images, found, strict=True):
        if image is not None:
            pixels = torch.as_tensor(image, device="cuda").cpu().short()
            ours = torch.from_numpy(decode(data, max_pixels=MAX_PIXELS).copy()).short()
            if pixels.shape == ours.shape:  # else it is turned by its orientation, or grey
                worst = max(worst, int((pixels - ours).abs().max()))
    return worst


def damaged(images: list[bytes]) -> dict[str, list[bytes]]:
    """By kind of damage, those images that our decoder then refuses."""
    kinds: dict[str, Callable[[bytes], bytes]] = {
        "cut at six tenths": lambda data: data[: len(data) * 6 // 10],
        "end marker gone": lambda data: data[:-2],
        "64 zeros": lambda data: data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
        "100 bytes missing": lambda data: data[: len(data) // 2] + data[len(data) // 2 + 100 :],
    }
    return {kind: [broken for broken in map(make, images) if not is_decoded(broken)] for kind, make in kinds.items()}
