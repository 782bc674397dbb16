"""Does disaggregation pay on one GPU? Context rank and generation rank, against aggregated ranks that chunk.

    python benchmarks/gpu_pays.py                                   running streams while long prompts arrive
    python benchmarks/gpu_pays.py --trace FILE --requests 200       the arrivals and lengths of a trace
    python benchmarks/gpu_pays.py --layouts aggregated,disaggregated --mps on --streams 16
    python benchmarks/gpu_pays.py --gpus 0,1                        context on GPU 0, generation on GPU 1
    python benchmarks/gpu_pays.py --gpus 0,1,2,3 --tp 2             instances of two GPUs
    python benchmarks/gpu_pays.py --device emulated --tiny          a smoke test without a GPU

Every layout is a job of its own under mpirun, on GPU 0 alone or on --gpus, with the same model (of
Llama-3-8B's shape, random weights), the same KV-cache in all, the same requests at the same times:

    aggregated      one instance for both phases, its prompts in chunks (--chunks)
    two             two such instances that share the GPU, or one on each of several
    disaggregated   an instance for contexts and one for generation, which share it; of several half for each

Times are seen at rank 0, from the orchestrator's API, as a client would see them: TTFT from when a prompt was
to arrive, ITL between two tokens of a stream. With ``--mps both`` layouts of several ranks run without and
with NVIDIA's MPS. A layout that fails costs its own figures alone; --json FILE has each as it is measured.

Traces: JSON lines as github.com/kvcache-ai/Mooncake has them, CSV as github.com/Azure/AzurePublicDataset. Of
a request only its time and its lengths are taken: no two prompts here begin alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # as it lies here, installed or not

from common import table, time_of  # noqa: E402 - after its path
from gpu_common import (  # noqa: E402
    LLAMA_8B,
    TINY,
    Arrival,
    Figures,
    Results,
    end_in_order,
    fitted,
    gaps_of,
    gpu_in_words,
    need_gpus,
    poisson,
    quantile,
    read_trace,
    verdict_of,
    write_model,
)

_STREAM_TOKENS = 8000
"""Of a stream, more than it can make in the time."""
_DRAIN_SECONDS = 5.0
"""After a load, for prompts that have not had their first token."""
_MAX_BATCH = 64
_MPS_RUNS = "# MPS: runs on this host"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "emulated"], default="cuda")
    add("--tiny", action="store_true", help="a tiny model and short loads; no figure means anything")
    add("--layouts", default="aggregated,two,disaggregated", metavar="NAME,NAME")
    add("--mps", choices=["off", "on", "both"], default="both", help="for layouts of several ranks")
    add("--context-shares", default="1", metavar="S,S",
        help="under MPS, shares of the GPU's processors that a context rank may take")
    add("--gpus", default="0", metavar="ID,ID",
        help="to compute on; instances share them only where there are --tp of them")
    add("--tp", type=int, default=1, metavar="N", help="GPUs of an instance")
    add("--chunks", default="", metavar="N,N", help="token budgets of aggregated ranks; default 512,2048")
    add("--kv-tokens", type=int, default=0, metavar="N", help="of all ranks together; default 360448")
    add("--streams", default="", metavar="N,N", help="running streams; default 16,32")
    add("--context", type=int, default=0, metavar="N", help="their prompts; default 1024 tokens")
    add("--rates", default="2", metavar="R,R", help="long prompts a second (Poisson)")
    add("--prompt", type=int, default=0, metavar="N", help="tokens of a long prompt; default 4096")
    add("--output", type=int, default=8, metavar="N", help="tokens of its answer")
    add("--seconds", type=float, default=0, help="of one load; default 12, of a trace 60")
    add("--quiet", type=float, default=0, help="seconds of the streams alone, before; default 3")
    add("--seed", type=int, default=1, help="of times and tokens")
    add("--trace", type=Path, metavar="FILE", help="instead of streams and prompts")
    add("--requests", type=int, default=200, metavar="N", help="the first N of the trace")
    add("--speed", type=float, default=1.0, metavar="X", help="replay it X times as fast")
    add("--max-prompt", type=int, default=8192, metavar="N", help="cut its prompts to N tokens")
    add("--max-output", type=int, default=256, metavar="N", help="and its answers")
    add("--ttft-slo", type=float, default=1.0, metavar="SECONDS", help="limit of a request's TTFT")
    add("--itl-slo", type=float, default=0.05, metavar="SECONDS",
        help="limit of its mean time between tokens")
    add("--limit", type=int, default=180, metavar="SECONDS", help="of one layout's job, its start included")
    add("--total", type=int, default=0, metavar="SECONDS", help="begin no job that could end after this")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiny = options.tiny
    options.chunks = options.chunks or ("64" if tiny else "512,2048")
    options.streams = options.streams or ("2" if tiny else "16,32")
    options.kv_tokens = options.kv_tokens or (16384 if tiny else 360448)
    options.context = options.context or (32 if tiny else 1024)
    options.prompt = options.prompt or (256 if tiny else 4096)
    options.quiet = options.quiet or (0.3 if tiny else 3.0)
    options.seconds = options.seconds or (1.0 if tiny else 60.0 if options.trace else 12.0)
    if any(int(word) < _MAX_BATCH for word in options.chunks.split(",")):
        parser.error(f"--chunks {options.chunks}: a step takes {_MAX_BATCH} requests, so a chunk has at "
                     "least as many tokens")
    ids = options.gpus.split(",")
    if not all(word.isdecimal() for word in ids) or len(set(ids)) < len(ids):
        parser.error(f"--gpus {options.gpus}: needed are different ids of GPUs, as 0,1")
    try:
        options.shares = [float(word) for word in options.context_shares.split(",")]
    except ValueError:
        options.shares = []
    if not options.shares or not all(0 < share <= 1 for share in options.shares):
        parser.error(f"--context-shares {options.context_shares}: needed are shares, as 1,0.6")
    options.groups = [",".join(ids[first : first + options.tp]) for first in range(0, len(ids), options.tp)]
    if len(ids) % options.tp or (len(options.groups) > 1 and len(options.groups) % 2):
        parser.error(f"--gpus {options.gpus} --tp {options.tp}: {len(ids)} GPUs are not an even number of "
                     f"instances of {options.tp}, nor one")
    if options.mps == "on" and len(options.groups) > 1:
        parser.error(f"--mps on: on --gpus {options.gpus} no two instances share a GPU")
    if options.shares != [1.0] and (options.mps == "off" or len(options.groups) > 1):
        parser.error(f"--context-shares {options.context_shares}: they are for ranks on one GPU under MPS")
    known = ("aggregated", "two", "disaggregated")
    if unknown := [name for name in options.layouts.split(",") if name not in known]:
        parser.error(f"{', '.join(unknown)}: layouts are {', '.join(known)}")
    return options


# ---- the loads: what rank 0 does within a job ----------------------------------------------------


class Load:
    """A load and what is told of it; times are of ``time.monotonic``."""

    def __init__(self, orchestrator: Any, spec: dict[str, Any]) -> None:
        self.orchestrator = orchestrator
        self.spec = spec
        # By name too: what one load has left in the prefix cache is not to help the next.
        self._chooser = random.Random(f"{spec['seed']} {spec['name']}")

    def tokens(self, count: int) -> list[int]:
        return self._chooser.choices(range(self.spec["vocab"]), k=count)

    def submit(self, prompt: list[int], max_tokens: int) -> Any:
        import disagg_mpi as dm

        return self.orchestrator.stream(prompt, dm.SamplingParams(max_tokens=max_tokens, ignore_eos=True))


@dataclass
class Reader:
    """One request's tokens, when they came."""

    due: float
    """When it was to arrive."""
    times: list[float] = field(default_factory=list)
    error: str = ""
    handle: Any = None

    async def read(self, handle: Any) -> None:
        self.handle = handle
        async for events in handle.steps():
            now = time.monotonic()
            for event in events:
                self.times += [now] * len(event.token_ids)
        self.error = handle.result().error or ""

    def ttft(self, now: float) -> float:
        """Or how long it has waited, at ``now``."""
        return (self.times[0] if self.times else now) - self.due


