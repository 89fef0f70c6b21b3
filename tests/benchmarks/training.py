"""What does model preparation reach? Trains through job files, as a user does, and prints a table.

    .venv/bin/python tests/benchmarks/training.py cifar10 [--epochs 8] [--out FOLDER]
    .venv/bin/python tests/benchmarks/training.py transfer --start FOLDER/cifar10 [--seeds 3]
    .venv/bin/python tests/benchmarks/training.py distill [--seeds 3] [--shards 1]
    .venv/bin/python tests/benchmarks/training.py amp [--device cuda]

With a GPU: `cifar10 --gpus 1 --epochs 40`, `distill --gpus 1 --epochs 40`, `amp --device cuda`.

cifar10: ResNet-18 with the small-image stem from a random start, measured on the 5,000 test images, which chose nothing.
transfer: cats and dogs at 32 pixels, from a random start and from the model of `cifar10`.
distill: a ResNet-50 trained the same way, then ResNet-18 without and with it; gain in points on the test images.
amp: images a second and memory of training at 224 pixels, by precision.

Data lies where --data says. Writes tests/benchmarks/results/training-<what>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = {"size": 32, "crop_pct": 1.0}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0005, "batch_size": 128, "augment": {"crop": [0.5, 1.0]}}


def workers(args: argparse.Namespace) -> dict[str, int]:
    if args.gpus:
        return {"gpus_per_worker": 1, "loaders": max(1, (os.cpu_count() or 2) - 2)}
    return {"cpus_per_worker": args.cpus} if args.cpus else {}


def precision(args: argparse.Namespace) -> str:
    """float16 on a GPU, bfloat16 where the CPU multiplies it: there it trains 1.8 times as fast, elsewhere it is slower."""
    path = Path("/proc/cpuinfo")
    if args.gpus:
        return "float16"
    return "bfloat16" if path.exists() and re.search(r"avx512_bf16|amx_bf16", path.read_text()) else "float32"


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """`nightlabel run` of a job; what --json prints, with the seconds of the whole command."""
    path = folder / f"{job['name']}.yaml"
    path.write_text(json.dumps(job))
    since = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", str(path), "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout) | {"seconds": time.perf_counter() - since}


def finetune(folder: Path, name: str, data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return run(folder, {"kind": "finetune", "name": name, "data": data, "output": {"uri": str(folder / name)}, **fields})


def test_accuracy(folder: Path, name: str, data: Path) -> float:
    """Top-1 on CIFAR-10's test images."""
    measured = {"input": {"uri": str(data / "cifar10/test"), "format": "parquet"}, "label": "label"}
    model, out = {"uri": str(folder / name)}, {"uri": str(folder / f"{name}-report")}
    done = run(folder, {"kind": "evaluate", "name": f"{name}-test", "model": model, "data": measured, "output": out})
    return float(done["top1"])


def cifar_data(data: Path, shards: int) -> dict[str, Any]:
    uris = [str(path) for path in sorted((data / "cifar10/train").glob("*.parquet"))[:shards]]
    train = {"uri": uris, "format": "parquet"}
    return {"train": train, "validation_share": "5%", "label": "label", "classes": CIFAR10}


