"""The kernels of the GPU's decoder, built for the CPU, against the CPU's own decoder; and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import random
import re
import shutil
import subprocess
import tarfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from shards import is_decoded, picture
from test_preprocess import MAX_PIXELS, PREPROCESSINGS, encode, noise

from pipeline.engines import gpu_decode
from pipeline.errors import ModelError
from pipeline.lanes import plain
from pipeline.model.preprocessing import Preprocessing
from pipeline.preprocess import Prepare

AROUND = """
#ifndef LAUNCH
#define LAUNCH(threads, call) call
#endif
extern "C" void judge(const u8 *data, const i64 *starts, const i64 *images, i16 *room, Frame *frames, u8 *verdicts, int count) {
    for (blockIdx.x = 0; blockIdx.x < count; blockIdx.x++)
        LAUNCH(PIECES, read_scans(data, starts, images, room, frames, verdicts));
    blockIdx.x = 0;
}
extern "C" void finish(
    const i64 *images, i16 *room, Frame *frames, u8 *verdicts, const int *axes, u8 *planes, u8 *middle, u8 *out, int size,
    int count
) {
    for (blockIdx.y = 0; blockIdx.y < count; blockIdx.y++) {
        LAUNCH(3, transform_blocks(images, room, frames, planes, verdicts));
        LAUNCH(3, colour_pixels(images, planes, frames, verdicts, (u8 *)room));
        LAUNCH(3, resize_rows(images, axes, (u8 *)room, middle, size));
        LAUNCH(3, resize_columns(images, axes, middle, out, size));
    }
}
"""
# A program that decodes batches from stdin. Each array has memory of its own, exactly as long as the GPU's and no zeros, so that
# a byte beside it is seen, and one that nobody has written.
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
static std::vector<void *> all;
template <class T> static T *held(i64 count, i64 read = 0) {
    T *one = (T *)malloc(count * sizeof(T));
    all.push_back(one);
    memset(one, 0xA5, count * sizeof(T));
    if ((i64)fread(one, sizeof(T), read, stdin) != read) exit(3);
    return one;
}
int main() {
    i64 of[6];  // images, bytes, numbers of the axes, pixels, bytes of `middle`, edge of a crop
    while (fread(of, 8, 6, stdin) == 6) {
        u8 *data = held<u8>(of[1] + 8, of[1]);
        i64 *starts = held<i64>(of[0] + 1, of[0] + 1), *images = held<i64>(FIELDS * of[0], FIELDS * of[0]);
        int *axes = held<int>(of[2], of[2]);
        i16 *room = held<i16>(3 * of[3]);
        Frame *frames = held<Frame>(of[0]);
        u8 *verdicts = held<u8>(of[0]), *planes = held<u8>(3 * of[3]), *middle = held<u8>(of[4]);
        u8 *out = held<u8>(of[0] * 3 * of[5] * of[5]);
        judge(data, starts, images, room, frames, verdicts, (int)of[0]);
        finish(images, room, frames, verdicts, axes, planes, middle, out, (int)of[5], (int)of[0]);
        fwrite(verdicts, 1, of[0], stdout);
        fwrite(out, 1, of[0] * 3 * of[5] * of[5], stdout);
        for (void *each : all) free(each);
        all.clear();
    }
}
"""
# What makes the threads of a block threads: in place of jpeg.cu's own lines for one after the other.
THREADS = """
#define __CUDACC__
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
struct Place { int x, y; };
static Place blockIdx, blockDim = {1, 1}, gridDim = {1, 1};
static thread_local Place threadIdx;
static int __syncthreads_or(int one) {
    static std::mutex lock;
    static std::condition_variable all_there;
    static int there, turn, any, last;
    std::unique_lock<std::mutex> held(lock);
    int now = turn;
    any |= one;
    if (++there == blockDim.x) {
        last = any;
        any = there = 0;
        turn += 1;
        all_there.notify_all();
    }
    all_there.wait(held, [&] { return turn != now; });
    return last;
}
static void __syncthreads() { __syncthreads_or(0); }
template <class Kernel> static void launch(int threads, Kernel kernel) {
    std::vector<std::thread> all;
    blockDim.x = threads;
    for (int i = 0; i < threads; i++) all.emplace_back([=] { threadIdx = {i, 0}; kernel(); });
    for (std::thread &each : all) each.join();
}
#define LAUNCH(threads, call) launch(threads, [=] { call; })
"""
FRAME = re.compile(rb"\xff[\xc0-\xc2]\0[\x0b\x11]\x08(..)(..)", re.DOTALL)
SOUND, ODD = 0, 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as plain C++, one thread that does all blocks."""
    return build(tmp_path_factory.mktemp("jpeg"))


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same, and every scan is walked from its first bit to its last."""
    return build(tmp_path_factory.mktemp("jpeg"), "-DPIECES=1")


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    (folder / "jpeg.cpp").write_text(gpu_decode.source() + AROUND)
    command = [compiler, "-O2", "-shared", "-fPIC", *flags, "-o", str(folder / "jpeg.so"), str(folder / "jpeg.cpp")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "jpeg.so"))


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of them that ends at a byte beside an array, a number that overflows, or a word that is not aligned."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ftrivial-auto-var-init=pattern")
    return sanitized(tmp_path_factory.mktemp("careful"), "", *flags)