async def at_their_times(start: float, times: list[float], begin: Callable[[int], Awaitable[None]]) -> None:
    """Begin each request when it is due, whatever has become of those before."""
    async def one(index: int, at: float) -> None:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        await begin(index)

    await asyncio.gather(*(one(index, at) for index, at in enumerate(times)))


async def streams_and_prompts(load: Load) -> Figures:
    """Streams that run all the time, and after a quiet while long prompts between them."""
    spec = load.spec
    streams = [Reader(time.monotonic()) for _ in range(spec["streams"])]
    tasks = [asyncio.ensure_future(
        reader.read(load.submit(load.tokens(spec["context"]), spec["stream_tokens"]))) for reader in streams]
    end = time.monotonic() + 60
    while not all(len(reader.times) >= 8 for reader in streams):
        if time.monotonic() > end or any(task.done() for task in tasks):
            errors = [reader.error for reader in streams if reader.error]
            raise RuntimeError("not all streams run: " + (errors[0] if errors else "no tokens within 60 s"))
        await asyncio.sleep(0.01)
    arrivals = poisson(spec["rate"], spec["seconds"], spec["seed"])
    texts = [load.tokens(spec["prompt"]) for _ in arrivals]
    quiet_start = time.monotonic()
    await asyncio.sleep(spec["quiet"])
    start = time.monotonic()
    end = start + spec["seconds"]
    prompts = [Reader(start + at) for at in arrivals]

    async def begin(index: int) -> None:
        await prompts[index].read(load.submit(texts[index], spec["output"]))

    arriving = asyncio.ensure_future(at_their_times(start, arrivals, begin))
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    # Streams go on: a pause that began within the time is measured to its end.
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(arriving), _DRAIN_SECONDS)
    await asyncio.sleep(0.5 if spec["seconds"] > 5 else 0.05)
    now = time.monotonic()
    ended_early = sum(task.done() for task in tasks)
    for reader in [*streams, *prompts]:
        if reader.handle is not None:
            reader.handle.cancel()
    figures = figures_of(streams, prompts, quiet_start, start, end, now)
    await asyncio.wait([*tasks, arriving], timeout=20)
    if ended_early:
        print(f"{ended_early} streams came to their end before the load did", file=sys.stderr)
    return figures


