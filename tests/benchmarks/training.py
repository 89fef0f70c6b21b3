"""What does model preparation reach? Trains through job files, as a user does, and prints a table.

    .venv/bin/python tests/benchmarks/training.py cifar10 [--epochs 8] [--out FOLDER]
    .venv/bin/python tests/benchmarks/training.py transfer --start FOLDER/cifar10 [--seeds 3]
    .venv/bin/python tests/benchmarks/training.py distill [--seeds 3] [--shards 1]
    .venv/bin/python tests/benchmarks/training.py amp [--device cuda] [--batch 64] [--size 32]

With a GPU: `cifar10 --gpus 1`, `distill --gpus 1 --parallel 4 --shards 1 --teacher-shards 6`, `amp --device cuda`. On one
H100 with 16 cores `cifar10` takes 2.7 minutes by itself. Not yet tried there to its end, 5 minutes alone on the machine:
`cifar10 --gpus 1 --epochs 200 --training '{"mixup": 0, "cutmix": 1, "augment": {"crop": [1, 1], "shift": 4, "trivial": true}}'`,
and some 9 minutes with `--size 64` and a shift of 8.

cifar10: ResNet-18 with the small-image stem from a random start, measured on the 5,000 test images, which chose nothing.
transfer: cats and dogs at 32 pixels, from a random start and from the model of `cifar10`.
distill: a ResNet-50 trained the same way, then ResNet-18 without and with it; gain in points on the test images. The teacher may
have seen more images than its students, as one does that is worth asking: --teacher-shards.
amp: images a second and memory of training, by precision, at 224 pixels or those of --size.

Data lies where --data says. Writes tests/benchmarks/results/training-<what>.json, with a GPU training-<what>-gpu.json, anew with
every model that is done; logs lie beside the models. A signal ends what runs, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from training_amp import amp  # noqa: E402
from training_jobs import Bench, Rows  # noqa: E402

DATA = HERE.parents[2] / "shared" / "data"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = {"size": 32, "crop_pct": 1.0}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0005, "batch_size": 128, "augment": {"crop": [0.5, 1.0]}}
#: Where a GPU makes epochs cheap: enough of them for mixup to pay; 256 images keep it busy, and the rate grows with the batch.
SHIFTED = {"crop": [1, 1], "shift": 4, "erase": 0.5}
LONG = {"epochs": 75, "batch_size": 256, "learning_rate": 0.2, "mixup": 0.2, "augment": SHIFTED}
#: A teacher that was told to be unsure of everything has less to say (arXiv 1906.02629).
TEACHER = {"epochs": 10, "batch_size": 256, "learning_rate": 0.2, "label_smoothing": 0.0}


def workers(args: argparse.Namespace) -> dict[str, int]:
    if args.gpus:
        spare = ((os.cpu_count() or 2) - 2) // args.parallel
        return {"gpus_per_worker": 1, "loaders": max(1, spare) if args.loaders is None else args.loaders}
    return {"cpus_per_worker": args.cpus} if args.cpus else {}


def precision(args: argparse.Namespace) -> str:
    """float16 on a GPU, bfloat16 where the CPU multiplies it: there it trains 1.8 times as fast, elsewhere it is slower."""
    path = Path("/proc/cpuinfo")
    if args.gpus:
        return "float16"
    return "bfloat16" if path.exists() and re.search(r"avx512_bf16|amx_bf16", path.read_text()) else "float32"


def schedule(args: argparse.Namespace, usual: dict[str, Any]) -> dict[str, Any]:
    """Settings of a training: `usual`, with what the command line says in its place. On a GPU a twentieth of the epochs warms up,
    and none is saved by stopping before the cosine has come down."""
    asked = {"epochs": args.epochs, "batch_size": args.batch, "learning_rate": args.rate, "mixup": args.mixup}
    training = SGD | usual | {name: value for name, value in asked.items() if value is not None} | {"precision": precision(args)}
    training |= args.training
    if args.gpus:
        training |= {"warmup_epochs": max(1, training["epochs"] // 20), "patience": training["epochs"]}
    return training


def finetune(bench: Bench, name: str, data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return bench.run({"kind": "finetune", "name": name, "data": data, "output": {"uri": str(bench.folder / name)}, **fields})


def test_accuracy(bench: Bench, name: str, args: argparse.Namespace) -> float:
    """Top-1 on CIFAR-10's test images."""
    measured = {"input": {"uri": str(args.data / "cifar10/test"), "format": "parquet"}, "label": "label"}
    model, out = {"uri": str(bench.folder / name)}, {"uri": str(bench.folder / f"{name}-report")}
    job = {"kind": "evaluate", "name": f"{name}-test", "model": model, "data": measured, "output": out}
    return float(bench.run(job | ({"gpus": 1, "batch_size": 256} if args.gpus else {}))["top1"])