@pytest.fixture(scope="module")
def threaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them whose blocks have as many threads as on a GPU, that ends where two meet at a place without waiting."""
    return sanitized(tmp_path_factory.mktemp("threaded"), THREADS, "-fsanitize=thread", "-DPIECES=16")


def sanitized(folder: Path, before: str, *flags: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    command = [compiler or "", "-O1", "-g", "-w", "-pthread", *flags, "-o"]
    (folder / "nothing.cpp").write_text("int main() {}")
    (folder / "jpeg.cpp").write_text(before + gpu_decode.source() + AROUND + PROGRAM)
    if compiler is None or not comes_to_run(command, folder / "nothing"):
        pytest.skip("no C++ compiler that has this sanitizer is installed")
    assert comes_to_run(command, folder / "jpeg")
    return folder / "jpeg"


def comes_to_run(command: list[str], program: Path) -> bool:
    steps = ([*command, str(program), f"{program}.cpp"], [str(program)])
    return all(subprocess.run(step, stdin=subprocess.DEVNULL, check=False).returncode == 0 for step in steps)


def decoded_by(
    program: Path, images: list[bytes], sizes: list[tuple[int, int]], preprocessing: Preprocessing
) -> list[bytes | None]:
    """The crop of each of these that is sound; a batch for each."""
    sent = b""
    for image, size in zip(images, sizes, strict=True):
        plan, axes, needed = gpu_decode.plan_crops(np.array([size]), preprocessing)
        pixels = int(gpu_decode._padded(np.array([size])).sum())
        numbers = np.array([1, len(image), len(axes), pixels, needed, preprocessing.size, 0, len(image)])
        sent += numbers[:6].tobytes() + image + numbers[6:].tobytes() + plan.tobytes() + axes.tobytes()
    done = subprocess.run([str(program)], input=sent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    came = np.frombuffer(done.stdout, np.uint8).reshape(len(images), -1)
    return [None if verdict else crop.tobytes() for verdict, crop in zip(came[:, 0], came[:, 1:], strict=True)]


def addresses(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]


def judged(built: ctypes.CDLL, images: list[bytes], plan: np.ndarray) -> tuple[np.ndarray, ...]:
    """What is left in the room for coefficients, the frames, and the verdicts."""
    padded = (-(-plan[:, :2] // 16) * 16).prod(axis=1)
    data = np.frombuffer(b"".join(images) + bytes(8), np.uint8)  # whole words are read
    room, frames, verdicts = (
        np.empty(6 * padded.sum(), np.uint8),
        np.empty(gpu_decode._FRAME * len(images), np.uint8),
        np.empty(len(images), np.uint8),
    )
    built.judge(*addresses(data, np.cumsum([0, *map(len, images)]), plan, room, frames, verdicts), len(images))
    return room, frames, verdicts


def verdict(built: ctypes.CDLL, data: bytes) -> int:
    frame = FRAME.search(data)
    height, width = (int.from_bytes(side, "big") for side in frame.groups()) if frame else (8, 8)
    if not 0 < width * height < 2**24:
        return ODD  # nobody would ask
    return int(judged(built, [data], np.array([[width, height, *[0] * 8]]))[2][0])


def decoded(
    built: ctypes.CDLL, images: list[bytes], sizes: np.ndarray, preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """(crops, verdicts) of images of these widths and heights."""
    plan, axes, needed = gpu_decode.plan_crops(sizes, preprocessing)
    room, frames, verdicts = judged(built, images, plan)
    out = np.empty((len(images), 3, preprocessing.size, preprocessing.size), np.uint8)
    arrays = (plan, room, frames, verdicts, axes, np.empty(len(room) // 2, np.uint8), np.empty(needed, np.uint8), out)
    built.finish(*addresses(*arrays), preprocessing.size, len(images))
    return out, verdicts


def scan(data: bytes) -> int:
    return data.rfind(b"\xff\xda") + 14


def middle(data: bytes) -> int:
    return (scan(data) + len(data)) // 2


def flipped(data: bytes, rng: random.Random, low: int, high: int) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def replaced(data: bytes, what: bytes, skip: int | None = None) -> bytes:
    at = middle(data)
    return data[:at] + what + data[at + (len(what) if skip is None else skip) :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda data, rng: data[: rng.randrange(4, len(data))],
    "cut, then an end": lambda data, rng: data[: rng.randrange(scan(data), len(data) - 8)] + b"\xff\xd9",
    "the end is gone": lambda data, _: data[:-2],
    "zeros at the end": lambda data, _: data[: middle(data)] + bytes(len(data) - middle(data) - 2) + b"\xff\xd9",
    "a hole": lambda data, _: replaced(data, bytes(64)),
    "a noisy hole": lambda data, rng: replaced(data, rng.randbytes(64)),
    "a piece is missing": lambda data, _: replaced(data, b"", 30),
    "a piece twice": lambda data, _: replaced(data, data[middle(data) : middle(data) + 30], 0),
    "a restart": lambda data, _: replaced(data, b"\xff\xd0"),
    "a frame": lambda data, _: replaced(data, b"\xff\xc0"),
    "an early end": lambda data, _: replaced(data, b"\xff\xd9", 0),
    "a bit": lambda data, rng: flipped(data, rng, scan(data), len(data) - 2),
    "a bit of the header": lambda data, rng: flipped(data, rng, 2, scan(data)),
}


def photographs() -> list[bytes]:
    kinds = ({}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3}, {"optimize": True}, {"quality": 20})
    pictures = [Image.open(io.BytesIO(picture(number, size=(90 + number, 70)))) for number in range(3)]
    rough = [Image.fromarray(noise(64, 49, number)) for number in range(2)]
    grey = [image.convert("L") for image in (pictures[0], rough[0])]
    return [encode(image, "JPEG", **kind) for image in (*pictures, *rough, *grey) for kind in kinds]


def test_whole_files_are_sound(built: ctypes.CDLL) -> None:
    assert [verdict(built, data) for data in photographs()] == [0] * 42


@pytest.mark.parametrize("kind", DAMAGE)
def test_sound_is_what_the_decoder_finds_whole(built: ctypes.CDLL, kind: str) -> None:
    rng, refused = random.Random(kind), 0
    for data in photographs() * 8:
        broken = DAMAGE[kind](data, rng)
        if not is_decoded(broken):
            refused += 1
            assert verdict(built, broken) != 0, broken
    assert refused or kind == "a bit"


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_pieces_of_a_scan_come_to_what_it_is(built: ctypes.CDLL, in_one_piece: ctypes.CDLL, kind: str) -> None:
    rng = random.Random(kind)
    kinds = ({}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}, {"quality": 30, "subsampling": 0}, {"quality": 100})
    rough = [encode(Image.fromarray(noise(400, 301, number)), "JPEG", **each) for number in range(2) for each in kinds]
    flat = [encode(Image.new("RGB", (3000, 1500), (40, 90, 200)), "JPEG", **each) for each in kinds]
    for data in rough + flat:
        assert verdict(built, data) == 0
        for broken in (DAMAGE[kind](data, rng) for _ in range(4)):
            assert (verdict(built, broken) == 0) == (verdict(in_one_piece, broken) == 0)


def test_what_is_not_plain_is_odd(built: ctypes.CDLL) -> None:
    image = Image.fromarray(noise(40, 30))
    inks = image.convert("CMYK")
    for data in (encode(image, "JPEG", progressive=True), encode(inks, "JPEG"), encode(image), b"\xff\xd8"):
        assert verdict(built, data) == 1
        assert plain(memoryview(data), Preprocessing(), MAX_PIXELS) is None


def handmade(
    scan: bytes, size: tuple[int, int] = (160, 160), restart: int = 0, quantizer: int = 1, **codes: dict[int, int]
) -> bytes:
    """A JPEG in 4:4:4 with a scan of one's own. `dc` and `ac`: of one code, the lowest of its length, its symbol, by length."""
    tables = b""
    for kind, name in ((0, "dc"), (16, "ac")):
        of = codes[name]
        body = bytes([kind, *(length in of for length in range(1, 17)), *(of[length] for length in sorted(of))])
        tables += b"\xff\xc4" + (2 + len(body)).to_bytes(2, "big") + body
    frame = b"".join(side.to_bytes(2, "big") for side in reversed(size)) + b"\3\1\x11\0\2\x11\0\3\x11\0"
    head = b"\xff\xd8\xff\xdb\0\x43\0" + bytes([quantizer] * 64) + b"\xff\xc0\0\x11\x08" + frame + tables
    head += b"\xff\xdd\0\4" + restart.to_bytes(2, "big") + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0"
    return head + scan + b"\xff\xd9"


