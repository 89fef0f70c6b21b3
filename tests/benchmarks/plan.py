"""How long and how much memory does a plan of many shards take?

    .venv/bin/python tests/benchmarks/plan.py [--shards 100000]

Makes that many small tars on the local disk and times whole `nightlabel` processes: `plan` of a new output, then a plan that is
stored, then `plan` with everything known. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STORE_PLAN = """
import sys, pathlib
from pipeline.jobfile import load_label_job
from pipeline.start import load_model, plan_job
job = load_label_job(pathlib.Path(sys.argv[1]))
print(len(plan_job(job, load_model(job, weights=False))[1].units))
"""


def timed(command: list[str]) -> tuple[float, float, str]:
    """(seconds, peak MB, stdout) of a process."""
    since = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return time.perf_counter() - since, usage.ru_maxrss / 1024, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    args = parser.parse_args()
    from shards import picture, tar_bytes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory counts its parent's at the fork, and torch is 1 GB.
        make = f"import pathlib, models; print(models.small_artifact(pathlib.Path({name!r})))"
        model = subprocess.check_output([sys.executable, "-c", make], text=True, cwd=HERE.parent).strip()
        tar = tar_bytes({"a.jpg": picture(1)})
        for number in range(args.shards):
            path = folder / "in" / f"{number // 1000:04d}" / f"{number:07d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar)
        job = folder / "job.yaml"
        places = {"input": {"uri": str(folder / "in")}, "model": {"uri": model}, "output": {"uri": str(folder / "out")}}
        job.write_text(json.dumps({"name": "plan", **places}))
        show = [sys.executable, "-m", "pipeline", "plan", str(job)]
        for what, command in (
            ("plan, nothing known", show),
            ("plan and store it", [sys.executable, "-c", STORE_PLAN, str(job)]),
            ("plan, everything known", show),
        ):
            seconds, megabytes, out = timed(command)
            print(f"{args.shards:,} shards, {what}: {seconds:.1f} s, {megabytes:.0f} MB; {out.splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
