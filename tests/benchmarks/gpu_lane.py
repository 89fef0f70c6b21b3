"""The GPU's lane of gpu.py: photographs → crops on the GPU → labels, without Ray, in one thread and in several.

What it is made of is measured too: the walk that tells whole files from damaged ones, alone; the lane without it; and with the
walk's multiprocessors set up for shared memory first, as the model's convolutions want them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
    walking(bench, decoder, [image for image in plain["bytes"].to_pylist() if image])
    walk = decoder._judge
    decoder._judge = lambda _grid, _block, arguments: arguments[-1].fill(0)
    in_threads(bench, "lane: the same without the walk, 3 threads", len(sizes), decode, 3)
    decoder._judge = walk
    source = ModelSource(uri="unused", precision="float16", engine="torch")
    predict = Predict(artifact, source, device="cuda", batch_size=896, output=Output(uri="unused"), threads=1)
    whole = GpuLane(decoder, preprocess, predict, all_on_gpu)
    for threads in (1, 3, 5):
        in_threads(bench, f"lane: all of predict, {threads} threads", block, lambda: whole(routed), threads)
    walk.preferred_shared_memory_carveout = 100  # per cent; a multiprocessor changes its share only when nothing runs on it
    in_threads(bench, "lane: the same, shared memory first", block, lambda: whole(routed), 5)


def walking(bench: Any, decoder: GpuDecoder, images: list[bytes]) -> None:
    """The walk alone, of files that are on the GPU: by a thread for each piece of an image, and by one for an image."""
    import cupy

    data = cupy.asarray(np.frombuffer(b"".join(images) + bytes(8), np.uint8))
    starts = cupy.asarray(np.cumsum([0, *map(len, images)]))
    whole = cupy.RawModule(code=Path(gpu_decode.__file__).with_name("jpeg.cu").read_text(), options=("-DPIECES=1",))
    for name, kernel in (("in pieces", decoder._judge), ("each in one piece", whole.get_function("judge_all"))):
        verdicts = cupy.empty(len(images), np.uint8)

        def walk(kernel: Any = kernel, verdicts: Any = verdicts) -> None:
            kernel((len(images),), (gpu_decode._WALKERS,), (data, starts, verdicts))
            cupy.cuda.get_current_stream().synchronize()

        bench.measure(f"lane: the walk alone, {name}", len(images), walk)
        print(f"{'':44} {int((verdicts != gpu_decode.SOUND).sum())} are not sound")


def in_threads(bench: Any, name: str, images: int, step: Callable[[], object], threads: int) -> None:
    """Measures `step` on `images`, twice in each of so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        bench.measure(name, 2 * threads * images, lambda: list(pool.map(lambda _: step(), range(2 * threads))))
