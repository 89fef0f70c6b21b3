"""The GPU's lane of gpu.py: photographs → crops on the GPU → labels, without Ray, in one thread and in several.

What it is made of is measured too: each kernel alone, the first one in variants, and the copy of the files to the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifact import Artifact
from pipeline.engines import gpu_decode
from pipeline.engines.gpu_decode import GpuDecoder
from pipeline.errors import ModelError
from pipeline.lanes import GpuLane, Lanes, all_on_gpu
from pipeline.predict import Predict
from pipeline.preprocess import Preprocess
from pipeline.rows import IMAGE
from pipeline.spec import ModelSource, Output

WHOLE = "lane: all of predict"


def lane(bench: Any, artifact: Artifact, images: list[bytes], block: int) -> None:
    """On blocks of so many of the `images`; `bench` is gpu.py's."""
    try:
        decoder = GpuDecoder(artifact.preprocessing)
    except ModelError as error:
        print(f"{'lane':44} -  ({error})")
        return
    many = itertools.islice(itertools.cycle(images), block)
    rows = [{"unit": "u", "index": at, "key": str(at), "source": "s", "bytes": image} for at, image in enumerate(many)]
    preprocess = Preprocess(artifact.preprocessing, max_pixels=10**8)
    routed = Lanes(preprocess, artifact.preprocessing, 10**8, all_on_gpu)(pa.Table.from_pylist(rows, schema=IMAGE))
    plain = routed.filter(routed["bytes"].is_valid())
    sizes = np.stack([plain["width"].to_numpy(), plain["height"].to_numpy()], axis=1).astype(np.int64)

    def decode() -> None:
        decoder(plain["bytes"], sizes)

    left = len(sizes) - int(decoder(plain["bytes"], sizes)[1].sum())
    print(f"{'':44} {len(sizes)} of {block} are plain, {left} of them are left to the CPU")
    for threads in (1, 3):
        in_threads(bench, f"lane: decode and resize, {threads} threads", len(sizes), decode, threads)
    kernels(bench, decoder, [image for image in plain["bytes"].to_pylist() if image], sizes)
    source = ModelSource(uri="unused", precision="float16", engine="torch")
    predict = Predict(artifact, source, device="cuda", batch_size=896, output=Output(uri="unused"), threads=1)
    whole = GpuLane(decoder, preprocess, predict, all_on_gpu)
    for threads in (1, 3, 5):
        in_threads(bench, f"{WHOLE}, {threads} threads", block, lambda: whole(routed), threads)


def kernels(bench: Any, decoder: GpuDecoder, images: list[bytes], sizes: np.ndarray) -> None:
    """Each kernel alone, of files that are on the GPU."""
    import cupy

    host = np.frombuffer(b"".join(images) + bytes(8), np.uint8)
    data, starts = cupy.asarray(host), cupy.asarray(np.cumsum([0, *map(len, images)]))
    bench.measure("lane: copy of the files to the GPU", len(images), lambda: data.set(host))
    names = ("_scans", "_blocks", "_colours", "_rows", "_columns")
    made, launches = {name: getattr(decoder, name) for name in names}, list[tuple[Any, tuple[Any, ...]]]()
    for name, kernel in made.items():  # what would be launched is written down
        setattr(decoder, name, lambda *launch, kernel=kernel: launches.append((kernel, launch)))
    _, verdicts = decoder._crops(data, starts, sizes)
    for name, kernel in made.items():
        setattr(decoder, name, kernel)
    grid, _, arguments = launches[0][1]
    for pieces in (64, 256, 128):
        scans = cupy.RawModule(code=gpu_decode.source(), options=(f"-DPIECES={pieces}",)).get_function("read_scans")
        bench.measure(f"lane: read_scans, {pieces} pieces", len(images), partial(launched, scans, grid, (pieces,), arguments))
        print(f"{'':44} {int((verdicts != gpu_decode.SOUND).sum())} are not sound")
    for kernel, launch in launches[1:]:
        bench.measure(f"lane: {kernel.name}", len(images), partial(launched, kernel, *launch))


def launched(kernel: Any, *launch: Any) -> None:
    import cupy

    kernel(*launch)
    cupy.cuda.get_current_stream().synchronize()


def in_threads(bench: Any, name: str, images: int, step: Callable[[], object], threads: int) -> None:
    """Measures `step` on `images`, twice in each of so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        bench.measure(name, 2 * threads * images, lambda: list(pool.map(lambda _: step(), range(2 * threads))))