def figures_of(streams: list[Reader], prompts: list[Reader], quiet_start: float, start: float, end: float,
               now: float) -> Figures:
    """Of what came between ``start`` and ``end``; looked at ``now``, when nothing had been cancelled."""
    gaps, quiet = [], []
    for reader in streams:
        times = [*reader.times, now] if reader.times and now - reader.times[-1] > 1.0 else reader.times
        for before, gap in zip(times, gaps_of(times), strict=False):
            if start <= before < end:
                gaps.append(gap)
            elif quiet_start <= before and before + gap < start:
                quiet.append(gap)
    waits = [reader.ttft(now) for reader in prompts]
    seconds = end - start
    in_time = sum(start <= at < end for reader in [*streams, *prompts] for at in reader.times)
    first = [reader for reader in prompts if reader.times and reader.times[0] < end]
    return Figures(
        "", "", *(quantile(gaps, q) for q in (0.5, 0.9, 0.99, 1.0)),
        *(quantile(waits, q) for q in (0.5, 0.99)),
        tokens_per_second=in_time / seconds, prompt_tokens_per_second=len(first) / seconds,
        quiet_itl_p50=quantile(quiet, 0.5), num_prompts=len(prompts),
        num_late=sum(not reader.times for reader in prompts),
        num_failed=sum(bool(reader.error) for reader in [*streams, *prompts]))


async def trace(load: Load) -> Figures:
    """Requests at a trace's times, each to its end, or to the end of the time."""
    spec = load.spec
    rows = [Arrival(*row) for row in spec["arrivals"]]
    texts = [load.tokens(row.prompt) for row in rows]
    start = time.monotonic() + 0.1
    readers = [Reader(start + row.at) for row in rows]

    async def begin(index: int) -> None:
        await readers[index].read(load.submit(texts[index], rows[index].output))

    arriving = asyncio.ensure_future(at_their_times(start, [row.at for row in rows], begin))
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(arriving), spec["seconds"] + _DRAIN_SECONDS)
    now = time.monotonic()
    figures = trace_figures(readers, rows, start, now, spec["ttft_slo"], spec["itl_slo"])
    arriving.cancel()
    for reader in readers:
        if reader.handle is not None:
            reader.handle.cancel()
    await asyncio.wait([arriving], timeout=20)
    return figures