#: What walks badly. Where nothing else is said each byte is a symbol and its value, so no reader falls in with the blocks.
STEPS = np.random.default_rng(0).integers(0, 16, 400 * 3 * 64, dtype=np.uint8).tobytes()
EVEN: dict[str, dict[int, int]] = {"dc": {4: 4}, "ac": {4: 4}}
#: Blocks of the greatest numbers that there are codes for, of a bit each.
GREATEST = int(("0" + "1" * 11 + ("0" + "1" * 10) * 63) * 1200, 2).to_bytes(105_750).replace(b"\xff", b"\xff\0")
HANDMADE = {
    "never in step": handmade(STEPS, **EVEN),
    "never in step, and a byte short": handmade(STEPS[1:], **EVEN),
    "never in step, and more": handmade(STEPS + STEPS[:64], **EVEN),
    "a bad code is cut, and the next piece begins there": handmade(
        bytes(4500) + b"\xff\xd3" + bytes(4500), dc={2: 0}, ac={1: 0x31}
    ),
    "no scan": handmade(b"", **EVEN),
    "no scan, and restarts": handmade(b"", restart=3, **EVEN),
    "markers alone": handmade(b"\xff\xd0" * 5000, **EVEN),
    "restarts alone": handmade(b"".join(bytes([255, 0xD0 + i % 8]) for i in range(399)), restart=1, **EVEN),
    "fill bytes alone": handmade(b"\xff" * 20_000, **EVEN),
    "stuffed bytes alone": handmade(b"\xff\0" * 10_000, **EVEN),
    "one interval of all": handmade(STEPS, restart=65535, **EVEN),
    "the largest sums": handmade(GREATEST, quantizer=255, dc={1: 11}, ac={1: 10}),
}


