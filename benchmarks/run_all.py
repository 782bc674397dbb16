"""``make bench``: every figure of docs/benchmarks.md, side by side in one run.

    python benchmarks/run_all.py [--write docs/benchmarks.md] [engine] [handover] [rank0] [start]
"""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

from common import HERE, machine, run_under_mpi, table, verdict

PARTS = ("engine", "handover", "rank0", "start")


def engine() -> str:
    from disagg_mpi.model.fetch import fetch_default_model

    model = fetch_default_model()
    # A process of its own: thread settings must come before torch.
    return subprocess.run([sys.executable, str(HERE / "engine.py"), str(model)], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def handover() -> str:
    rows = []
    for row in run_under_mpi(3, "handover.py"):
        size = f"{row['bytes'] / 2**20:.0f} MiB"
        if row["way"] == "mpi":
            rows.append(["MPI messages", row["case"], size, f"{row['seconds'] * 1e3:.2f} ms",
                         f"{row['bytes'] / row['seconds'] / 1e9:.1f} GB/s", f"{row['ratio']:.2f}",
                         verdict(row["ratio"], 0.8)])
        else:
            rows.append(["shared pool", row["case"], f"0 bytes of {size}", f"{row['seconds'] * 1e3:.3f} ms",
                         "", f"{row['ratio']:.0f}", "0 bytes: met"])
    return table("Hand-over on one host, against one memory copy of the same bytes",
                 ["way", "payload", "moved", "median", "rate", "copy's time / its time", "aim"], rows)


def rank0() -> str:
    rows = []
    for row in run_under_mpi(2, "rank0.py", "tokens"):
        rate = row["tokens"] / row["cpu_seconds"]
        name = "streamed to the caller" if row["streaming"] else "results at the end"
        rows.append([f"tokens through rank 0, {name}", f"{rate:,.0f} a CPU second "
                     f"({row['tokens'] / row['seconds']:,.0f} a second)", verdict(rate, 100_000)])
    found = run_under_mpi(3, "rank0.py", "idle")
    worst = max(found["cpu_share"]) * 100
    rows.append(["CPU of an idle rank (the busiest of 3)", f"{worst:.2f} % of a core",
                 verdict(worst, 2.0, at_most=True)])
    wait = found["first_token_seconds"] * 1e3
    rows.append(["request to first token, all ranks asleep before (null engine)",
                 f"{wait:.2f} ms (worst of 20: {found['worst'] * 1e3:.2f})",
                 verdict(wait, 2.0, at_most=True)])
    return table("Rank 0 and waiting", ["figure", "value", "aim"], rows)


def start() -> str:
    import startup

    return startup.main()


def main(arguments: list[str]) -> None:
    target = None
    if "--write" in arguments:
        at = arguments.index("--write")
        target = Path(arguments[at + 1])
        del arguments[at : at + 2]
    parts = arguments or list(PARTS)
    texts = []
    for part in parts:
        text = {"engine": engine, "handover": handover, "rank0": rank0, "start": start}[part]()
        print(text, flush=True)
        texts.append(text)
    if target is not None:
        head = (f"# Benchmarks\n\nMeasured with `make bench` on {date.today().isoformat()}: {machine()}.\n"
                "Machines are noisy: trust the ratios, which were taken side by side in one run.\n\n")
        target.write_text(head + "\n".join(texts))


if __name__ == "__main__":
    main(sys.argv[1:])