def trace_figures(readers: list[Reader], rows: list[Arrival], start: float, now: float, ttft_slo: float,
                  itl_slo: float) -> Figures:
    """A request is within both limits if its first token and the mean time between its tokens are; one that
    has not come to its end is not."""
    gaps = [gap for reader in readers for gap in gaps_of(reader.times)]
    waits = [reader.ttft(now) for reader in readers]
    good = 0
    for reader, row in zip(readers, rows, strict=True):
        if len(reader.times) < row.output or reader.ttft(now) > ttft_slo:
            continue
        mean = (reader.times[-1] - reader.times[0]) / max(1, len(reader.times) - 1)
        good += mean <= itl_slo
    ends = [reader.times[-1] for reader in readers if reader.times]
    seconds = max(ends, default=now) - start
    first = sum(row.prompt for reader, row in zip(readers, rows, strict=True) if reader.times)
    return Figures(
        "", "", *(quantile(gaps, q) for q in (0.5, 0.9, 0.99, 1.0)),
        *(quantile(waits, q) for q in (0.5, 0.99)),
        tokens_per_second=sum(len(reader.times) for reader in readers) / seconds,
        prompt_tokens_per_second=first / seconds, num_prompts=len(readers),
        num_late=sum(not reader.times for reader in readers),
        num_failed=sum(bool(reader.error) for reader in readers), attainment=good / max(1, len(readers)))


LOADS: dict[str, Callable[[Load], Awaitable[Figures]]] = {"streams": streams_and_prompts, "trace": trace}


