"""What the benchmarks share: tables, medians, and jobs under mpirun."""

from __future__ import annotations

import json
import os
import platform
import random
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
    """``1.1: met``, beside the value."""
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
        done = subprocess.run(
            [sys.executable, "-m", "disagg_mpi", "launch", "-n", str(num_ranks), "--", "python",
             str(HERE / script), *arguments, str(target)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{script} {' '.join(arguments)}:\n{done.stderr}")
        return json.loads(target.read_text())


def size_of(num_bytes: float) -> str:
    """``45 MiB``; two digits where it is small."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= 0.95 * factor:
            value = num_bytes / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def time_of(seconds: float) -> str:
    """``1.26 ms``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.{3 if seconds < 1e-3 else 2 if seconds < 0.1 else 0}f} ms"


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Tokens of any of the models here, equal to no other seed's."""
    chooser = random.Random(seed)
    return [chooser.randrange(100, 8000) for _ in range(num_tokens)]
