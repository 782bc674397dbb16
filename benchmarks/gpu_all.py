"""``make gpu-bench``: every table about GPUs, with the machine and the commands above them.

    python benchmarks/gpu_all.py [PART…] [--folder FOLDER] [--trace FILE]     engine, handover, pays
    python benchmarks/gpu_all.py handover pays --gpus 0,1                     two GPUs or more, not shared
    python benchmarks/gpu_all.py --check                                      whether there is a GPU, no more

Each part is a command that can be typed alone, ends by itself, and costs only its own tables if it fails.
With --folder the output and the figures (JSON) are also kept there, while they are measured.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # as it lies here, installed or not

# --check runs on any Python, before anything is installed.
from gpu_common import gpu_in_words, need_gpus  # noqa: E402 - after its path

PARTS = ("engine", "handover", "pays")


@dataclass
class Step:
    part: str
    words: list[str]
    """After the Python that runs this."""
    limit: int
    """Seconds; what takes longer is ended."""


def steps(parts: list[str], folder: Path | None, trace: Path | None, emulated: bool,
          gpus: list[str]) -> list[Step]:
    def script(name: str) -> str:
        path = HERE / f"gpu_{name}.py"
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

    def kept(name: str) -> list[str]:
        return [] if folder is None else ["--json", str(folder / f"{name}.json")]

    launch = ["-m", "disagg_mpi", "launch", "-n", "2"]
    small = ["--device", "emulated", "--tiny"] if emulated else []
    moved = ["--device", "cpu", "--size", "16MiB"] if emulated else ["--device", "cuda", "--busy"]
    spread, ends = ["--gpus", ",".join(gpus)], ",".join((gpus * 2)[:2])
    every = {
        "engine": [Step("engine", [script("engine"), "--profile", *small, *kept("engine")], 900)],
        "handover": [Step("handover", [*launch, *mps, "--", script("handover"), *moved, "--gpus", ends], 300)
                     for mps in ([[], ["--mps"]] if len(gpus) == 1 else [[]])],
        "pays": [Step("pays", [script("pays"), *small, *spread, *kept("pays")], 1200)],
    }
    if len(gpus) > 1:
        # One instance on all: its time between tokens, alone, against the floor of generation steps.
        every["pays"].append(Step("pays", [
            script("pays"), *small, *spread, "--tp", str(len(gpus)), "--layouts", "aggregated", "--chunks",
            "2048", "--streams", "1,32", *kept("tp")], 600))
    if trace is not None:
        every["pays"].append(Step(
            "pays", [script("pays"), *small, *spread, "--trace", str(trace), *kept("trace")], 1200))
    return [step for part in parts for step in every[part]]


def run(step: Step, log: Path | None) -> str:
    """Show what it prints as it comes; what went wrong, if anything did."""
    command = [sys.executable, *step.words]
    head = f"\n## {step.part}\n\n`{shlex.join(['python', *step.words])}`\n"
    print(head, flush=True)
    if log is not None:
        with log.open("a") as file:
            print(head, file=file)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    shown = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE) if log is not None else None
    start = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path},
                               stdout=shown.stdin if shown is not None else None)
    try:
        code: int | None = process.wait(step.limit)
    except subprocess.TimeoutExpired:
        code = None
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        if shown is not None and shown.stdin is not None:
            shown.stdin.close()
            shown.wait()
    print(f"\n{step.part}: {time.monotonic() - start:.0f} s", flush=True)
    if code == 0:
        return ""
    return f"exit code {code}" if code is not None else f"ended after {step.limit} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--folder", type=Path, help="keep output and figures there")
    parser.add_argument("--gpus", default="0", metavar="ID,ID", help="of handover and pays; default 0")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay it too: see gpu_pays.py")
    parser.add_argument("--emulated", action="store_true",
                        help="a smoke test of all of it without a GPU; no figure means anything")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"{', '.join(unknown)}: parts are {', '.join(PARTS)}")
    if not options.emulated:
        need_gpus()
    if options.check:
        print(gpu_in_words())
        return
    from common import machine

    log = None
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        log = options.folder / "tables.md"
    head = (f"# On GPUs, {date.today().isoformat()}\n\n{'emulated' if options.emulated else gpu_in_words()}; "
            f"{machine()}\n")
    print(head, flush=True)
    if log is not None:
        log.write_text(head + "\n")
    failed = []
    for step in steps(options.parts or list(PARTS), options.folder, options.trace, options.emulated,
                      options.gpus.split(",")):
        problem = run(step, log)
        if problem:
            failed.append(f"{step.part}: {problem}: {shlex.join(['python', *step.words])}")
    for line in failed:
        print(f"**{line}**", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