def run_job(spec: dict[str, Any]) -> None:
    """On every rank."""
    import disagg_mpi as dm

    def tell(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    with dm.launch(dm.JobConfig(**spec["config"]), progress=tell) as orchestrator:
        if orchestrator is None:
            return
        results = Results(Path(spec["result"]))
        results.set("ready_seconds", time.time() - spec["started"])
        for load in [spec["warm_up"], *spec["loads"]]:
            figures = asyncio.run(LOADS[load["kind"]](Load(orchestrator, load)))
            if load is not spec["warm_up"]:
                figures.load = load["name"]
                figures.prompt_tokens_per_second *= load.get("prompt", 1)
                results.add("figures", figures.json())
            print(f"  {load['name']}: done", file=sys.stderr, flush=True)


# ---- the layouts: a job each ---------------------------------------------------------------------


@dataclass
class Layout:
    name: str
    num_ranks: int
    config: dict[str, Any]
    mps: bool = False


def layouts(options: argparse.Namespace, model: Path) -> list[Layout]:
    def config(num_pools: int, budget: int, **roles: Any) -> dict[str, Any]:
        return {"model": str(model), "device": options.device, "weights": "random",
                "kv_tokens": options.kv_tokens // num_pools, "max_num_tokens": budget,
                "max_batch_size": _MAX_BATCH, "start_timeout": float(options.limit), **roles}

    chunks = [int(word) for word in options.chunks.split(",")]
    budget = max(options.max_prompt if options.trace else options.prompt, *chunks)
    shares = len(options.groups) == 1
    groups = options.groups * 2 if shares else options.groups

    def role(name: str, members: list[str]) -> dict[str, Any]:
        return {name: f"{len(members)}xtp{options.tp}", f"{name}_device_ids": ";".join(members)}

    found = []
    for name in options.layouts.split(","):
        if name == "aggregated":
            found += [Layout(f"aggregated, chunks of {chunk}", 1 + options.tp,
                             config(1, chunk, **role("aggregated", groups[:1]))) for chunk in chunks]
            continue
        if name == "two":
            count = "two" if len(groups) == 2 else str(len(groups))
            kinds = [(f"{count} aggregated, chunks of {chunk}",
                      config(len(groups), chunk, **role("aggregated", groups))) for chunk in chunks[:1]]
        else:
            half = len(groups) // 2
            kinds = [("disaggregated", config(
                len(groups), min(budget, 4096), **role("context", groups[:half]),
                **role("generation", groups[half:])))]
        for title, each in kinds:
            num_ranks = 1 + options.tp * len(groups)
            if options.mps != "on" or not shares:
                found.append(Layout(title, num_ranks, each))
            if options.mps != "off" and shares:
                for share in options.shares if name == "disaggregated" else [1.0]:
                    limit = "" if share == 1 else f", contexts on {share:.0%}"
                    found.append(Layout(f"{title}, MPS{limit}", num_ranks,
                                        {**each, "context_gpu_share": share}, mps=True))
    return found


def loads(options: argparse.Namespace, vocab: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What warms up, and what is measured."""
    common = {"vocab": vocab, "seed": options.seed, "seconds": options.seconds}
    limit = 1500 if options.tiny else _STREAM_TOKENS
    streams = {**common, "kind": "streams", "context": options.context, "prompt": options.prompt,
               "output": options.output, "quiet": options.quiet, "stream_tokens": limit}
    warm_up = {**streams, "name": "warm-up", "streams": 4 if not options.tiny else 1, "rate": 4.0,
               "seconds": 2.0 if not options.tiny else 0.3, "quiet": 0.1, "seed": options.seed + 1000}
    if options.trace is not None:
        rows = fitted(read_trace(options.trace, options.requests), speed=options.speed,
                      max_prompt=options.max_prompt, max_output=options.max_output)
        rows = [row for row in rows if row.at < options.seconds]
        name = f"{len(rows)} requests of {options.trace.name}, x{options.speed:g}"
        return warm_up, [{**common, "kind": "trace", "name": name, "ttft_slo": options.ttft_slo,
                          "itl_slo": options.itl_slo,
                          "arrivals": [[row.at, row.prompt, row.output] for row in rows]}]
    return warm_up, [
        {**streams, "streams": int(count), "rate": float(rate),
         "name": f"{count} streams, {rate} prompts/s"}
        for count in options.streams.split(",") for rate in options.rates.split(",")]


def run_layout(layout: Layout, options: argparse.Namespace, vocab: int, folder: Path,
               tell: Callable[[Figures], None]) -> tuple[list[Figures], str]:
    """What was measured, and what went wrong. ``tell`` gets figures while the job goes on."""
    warm_up, measured = loads(options, vocab)
    result, spec_file, log_file = (folder / name for name in ("result.json", "spec.json", "log"))
    result.unlink(missing_ok=True)
    spec_file.write_text(json.dumps({
        "config": layout.config, "warm_up": warm_up, "loads": measured, "result": str(result),
        "started": time.time()}))
    command = [sys.executable, "-m", "disagg_mpi", "launch", "-n", str(layout.num_ranks),
               *(["--mps"] if layout.mps else []), "--", str(HERE / "gpu_pays.py"), "--job", str(spec_file),
               "--device", options.device]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    if options.device == "emulated":
        num_gpus = max(int(index) for index in options.gpus.split(",")) + 1
        env.setdefault("DISAGG_MPI_EMULATED_GPUS", f"{num_gpus}x8GiB")
    figures: list[Figures] = []

    def look() -> None:
        if not result.exists():
            return
        name = layout.name
        if layout.mps and _MPS_RUNS not in log_file.read_text(errors="replace"):
            name += " (asked for, did not run)"
        data = json.loads(result.read_text())
        if "ready_seconds" in data and not ready:
            ready.append(data["ready_seconds"])
            print(f"  ready after {ready[0]:.1f} s", flush=True)
        for row in data.get("figures", [])[len(figures):]:
            figures.append(Figures.from_json({**row, "layout": name}))
            tell(figures[-1])

    ready: list[float] = []
    end = time.monotonic() + options.limit
    with log_file.open("w") as log:
        # In a session of its own: how it ends is said here.
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                look()
            code = process.poll()
        finally:
            stop(process)
    look()
    if code == 0:
        return figures, ""
    why = f"exit code {code}" if code is not None else f"not over within {options.limit} s (--limit)"
    said = "\n".join(log_file.read_text(errors="replace").splitlines()[-25:])
    return figures, f"{layout.name}: {why}; the end of what it said:\n\n```\n{said}\n```\n"


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, then as two do, then at once: the launcher takes its ranks with it."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)


def rows_table(title: str, figures: list[Figures], note: str = "") -> str:
    has_limits = any(not math.isnan(each.attainment) for each in figures)
    columns = ["layout", "ITL alone P50", "ITL P50", "P90", "P99", "max", "TTFT P50", "P99", "prompts",
               "late", "prompt tokens/s", "output tokens/s"] + ["within both limits"] * has_limits

    def shown(seconds: float) -> str:
        return "" if math.isnan(seconds) else time_of(seconds)

    rows = [[each.layout, shown(each.quiet_itl_p50), shown(each.itl_p50), shown(each.itl_p90),
             shown(each.itl_p99), shown(each.itl_max), shown(each.ttft_p50), shown(each.ttft_p99),
             each.num_prompts, each.num_late, f"{each.prompt_tokens_per_second:,.0f}",
             f"{each.tokens_per_second:,.0f}"]
            + ([f"{each.attainment:.0%}"] if has_limits else []) for each in figures]
    return table(title, columns, rows, note)


def verdicts(figures: list[Figures]) -> list[str]:
    """Every disaggregated layout against every other one under the same load."""
    return [verdict_of(base, split) for split in figures if split.layout.startswith("disaggregated")
            for base in figures if base.load == split.load and not base.layout.startswith("disaggregated")]


def main() -> None:
    options = arguments()
    if options.job is not None:
        run_job(json.loads(options.job.read_text()))
        return
    end_in_order()
    if options.device == "cuda":
        need_gpus()
    if options.tiny or options.device == "emulated":
        print("A smoke test: of a tiny model, or on the processor. No figure below means anything.\n")
    shape = TINY if options.tiny else LLAMA_8B
    try:
        names = [each["name"] for each in loads(options, shape["vocab_size"])[1]]
    except (OSError, ValueError) as error:
        print(f"--trace: {error}", file=sys.stderr)
        sys.exit(2)
    results = Results(options.json, machine=gpu_in_words() if options.device == "cuda" else "emulated")
    found: list[Figures] = []
    problems: list[str] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", shape)
        def tell(each: Figures) -> None:
            found.append(each)
            results.add("pays", each.json())
            print(rows_table(f"{each.layout}: {each.load}", [each]), flush=True)

        for layout in layouts(options, model):
            if options.total and time.monotonic() - begun + options.limit > options.total:
                problem = f"{layout.name}: not begun, its {options.limit} s are not left (--limit, --total)"
            else:
                print(f"{layout.name} …", flush=True)
                _, problem = run_layout(layout, options, shape["vocab_size"], Path(folder), tell)
            if problem:
                problems.append(problem)
                results.add("failed", {"what": layout.name, "error": problem})
                print(problem, flush=True)
    of = "One GPU" if "," not in options.gpus else f"GPUs {options.gpus}, instances of {options.tp}"
    if options.tp > 1 and len(options.groups) == 1:
        of += ", which share them"
    note = (f"{of}, {options.kv_tokens:,} tokens of KV-cache in all. ITL: between two tokens of a stream "
            "at rank 0; alone: before the first prompt came. TTFT: from when a prompt was to arrive. Late: "
            "without a first token when the load was over; their wait until then is their TTFT here.")
    if options.trace is not None:
        note += (f" Prompts cut to {options.max_prompt:,} tokens, answers to {options.max_output:,}; limits: "
                 f"TTFT {options.ttft_slo:g} s, mean time between tokens {options.itl_slo * 1e3:g} ms.")
    else:
        note += (f" Streams of {options.context:,} tokens, prompts of {options.prompt:,} with "
                 f"{options.output} tokens of answer; {options.seconds:g} s a load.")
    for name in names:
        if not any(each.load == name for each in found):
            print(f"{name}: nothing was measured", flush=True)
            continue
        print(rows_table(f"Does it pay? {name}", [each for each in found if each.load == name], note))
        for line in verdicts([each for each in found if each.load == name]):
            results.add("verdicts", line)
            print(f"* {line}")
        print(flush=True)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