def harmed() -> list[bytes]:
    rng, sound = random.Random(0), photographs()
    files = [make(data, rng) for data in sound[::4] for make in DAMAGE.values()] + sound[::3] + list(HANDMADE.values())
    small = encode(Image.fromarray(noise(21, 18)), "JPEG", restart_marker_blocks=1)
    files += [small[:end] for end in range(len(small))]
    files += [small[:at] + bytes([at % 2 * 255]) + small[at + 1 :] for at in range(scan(small))]
    return files


def asked(data: bytes) -> tuple[int, int]:
    """What the host would be told of its width and height, or anything."""
    frame = FRAME.search(data)
    height, width = (int.from_bytes(side, "big") for side in frame.groups()) if frame else (8, 8)
    return (width, height) if 0 < width * height < 2**20 else (8, 8)


def agree(program: Path, built: ctypes.CDLL, files: list[bytes]) -> None:
    sizes, preprocessing = [asked(data) for data in files], Preprocessing(size=16)
    for data, size, crop in zip(files, sizes, decoded_by(program, files, sizes, preprocessing), strict=True):
        expected, verdicts = decoded(built, [data], np.array([size]), preprocessing)
        assert crop == (None if verdicts[0] else expected[0].tobytes())


def test_nothing_beside_an_array_is_touched(careful: Path, built: ctypes.CDLL) -> None:
    agree(careful, built, harmed())


