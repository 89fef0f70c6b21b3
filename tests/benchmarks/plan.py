"""How long and how much memory does a plan of many shards take?

    .venv/bin/python tests/benchmarks/plan.py [--shards 100000]
    .venv/bin/python tests/benchmarks/plan.py --synthetic --shards 1000000
    .venv/bin/python tests/benchmarks/plan.py --nights 1000 --shards 10000

Makes that many small tars on the local disk and times whole `nightlabel` processes: `plan` of a new output, then a plan that is
stored, then `plan` with everything known. With --synthetic nothing is made: the listings of the input and of the output are made
up, of shards of 100 MB, and what is timed is from the listing to the plan: of a new output, of one of whose units every second is
committed, and of one that is finished. With --nights that many finished runs of --shards units each are in the log, each of
another prefix, and the night after them is planned. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STORE_PLAN = """
import sys, pathlib
from pipeline.job.jobfile import load_label_job
from pipeline.start import load_model, plan_job
job = load_label_job(pathlib.Path(sys.argv[1]))
print(len(plan_job(job, load_model(job, weights=False))[1].units))
"""


def timed(command: list[str]) -> tuple[float, float, float, str]:
    """(seconds, seconds of CPU, peak MB, stdout) of a process."""
    since = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return time.perf_counter() - since, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, out


def say(shards: int, what: str, measured: tuple[float, float, float, str]) -> None:
    seconds, busy, megabytes, out = measured
    print(
        f"{shards:,} shards, {what}: {seconds:.1f} s ({busy:.1f} of a core), {megabytes:.0f} MB; {out.splitlines()[0]}",
        flush=True,
    )


def synthetic(folder: str, shards: int, night: str, state: str) -> None:
    """In a process of its own: plans `shards` made-up tars below `night`; `state` is what the output holds of them."""
    from pipeline.cut import cut
    from pipeline.disk import Disk
    from pipeline.log import Log
    from pipeline.plan import make_plan
    from pipeline.spec import Input
    from pipeline.storage import Object

    class MadeUp(Disk):
        def list(self, uri: str, *, glob: bool = True) -> Iterator[Object]:
            if uri.endswith("/data/") and state == "half":
                units = log.runs()[0].parts.column("unit").unique().to_pylist()
                return (Object(f"{uri}{unit}.parquet", 200_001, "1") for unit in units[::2])
            if uri.endswith(f"{night}/"):
                return (Object(f"{uri}{number:07d}.tar", 100_000_000, f"{number:032x}") for number in range(shards))
            return super().list(uri, glob=glob)

    store = MadeUp()
    log = Log(store, f"{folder}/out/0123456789ab")
    wanted = Input(uri=f"s3://photos/{night}/")
    listing = list(store.list(wanted.uris[0]))

    def cutter(fresh: list[Object]) -> list:
        return cut(store, wanted, fresh, tasks=2)

    plan = make_plan(log, listing, cutter, present=lambda part: True, retire=lambda unit: False)
    print(f"{len(plan.units):,} units, {len(plan.todo):,} to do")
    if state == "finish":
        store.create(log.run_key(plan.run_id or "", "manifest.json"), b"{}")


def in_a_process(folder: str, shards: int, night: str, state: str) -> tuple[float, float, float, str]:
    call = f"import plan; plan.synthetic({folder!r}, {shards}, {night!r}, {state!r})"
    return timed([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); {call}"])


def made_up(folder: str, shards: int) -> None:
    for what, state in (("nothing known", "new"), ("half committed", "half"), ("as before, then finished", "finish")):
        say(shards, f"synthetic, {what}", in_a_process(folder, shards, "all", state))
    say(shards, "synthetic, everything finished", in_a_process(folder, shards, "all", "new"))


def many_nights(folder: str, shards: int, nights: int) -> None:
    import pyarrow as pa

    from pipeline.disk import Disk
    from pipeline.log import Log, Run
    from pipeline.unit import Part, Unit

    log = Log(Disk(), f"{folder}/out/0123456789ab")
    runs = log.runs()
    for night in range(nights):
        parts = (Part(f"s3://photos/{night:05d}/{number:07d}.tar", f"{number:032x}", 100_000_000) for number in range(shards))
        run_id = log.append([Unit((part,)) for part in parts], after=runs)
        log.store.create(log.run_key(run_id or "", "manifest.json"), b"{}")
        runs = [Run(run_id or "", pa.table({}), 0, True)]
    say(shards, f"the night after {nights:,} others", in_a_process(folder, shards, "next", "new"))
    say(shards, "that night again", in_a_process(folder, shards, "next", "new"))


def on_disk(name: str, shards: int) -> None:
    from shards import picture, tar_bytes

    folder = Path(name)
    # In a process of its own: a child's peak memory counts its parent's at the fork, and torch is 1 GB.
    make = f"import pathlib, models; print(models.small_artifact(pathlib.Path({name!r})))"
    model = subprocess.check_output([sys.executable, "-c", make], text=True, cwd=HERE.parent).strip()
    tar = tar_bytes({"a.jpg": picture(1)})
    for number in range(shards):
        path = folder / "in" / f"{number // 1000:04d}" / f"{number:07d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar)
    job = folder / "job.yaml"
    places = {"input": {"uri": str(folder / "in")}, "model": {"uri": model}, "output": {"uri": str(folder / "out")}}
    job.write_text(json.dumps({"name": "plan", **places}))
    show = [sys.executable, "-m", "pipeline", "plan", str(job)]
    say(shards, "plan, nothing known", timed(show))
    say(shards, "plan and store it", timed([sys.executable, "-c", STORE_PLAN, str(job)]))
    say(shards, "plan, everything known", timed(show))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--synthetic", action="store_true", help="make nothing, make the listings up")
    parser.add_argument("--nights", type=int, default=0, help="finished runs that the log holds already")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.nights:
            many_nights(name, args.shards, args.nights)
        elif args.synthetic:
            made_up(name, args.shards)
        else:
            on_disk(name, args.shards)


if __name__ == "__main__":
    main()
