"""What the benchmarks share: tables, medians, and jobs under mpirun."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """A Markdown section with a table."""
    lines = [f"### {title}", ""]
    if note:
        lines += [note, ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def verdict(value: float, aim: float, *, at_most: bool = False) -> str:
    """``1.32 (aim 1.1: met)``."""
    met = value <= aim if at_most else value >= aim
    return f"{aim:g}: {'met' if met else 'missed'}"


def machine() -> str:
    """The machine and the libraries, in a line."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    libraries = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "mpi4py"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, Python {platform.python_version()}, {libraries}"


def run_under_mpi(num_ranks: int, script: str, *arguments: str) -> Any:
    """Run ``benchmarks/<script>`` as a job; what its rank 0 wrote to the file named last, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, "-m", "disagg_mpi", "launch", "-n", str(num_ranks), "--", "python",
             str(HERE / script), *arguments, str(target)],
            check=True, stdout=subprocess.DEVNULL)
        return json.loads(target.read_text())