def test_the_threads_of_a_block_wait_for_each_other(threaded: Path, built: ctypes.CDLL) -> None:
    rng = random.Random(1)
    rough = [encode(Image.fromarray(noise(130, 95, kind)), "JPEG", subsampling=kind) for kind in range(3)]
    files = [*rough, encode(Image.fromarray(noise(60, 50)), "JPEG", restart_marker_blocks=3), *list(HANDMADE.values())[:4]]
    files += [make(rough[row % 3], rng) for row, make in enumerate(DAMAGE.values())]
    agree(threaded, built, files)


@pytest.mark.parametrize("kind", HANDMADE)
def test_a_scan_that_walks_badly_has_the_crop_of_the_cpu_or_none(built: ctypes.CDLL, kind: str) -> None:
    data = HANDMADE[kind]
    assert plain(memoryview(data), Preprocessing(), MAX_PIXELS) == (160, 160)
    crops, verdicts = decoded(built, [data], np.array([[160, 160]]), Preprocessing())
    assert (verdicts[0] == SOUND) == (kind in ("never in step", "one interval of all"))
    if verdicts[0] == SOUND:
        np.testing.assert_array_equal(crops[0], Prepare(Preprocessing(), MAX_PIXELS)(data)[0])


def test_the_corpora(built: ctypes.CDLL, shared_data: Path) -> None:
    images = []
    for path in sorted((shared_data / "photos").glob("*.tar")) + sorted((shared_data / "bad_images").glob("*.tar.xz")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.isfile()]
    sizes = [plain(memoryview(data), Preprocessing(), MAX_PIXELS) for data in images]
    sound = 0
    for data, size in zip(images, sizes, strict=True):
        if size is None:
            continue
        crops, verdicts = decoded(built, [data], np.array([size]), Preprocessing())
        if verdicts[0] == SOUND:
            sound += 1
            np.testing.assert_array_equal(crops[0], Prepare(Preprocessing(), MAX_PIXELS)(data)[0])
    assert sound > 350


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_it_is_cuda(chip: str) -> None:
    package = importlib.util.find_spec("nvidia")
    found = [
        path for folder in (package and package.submodule_search_locations) or [] for path in Path(folder).rglob("libnvrtc.so.*")
    ]
    if not found:
        pytest.skip("no NVRTC is installed: it comes with torch for CUDA")
    compiler, program = ctypes.CDLL(str(found[0])), ctypes.c_void_p()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), gpu_decode.source().encode(), b"jpeg.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={chip}".encode())
    failed, size = compiler.nvrtcCompileProgram(program, 1, options), ctypes.c_size_t()
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    said = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, said)
    assert not failed, said.value.decode()


