"""What a benchmark leaves in tests/benchmarks/results: its figures with the date, the machine, the command and the commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_FLAGS = re.compile(r"avx512_vnni|avx_vnni|avx512_bf16|avx512f|avx2")  # what the arithmetic of a CPU's figures depends on

_MODEL = re.compile(r"^model name\s*: (.+)$", re.MULTILINE)


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Writes `name`.json."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags, model = sorted(set(_FLAGS.findall(told))), _MODEL.search(told)
    result = {
        "date": date.today().isoformat(),
        "machine": ", ".join(
            [f"{os.cpu_count()} cores", model[1] if model else platform.machine(), *([" ".join(flags)] if flags else [])]
        ),
        "command": " ".join([f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        **figures,
    }
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str | None:
    """Of the working tree, with a mark when it was changed since; None where there is no git."""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
