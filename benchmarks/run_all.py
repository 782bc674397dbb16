"""``make bench``: every figure of docs/benchmarks.md, side by side in one run.

    python benchmarks/run_all.py [PART…] [--write docs/benchmarks.md] [--trace FILE]

Without parts: all of them. ``routing`` needs a trace of requests (see ``routing.py``), else it is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from common import HERE, machine, run_under_mpi, size_of, table, time_of, verdict

TOKEN_BYTES = 46_080
"""KV-cache of the default model, fp32."""
# 90 KiB, then fourfold from 1 MiB to 1 GiB.
PAYLOADS = (2, 23, 91, 364, 1456, 5825, 23302)
RESHARDING = (
    ("tp1", "tp1"), ("tp3", "tp1"), ("tp1", "tp3"), ("tp3", "tp3"), ("pp2", "tp1"), ("tp3pp2", "pp3"))
RESHARDED_TOKENS = 1024
_GPU_CHAPTER = "\n## On GPUs\n"
OVERLAP_RATES = ("1gbit", "4gbit")


def engine() -> str:
    from disagg_mpi.model.fetch import fetch_default_model

    return _output_of("engine.py", str(fetch_default_model()))


def handover() -> str:
    return by_payload() + "\n" + resharding()


def by_payload() -> str:
    tokens = ",".join(str(count) for count in PAYLOADS if 6 * count * TOKEN_BYTES < _room())
    by_messages, in_memory = [], []
    for blocks in ("contiguous", "scattered"):
        flags = ["--scattered"] if blocks == "scattered" else []
        ways = (run_under_mpi(3, "handover.py", way, "tp1", "tp1", tokens, *flags)
                for way in ("mpi", "copy", "shared"))
        for messages, copy, exchange in zip(*ways, strict=True):
            size = size_of(messages["bytes"])
            by_messages.append([
                size, blocks, messages["messages"], time_of(messages["seconds"]), _rate(messages),
                f"{messages['of_message']:.2f}", f"{messages['of_copy']:.2f}",
                verdict(messages["of_copy"], 0.8)])
            in_memory.append([
                size, blocks, time_of(copy["seconds"]), _rate(copy), f"{copy['of_copy']:.2f}",
                time_of(exchange["seconds"]), size_of(exchange["moved"]), f"{exchange['of_copy']:,.1f}"])
    note = ("From the pull until the KV-cache is in place, wake-ups of the progress threads and all. Of a "
            "memory copy, of a plain message: the time that one of as many contiguous bytes takes, right "
            "after it, divided by its time.")
    return table(
        "Hand-over on one host by MPI messages, one rank to one rank",
        ["KV-cache", "blocks", "messages", "median", "GB/s", "of a plain message", "of a memory copy", "aim"],
        by_messages, note) + "\n" + table(
        "Hand-over in shared memory, one rank to one rank",
        ["KV-cache", "blocks", "copied: median", "GB/s", "of a memory copy", "exchanged: median",
         "bytes moved", "of a memory copy"],
        in_memory, "Copied where block sizes differ, else exchanged. The rest is as above.")


def resharding() -> str:
    rows = []
    base: dict[str, float] = {}
    for context, generation in RESHARDING:
        num_ranks = 1 + _ranks_of(context) + _ranks_of(generation)
        found = {way: run_under_mpi(num_ranks, "handover.py", way, context, generation,
                                    str(RESHARDED_TOKENS))[0] for way in ("mpi", "copy")}
        row = [f"{context} to {generation}", found["mpi"]["messages"]]
        for way, one in found.items():
            base.setdefault(way, one["seconds"])
            row += [time_of(one["seconds"]), _rate(one), f"{base[way] / one['seconds']:.2f}"]
        rows.append(row)
    return table(
        "Hand-over between shapes on one host",
        ["context to generation", "messages", "MPI messages: median", "GB/s", "tp1 to tp1 / it",
         "copied: median", "GB/s", "tp1 to tp1 / it"], rows,
        f"{RESHARDED_TOKENS:,} tokens, {size_of(RESHARDED_TOKENS * TOKEN_BYTES)}, in contiguous blocks; all "
        "ranks of an instance together, which share the cores. In one exchange pool 0 bytes move.")


def overlap() -> str:
    return _output_of("overlap.py", ",".join(OVERLAP_RATES))


def parallel() -> str:
    return _output_of("parallel.py", "table")


def reuse() -> str:
    rows = []
    for transport in ("auto", "mpi"):
        found = run_under_mpi(3, "reuse.py", transport)
        for which in ("first", "again"):
            row = found[which]
            rows.append([row["way"], which, time_of(row["ttft"]), f"{row['cached_tokens']:.0f}",
                         f"{row['held_tokens']:.0f}", size_of(row["handover_bytes"]),
                         time_of(row["second_token"]),
                         "" if which == "first" else f"{found['first']['ttft'] / row['ttft']:.1f}"])
    return table(
        "A prompt of 1,000 tokens, for the first time and again",
        ["hand-over", "", "time to first token", "tokens not computed", "not handed over", "bytes moved",
         "first token to second", "times as fast"], rows, "Medians of 3 prompts.")


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


def serve() -> str:
    rows = []
    for line in _output_of("serve.py").splitlines():
        row = json.loads(line)
        costs = [f"{row[name] * 1e6:.1f}" for name in ("cpu", "bare_cpu", "paced_cpu")]
        rows.append([
            row["call"], row["streams"], *costs, f"{row['of_bare']:.2f}", f"{row['of_paced']:.2f}",
            verdict(row["of_paced"], 1.5, at_most=True), f"{row['per_second']:,.0f}",
            verdict(row["per_second"], 10_000)])
    columns = ["call", "streams", "µs a token", "bare", "bare, paced", "of bare", "of paced", "aim",
               "tokens/s", "aim"]
    return table(
        "Rank 0 as a server", columns, rows,
        "CPU of rank 0, all of its threads, for a streamed token of executors that compute nothing, and of a "
        "bare starlette + uvicorn server that streams the same bytes: as fast as it can, and sleeping "
        "between two tokens of a stream as long as ours takes for a step. Medians; all share the cores.")


def start() -> str:
    import startup

    return startup.main()


def _output_of(script: str, *arguments: str) -> str:
    """A process of its own: thread settings must come before torch."""
    return subprocess.run([sys.executable, str(HERE / script), *arguments], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def _room() -> int:
    """Bytes that a job's pools and buffers may have, in memory that processes share or not."""
    from disagg_mpi.job.plan import available_bytes
    from disagg_mpi.transfer.memory import SHARED_MEMORY_FOLDER

    return min(available_bytes() or 0, shutil.disk_usage(SHARED_MEMORY_FOLDER).free)