@pytest.mark.parametrize("subsampling", [0, 1, 2, None], ids=["4:4:4", "4:2:2", "4:2:0", "grey"])
@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_crops_have_the_bytes_of_the_cpu(built: ctypes.CDLL, name: str, subsampling: int | None) -> None:
    preprocessing = PREPROCESSINGS[name]
    sizes = [
        (500, 375),
        (375, 500),
        (333, 501),
        (224, 224),
        (340, 256),
        (257, 255),
        (17, 20),
        (16, 16),
        (8, 9),
        (5, 7),
        (1500, 1000),
        (900, 300),
    ]
    kinds = ({}, {"quality": 20}, {"optimize": True}, {"quality": 100}, {"restart_marker_blocks": 7}, {"restart_marker_rows": 1})
    images = [Image.fromarray(noise(*size, seed)) for seed, size in enumerate(sizes)]
    images += [Image.fromarray((noise(500, 375, seed) > 128).astype(np.uint8) * 255) for seed in (1, 2)]  # as hard as edges get
    images += [Image.open(io.BytesIO(picture(number, size=(640, 427)))) for number in range(3)]
    images = [image.convert("L") for image in images] if subsampling is None else images
    files = [
        encode(image, "JPEG", subsampling=row % 4 - 1 if subsampling is None else subsampling, **kinds[row % len(kinds)])
        for row, image in enumerate(images)
    ]
    crops, verdicts = decoded(built, files, np.array([image.size for image in images]), preprocessing)
    assert verdicts.tolist() == [SOUND] * len(files)
    prepare = Prepare(preprocessing, MAX_PIXELS)
    for row, data in enumerate(files):
        np.testing.assert_array_equal(crops[row], prepare(data)[0], err_msg=str(images[row].size))


@pytest.fixture(scope="module")
def on_gpu() -> gpu_decode.GpuDecoder:
    pytest.importorskip("cupy")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return gpu_decode.GpuDecoder(Preprocessing())


def test_a_gpu_has_the_crops_of_the_cpu_and_vouches_for_nothing_broken(on_gpu: gpu_decode.GpuDecoder) -> None:
    kinds = ({}, {"restart_marker_blocks": 5}, {"optimize": True})
    whole = [
        encode(Image.fromarray(noise(300 + 17 * row, 261, row)), "JPEG", subsampling=row % 3, **kinds[row // 3 % 3])
        for row in range(30)
    ]
    rng = random.Random(0)
    broken = [make(data, rng) for data in whole for make in DAMAGE.values()]
    data, sizes = [], []
    for image in (*whole, *broken):
        size = plain(memoryview(image), Preprocessing(), MAX_PIXELS)
        if size is not None:
            data.append(image)
            sizes.append(size)
    encoded = pa.chunked_array([data[:7], [], data[7:]], pa.large_binary())
    there, vouched = on_gpu(encoded.slice(0, len(data)), np.array(sizes))
    pixels = there.cpu().numpy()
    assert vouched[:30].all()
    assert len(pixels) == vouched.sum()
    assert all(is_decoded(image) for image, ok in zip(data, vouched, strict=True) if ok)
    prepare = Prepare(Preprocessing(), MAX_PIXELS)
    for row in range(30):
        np.testing.assert_array_equal(pixels[row], prepare(whole[row])[0])


@pytest.fixture
def without_gpu() -> gpu_decode.GpuDecoder:
    """One whose `_some` is a test's, of 512 pixels at a time."""
    import torch

    decoder, pool = gpu_decode.GpuDecoder.__new__(gpu_decode.GpuDecoder), SimpleNamespace(free_all_blocks=lambda: None)
    memory = SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=MemoryError))
    decoder._cupy = SimpleNamespace(cuda=memory, get_default_memory_pool=lambda: pool)
    decoder._torch, decoder._most = torch, 512
    return decoder