def cifar_data(data: Path, shards: int) -> dict[str, Any]:
    uris = [str(path) for path in sorted((data / "cifar10/train").glob("*.parquet"))[:shards]]
    train = {"uri": uris, "format": "parquet"}
    return {"train": train, "validation_share": "5%", "label": "label", "classes": CIFAR10}


def cifar10(bench: Bench, args: argparse.Namespace) -> None:
    training = schedule(args, LONG if args.gpus else {"epochs": 8})
    data, network = cifar_data(args.data, args.shards), {"depth": 18, "stem": args.stem}
    seen = SMALL | ({"size": args.size} if args.size else {})
    made = finetune(bench, "cifar10", data, network=network, preprocessing=seen, training=training, workers=workers(args))
    row = {"epochs": training["epochs"], "size": seen["size"], "validation": made["metrics"]["accuracy"]}
    bench.note("cifar10", **row, minutes=made["seconds"] / 60)
    bench.note("cifar10", test=test_accuracy(bench, "cifar10", args))


def transfer(bench: Bench, args: argparse.Namespace) -> None:
    if args.start is None:
        sys.exit("transfer wants --start, the folder of the model that `cifar10` has made")
    places = {part: {"uri": str(args.data / "cats_dogs" / part.replace("validation", "val"))} for part in ("train", "validation")}
    data = {**places, "classes": ["cat", "dog"]}
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for name, start in (
            ("scratch", {"network": {"stem": "small"}, "preprocessing": SMALL}),
            ("transfer", {"model": {"uri": str(args.start)}}),
        ):
            training = {"epochs": 30, "patience": 5, "precision": precision(args), "seed": seed, "augment": {"jitter": 0.2}}
            made = finetune(bench, f"{name}-{seed}", data, training=training, workers=workers(args), **start)
            row |= {name: made["metrics"]["accuracy"], f"{name}_epochs": made["metrics"]["epochs"]}
        bench.note(f"seed {seed}", **row, gain_points=100 * (row["transfer"] - row["scratch"]))


def distill(bench: Bench, args: argparse.Namespace) -> None:
    """The plain students beside the teacher, then those that it teaches beside one another, as far as --parallel goes."""
    bench.rows = side_by_side
    jobs = [bench.submit(teach, bench, args), *(bench.submit(student, bench, args, "plain", seed) for seed in range(args.seeds))]
    if jobs[0].exception() is None:
        jobs += [bench.submit(student, bench, args, "distilled", seed) for seed in range(args.seeds)]
        jobs.append(bench.submit(examine, bench, args))
    failed = [str(error) for job in jobs if (error := job.exception()) is not None]  # the others run to their end all the same
    if failed:
        sys.exit("\n".join(failed))


def teach(bench: Bench, args: argparse.Namespace) -> None:
    asked = argparse.Namespace(**vars(args) | {"training": {}})
    if args.gpus:
        asked.batch = asked.rate = asked.mixup = asked.epochs = None
    asked.epochs = args.teacher_epochs or asked.epochs
    training = schedule(asked, TEACHER if args.gpus else {"epochs": 8})
    data, network = cifar_data(args.data, args.teacher_shards or args.shards), {"depth": 50, "stem": args.stem}
    settings = {"training": training | {"patience": training["epochs"]}, "workers": workers(args)}
    made = finetune(bench, "teacher", data, network=network, preprocessing=SMALL, **settings)
    bench.note("teacher", **outcome(made))