def _ranks_of(shape: str) -> int:
    from disagg_mpi.shapes import parse_instances

    return sum(instance.num_ranks for instance in parse_instances(shape))


def _rate(found: dict[str, Any]) -> str:
    return f"{found['bytes'] / found['seconds'] / 1e9:.1f}"


PARTS: dict[str, Callable[[], str]] = {
    "engine": engine, "handover": handover, "overlap": overlap, "parallel": parallel, "reuse": reuse,
    "rank0": rank0, "serve": serve, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, "routing"]))
    parser.add_argument("--write", type=Path, metavar="FILE", help="also put all of it there")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="for routing")
    options = parser.parse_args()
    available = dict(PARTS)
    if options.trace is not None:
        available["routing"] = lambda: _output_of("routing.py", "--trace", str(options.trace))
    parts = options.parts or list(available)
    if unknown := [part for part in parts if part not in available]:
        parser.error(f"{', '.join(unknown)}: parts are {', '.join(PARTS)}, and routing with --trace FILE")
    texts = []
    for part in parts:
        text = available[part]()
        print(text, flush=True)
        texts.append(text)
    if options.write is not None:
        head = (f"# Benchmarks\n\nMeasured with `make bench` on {date.today().isoformat()}: {machine()}.\n"
                "Machines are noisy: trust the ratios, which were taken side by side in one run.\n\n")
        options.write.write_text(head + "\n".join(texts) + _kept(options.write))


def _kept(path: Path) -> str:
    """The chapter of a page that is measured on another machine."""
    text = path.read_text() if path.exists() else ""
    return text[text.index(_GPU_CHAPTER):] if _GPU_CHAPTER in text else ""


if __name__ == "__main__":
    main()