def test_what_a_group_is_copied_from_stays_until_all_are_there(without_gpu: gpu_decode.GpuDecoder) -> None:
    import torch

    seen = list[weakref.ref[torch.Tensor]]()

    def some(_: pa.ChunkedArray, sizes: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        assert all(crops() is not None for crops in seen)  # else the next group's memory is theirs
        crops = torch.full((len(sizes), 3, 2, 2), len(seen), dtype=torch.uint8)
        seen.append(weakref.ref(crops))
        return crops, np.arange(len(sizes)) != 1

    without_gpu._some = some
    pixels, ok = without_gpu(pa.chunked_array([[b"x"] * 5], pa.large_binary()), np.full((5, 2), 16))
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert ok.tolist() == [True, False, True, False, True]


def test_memory_that_runs_out_for_torch_is_as_the_decoders_own(without_gpu: gpu_decode.GpuDecoder) -> None:
    import torch

    def some(_: pa.ChunkedArray, sizes: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        if len(sizes) > 1:
            raise torch.OutOfMemoryError
        return torch.zeros((1, 3, 2, 2), dtype=torch.uint8), np.ones(1, bool)

    without_gpu._some = some
    pixels, ok = without_gpu(pa.chunked_array([[b"x"] * 5], pa.large_binary()), np.full((5, 2), 16))
    assert (len(pixels), ok.all(), without_gpu._most) == (5, True, 256)


def test_a_gpu_keeps_the_crops_of_a_group_while_it_decodes_the_next(on_gpu: gpu_decode.GpuDecoder) -> None:
    import torch

    images = [encode(Image.fromarray(noise(400, 304, row)), "JPEG") for row in range(24)]
    broken = [data if row % 3 else replaced(data, bytes(64)) for row, data in enumerate(images)]
    block = pa.chunked_array([broken], pa.large_binary()), np.array([[400, 304]] * 24)
    before, done = on_gpu._most, Event()

    def busy() -> None:  # as the model is in another thread, on the stream that torch copies on
        while not done.is_set():
            torch.cuda._sleep(10**7)
            torch.cuda.synchronize()

    other = Thread(target=busy)
    other.start()
    try:
        on_gpu._most = 4 * 400 * 304
        there, vouched = on_gpu(*block)
        pixels = there.cpu().numpy()
    finally:
        done.set()
        other.join()
        on_gpu._most = before
    prepare, rows = Prepare(Preprocessing(), MAX_PIXELS), np.flatnonzero(vouched).tolist()
    assert set(rows) >= {row for row in range(24) if row % 3}
    for crop, row in zip(pixels, rows, strict=True):
        np.testing.assert_array_equal(crop, prepare(broken[row])[0])


def test_threads_share_a_gpu(on_gpu: gpu_decode.GpuDecoder) -> None:
    blocks = []
    for block in range(6):
        images = [encode(Image.fromarray(noise(200 + 10 * block, 150, row)), "JPEG") for row in range(20)]
        blocks.append((pa.chunked_array([images], pa.large_binary()), np.array([[200 + 10 * block, 150]] * 20)))
    alone = [on_gpu(*block)[0].cpu().numpy() for block in blocks]
    with ThreadPoolExecutor(3) as pool:
        together = [pixels.cpu().numpy() for pixels, _ in pool.map(lambda block: on_gpu(*block), blocks)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_gpu_whose_memory_runs_out_decodes_fewer_at_a_time(on_gpu: gpu_decode.GpuDecoder) -> None:
    import cupy

    images = [encode(Image.fromarray(noise(400, 304, row)), "JPEG") for row in range(40)]
    block = pa.chunked_array([images], pa.large_binary()), np.array([[400, 304]] * 40)
    expected, pool, before = on_gpu(*block)[0].cpu().numpy(), cupy.get_default_memory_pool(), on_gpu._most
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.used_bytes() + 30 * 400 * 304 * 9)
        np.testing.assert_array_equal(on_gpu(*block)[0].cpu().numpy(), expected)
        assert on_gpu._most < 40 * 400 * 304
        pool.free_all_blocks()  # what it keeps it may give again, whatever the limit
        pool.set_limit(size=pool.used_bytes() + 2**16)
        with pytest.raises(ModelError, match="no memory for an image of 400 × 304"):
            on_gpu(block[0].slice(0, 1), block[1][:1])
    finally:
        pool.set_limit(size=0)
        on_gpu._most = before