def student(bench: Bench, args: argparse.Namespace, kind: str, seed: int) -> None:
    """Plain, or distilled from the teacher; trained and measured."""
    training = schedule(args, {"epochs": 24 if args.gpus else 8})
    job = {"network": {"stem": args.stem}, "preprocessing": SMALL, "workers": workers(args)}
    job["training"] = training | {"patience": training["epochs"], "seed": seed}
    name, data = f"{kind}-{seed}", cifar_data(args.data, args.shards)
    if kind == "plain":
        made = finetune(bench, name, data, **job)
    else:
        job |= {"teacher": {"uri": str(bench.folder / "teacher")}, "distillation": {"baseline": False}}
        made = bench.run({"kind": "distill", "name": name, "data": data, "output": {"uri": str(bench.folder / name)}, **job})
    bench.note(name, **outcome(made), test=test_accuracy(bench, name, args))


def examine(bench: Bench, args: argparse.Namespace) -> None:
    bench.note("teacher", test=test_accuracy(bench, "teacher", args))


def outcome(made: dict[str, Any]) -> dict[str, Any]:
    """Of a model: accuracy in validation, images that trained it, seconds of the whole command."""
    return {"validation": made["metrics"]["accuracy"], "images": made["data"]["images"]["train"], "seconds": made["seconds"]}


def side_by_side(done: dict[str, dict[str, Any]]) -> Rows:
    """A row a seed, of what is known so far."""
    tests = {name: figures["test"] for name, figures in done.items() if "test" in figures}
    rows = []
    for seed in sorted({int(name.partition("-")[2]) for name in tests if "-" in name}):
        named = {"teacher": "teacher", "plain": f"plain-{seed}", "distilled": f"distilled-{seed}"}
        row: dict[str, Any] = {"seed": seed} | {kind: tests[name] for kind, name in named.items() if name in tests}
        if {"plain", "distilled"} <= row.keys():
            row["gain_points"] = 100 * (row["distilled"] - row["plain"])
        rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cifar10", "transfer", "distill", "amp"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--out", type=Path, default=Path("out/training"), help="models and job files; what is there is not trained again"
    )
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="8; with a GPU 75 of cifar10, 24 of a student")
    parser.add_argument("--batch", type=int, help="128; with a GPU 256 of cifar10; of amp 32, with a GPU 256")
    parser.add_argument("--rate", type=float, help="highest learning rate: 0.1; with a GPU 0.2 of cifar10")
    parser.add_argument("--mixup", type=float, help="0; with a GPU 0.2 of cifar10")
    parser.add_argument("--training", type=json.loads, default={}, help="more of a job's training, as JSON")
    parser.add_argument("--shards", type=int, default=6, help="of CIFAR-10's six, 5,000 images each")
    parser.add_argument("--teacher-shards", type=int, help="what the teacher sees; without it, what its students see")
    parser.add_argument("--teacher-epochs", type=int, help="as a student's; with a GPU 10")
    parser.add_argument("--stem", choices=["small", "standard"], default="small", help="standard takes a tenth of the time")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gpus", type=int, choices=[0, 1], default=0)
    parser.add_argument("--cpus", type=int, help="cores that a training uses; without it, all")
    parser.add_argument(
        "--loaders", type=int, help="processes that augment, of each training; without it, all cores but two, split"
    )
    parser.add_argument("--parallel", type=int, default=1, help="trainings of distill side by side")
    parser.add_argument("--device", default="cpu", help="of amp")
    parser.add_argument("--size", type=int, help="pixels of an edge: 32 of cifar10, 224 of amp")
    args = parser.parse_args()
    if args.what != "amp" and not args.data.is_dir():
        sys.exit(f"{args.data} is absent: say where cifar10/ and cats_dogs/ lie with --data")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    what = args.what + "-gpu" * bool(args.gpus or args.device == "cuda")
    bench = Bench(args.out.resolve(), what, parallel=args.parallel, facts={"precision": precision(args)})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what there is gets written
    try:
        if args.what == "amp":
            for row in amp(args.device, args.steps, batch=args.batch, size=args.size or 224):
                bench.note(row["precision"], **row)
        else:
            {"cifar10": cifar10, "transfer": transfer, "distill": distill}[args.what](bench, args)
    finally:
        bench.end()
    for row in bench.table():
        print(", ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