def cifar10(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    training = SGD | {"epochs": args.epochs, "precision": precision(args)}
    network = {"depth": 18, "stem": "small"}
    made = finetune(
        folder,
        "cifar10",
        cifar_data(args.data, args.shards),
        network=network,
        preprocessing=SMALL,
        training=training,
        workers=workers(args),
    )
    row = {"epochs": args.epochs, "validation": made["metrics"]["accuracy"], "minutes": made["seconds"] / 60}
    return [row | {"test": test_accuracy(folder, "cifar10", args.data)}]


def transfer(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.start is None:
        sys.exit("transfer wants --start, the folder of the model that `cifar10` has made")
    places = {part: {"uri": str(args.data / "cats_dogs" / part.replace("validation", "val"))} for part in ("train", "validation")}
    data = {**places, "classes": ["cat", "dog"]}
    rows = []
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for name, start in (
            ("scratch", {"network": {"stem": "small"}, "preprocessing": SMALL}),
            ("transfer", {"model": {"uri": str(args.start)}}),
        ):
            training = {"epochs": 30, "patience": 5, "precision": precision(args), "seed": seed, "augment": {"jitter": 0.2}}
            made = finetune(folder, f"{name}-{seed}", data, training=training, workers=workers(args), **start)
            row |= {name: made["metrics"]["accuracy"], f"{name}_epochs": made["metrics"]["epochs"]}
        rows.append(row | {"gain_points": 100 * (row["transfer"] - row["scratch"])})
        print(rows[-1], flush=True)
    return rows


def distill(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    data = cifar_data(args.data, args.shards)
    training = SGD | {"epochs": args.epochs, "precision": precision(args), "patience": args.epochs}
    teacher = finetune(
        folder,
        "teacher",
        data,
        network={"depth": 50, "stem": args.stem},
        preprocessing=SMALL,
        training=training,
        workers=workers(args),
    )
    at_test = test_accuracy(folder, "teacher", args.data)
    rows = []
    for seed in range(args.seeds):
        common = {
            "network": {"stem": args.stem},
            "preprocessing": SMALL,
            "training": training | {"seed": seed},
            "workers": workers(args),
        }
        finetune(folder, f"plain-{seed}", data, **common)
        job = {"kind": "distill", "name": f"distilled-{seed}", "data": data, "teacher": {"uri": str(folder / "teacher")}}
        run(folder, job | common | {"distillation": {"baseline": False}, "output": {"uri": str(folder / f"distilled-{seed}")}})
        plain, distilled = (test_accuracy(folder, f"{name}-{seed}", args.data) for name in ("plain", "distilled"))
        rows.append(
            {"seed": seed, "teacher": at_test, "plain": plain, "distilled": distilled, "gain_points": 100 * (distilled - plain)}
        )
        print(rows[-1], flush=True)
    print(f"teacher's validation accuracy {teacher['metrics']['accuracy']:.4f}, {teacher['seconds'] / 60:.1f} min")
    return rows


def amp(_: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One step of training after the other on made-up pixels: nothing but the model is measured."""
    names = ("float32", "float16", "bfloat16") if args.device == "cuda" else ("float32", "bfloat16")
    rows = [{"precision": name, **steps(name, args.device, args.steps)} for name in names]
    return [row | {"speed": row["images_per_second"] / rows[0]["images_per_second"]} for row in rows]


def steps(name: str, device: str, count: int) -> dict[str, float]:
    """Median images a second of five times `count` steps, and the most memory on a GPU."""
    import torch

    from pipeline.job.training import Random
    from pipeline.model.preprocessing import Preprocessing
    from pipeline.prepare.finetune import starting_network
    from pipeline.prepare.learner import CrossEntropy, Normalise, decay_groups

    dtype, batch, cuda = getattr(torch, name), 256 if device == "cuda" else 32, device == "cuda"
    network = starting_network(None, Random(), tuple(map(str, range(1000))), seed=0).train()
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decay_groups(network, 0.05), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    normalise, objective = Normalise(Preprocessing()).to(device), CrossEntropy(0.1)
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cifar10", "transfer", "distill", "amp"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--out", type=Path, default=Path("out/training"), help="models and job files; what is there is not trained again"
    )
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--shards", type=int, default=6, help="of CIFAR-10's six, 5,000 images each")
    parser.add_argument(
        "--stem", choices=["small", "standard"], default="small", help="of distill; standard takes a tenth of the time"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gpus", type=int, choices=[0, 1], default=0)
    parser.add_argument("--cpus", type=int, help="cores that a training uses; without it, all")
    parser.add_argument("--device", default="cpu", help="of amp")
    args = parser.parse_args()
    if args.what != "amp" and not args.data.is_dir():
        sys.exit(f"{args.data} is absent: say where cifar10/ and cats_dogs/ lie with --data")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = globals()[args.what](args.out.resolve(), args)
    for row in rows:
        print(", ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {precision(args)}",
        "command": " ".join(["tests/benchmarks/training.py", *sys.argv[1:]]),
        "rows": rows,
    }
    out = HERE / "results" / f"training-{args.what}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
