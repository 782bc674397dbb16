"""The engine for GPUs in one process: a model of Llama-3-8B's shape with random weights, against its floors.

    python benchmarks/gpu_engine.py                         all parts, each in a process of its own
    python benchmarks/gpu_engine.py --part decode           generation steps: batch 1, 32, 128
    python benchmarks/gpu_engine.py --part prefill          context steps of 4096 tokens
    python benchmarks/gpu_engine.py --part startup          with no kernel built yet, and again
    python benchmarks/gpu_engine.py --part decode --profile     and the kernels that take the time
    python benchmarks/gpu_engine.py --device emulated --tiny    a smoke test without a GPU, in seconds

No MPI and no orchestrator: the leader's runner and one rank's stage, as a job makes them, with steps launched
ahead from promised tokens. Every figure stands beside a ceiling that is measured in the same process: a copy
within the GPU's memory, and a matrix product. What has been measured is printed, and written to --json FILE,
at once. Needs torch, transformers, numpy and msgspec.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # as it lies here, installed or not

from common import median, table, time_of  # noqa: E402 - after its path
from gpu_common import (  # noqa: E402
    LLAMA_8B,
    REFERENCE_BANDWIDTH,
    TINY,
    Results,
    Shape,
    end_in_order,
    gpu_in_words,
    need_gpus,
    share,
    write_model,
)

PARTS = ("decode", "prefill", "startup")  # the last builds kernels anew, into a cache that is thrown away

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--part", choices=[*PARTS, "start-once", "all"], default="all")
parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda")
parser.add_argument("--tiny", action="store_true", help="a tiny model; no figure means anything")
parser.add_argument("--batches", default="", metavar="N,N", help="of generation steps; default 1,32,128")
parser.add_argument("--context", type=int, default=0, metavar="N", help="tokens before them; default 1024")
parser.add_argument("--prompt", type=int, default=0, metavar="N", help="of context steps; default 4096")
parser.add_argument("--steps", type=int, default=0, metavar="N", help="measured a row; default 64")
parser.add_argument("--rounds", type=int, default=0, metavar="N", help="of context steps; default 5")
parser.add_argument("--attention", choices=["auto", "flashinfer", "sdpa"], default="auto")
parser.add_argument("--tokens-per-block", type=int, default=32, metavar="N")
parser.add_argument("--profile", action="store_true", help="top kernels of one step of each kind")
parser.add_argument("--limit", type=int, default=240, metavar="SECONDS", help="of one part")
parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
options = parser.parse_args()

_WARM = 8
"""Steps before those that are measured."""

MODEL: dict[str, Any] = TINY if options.tiny else LLAMA_8B
SHAPE = Shape.of(MODEL)
BATCHES = [int(word) for word in (options.batches or ("1,4" if options.tiny else "1,32,128")).split(",")]
CONTEXT = options.context or (40 if options.tiny else 1024)
PROMPT = options.prompt or (64 if options.tiny else 4096)
STEPS = options.steps or (6 if options.tiny else 64)
ROUNDS = options.rounds or (2 if options.tiny else 5)


def say(text: str = "") -> None:
    print(text, flush=True)


# ---- all parts, each in a process of its own -----------------------------------------------------


def run_parts(parts: tuple[str, ...], results: Results, extra: dict[str, str]) -> bool:
    """Whether all came to their end. What one that did not has measured is kept."""
    all_good = True
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            written = Path(folder) / f"{number}.json"
            command = [sys.executable, str(HERE / "gpu_engine.py"), *sys.argv[1:], "--part", part, "--json",
                       str(written), "--child"]
            try:
                code = subprocess.run(command, env=os.environ | extra, check=False,
                                      timeout=options.limit * 2 + 60).returncode
            except subprocess.TimeoutExpired:
                code = -1
            results.take(written)
            if code != 0:
                all_good = False
                say(f"**{part} did not come to its end** (exit code {code}, limit {options.limit} s); what "
                    "it had measured by then is above.\n")
    return all_good


# ---- one part ------------------------------------------------------------------------------------


class Watch:
    """Seconds of the parts of a start, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str, synchronize: Callable[[], None] = lambda: None) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Rig:
    """The model on its device, as ``job.gpu`` makes it for a rank of an aggregated instance."""

    def __init__(self, folder: Path, num_tokens: int, *, captures: bool) -> None:
        """``num_tokens``: positions of the pool."""
        watch = self.watch = Watch()
        with watch.part("import of torch"):
            from disagg_mpi.comm import environment

            environment.apply(num_threads=max(1, len(os.sched_getaffinity(0)) // 2))
            import torch

            torch.set_grad_enabled(False)
        if options.device == "cuda" and not torch.cuda.is_available():
            say(f"torch {torch.__version__} cannot use the GPU that the driver shows: install a torch that "
                "is built for CUDA and for this driver (nvidia-smi shows which CUDA it takes)")
            sys.exit(2)
        from disagg_mpi.config import JobConfig
        from disagg_mpi.engine.gpu.device import CudaDevice, Device, HostDevice
        from disagg_mpi.engine.gpu.weights import WeightArena
        from disagg_mpi.engine.tensor_parallel import ModelShard
        from disagg_mpi.engine.weights import DTYPES, plan_model
        from disagg_mpi.job.arrangement import arrange
        from disagg_mpi.model.checkpoint import read_model_spec
        from disagg_mpi.topology import build_topology
        from disagg_mpi.transfer.cuda.memory import allocate

        self.torch = torch
        path = write_model(folder / "model", MODEL)
        block = options.tokens_per_block
        self.config = JobConfig(
            model=str(path), aggregated=1, device=options.device, weights="random", cuda_graphs=captures,
            attention=options.attention, tokens_per_block=block, max_batch_size=max(BATCHES),
            max_num_tokens=max(PROMPT, max(BATCHES)), kv_tokens=-(-num_tokens // block) * block)
        self.spec = read_model_spec(path, has_files=False)
        with watch.part("CUDA context"):
            self.device: Device = HostDevice() if options.device == "emulated" else CudaDevice(0)
            torch.zeros(1, device=self.device.place)
        done = self.device.synchronize
        topology = build_topology(self.config)
        self.arrangement = arrange(self.config, topology, [0, 0], self.spec, {1: "GPU 0"})
        self.view = self.arrangement.views[1]
        self.dtype = DTYPES[self.config.compute_dtype]
        self.kv_dtype = DTYPES[self.config.effective_kv_dtype]
        with watch.part("plan of the model (transformers)"):
            self.plan = plan_model(path, self.config.compute_dtype, ModelShard())
        with watch.part("weights: allocated and filled", done):
            arena = WeightArena(self.plan)
            self._weights = allocate(arena.num_bytes, self.device.place)
            arena.fill_randomly(self._weights)
            arena.attach(self._weights, self.device)
        with watch.part("pool: allocated and filled", done):
            self.memory = allocate(self.view.layout.pool_bytes, self.device.place)
            for plane in self.memory.view(self.kv_dtype).chunk(64):
                plane.normal_()
        self.stage, self.graphs, self.attention = self.make_stage(captures=captures, watch=watch)

    def make_stage(self, *, captures: bool, watch: Watch) -> tuple[Any, Any, Any]:
        """A stage over the same weights and pool, warmed up; its captured steps, its attention."""
        from disagg_mpi.engine.gpu.attention import DevicePool, make_attention
        from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
        from disagg_mpi.engine.gpu.operations import make_operations
        from disagg_mpi.engine.gpu.stage import DeviceStage
        from disagg_mpi.engine.tensor_parallel import ModelShard
        from disagg_mpi.transfer.cuda.kernels import copy_blocks

        done = self.device.synchronize
        with watch.part("attention and operations made (flashinfer imported)", done):
            pool = DevicePool(self.memory, self.view, self.kv_dtype)
            model = DeviceModel(self.plan, ModelShard(), None, make_operations(self.device, self.dtype))
            attention = make_attention(
                self.config.attention, self.device, pool, head_shape(self.plan), self.dtype,
                max_requests=self.config.max_batch_size)
        if not self.device.is_cuda:
            attention.can_capture = True  # a replay there is another run of the same Python
        with watch.part("stage made", done):
            stage = DeviceStage(
                self.device, model, pool, attention, None,
                lambda sources, targets: copy_blocks(self.memory, self.view, sources, targets),
                scratch=self.arrangement.scratch[0], max_batch_size=self.config.max_batch_size,
                max_num_tokens=self.config.token_budget, max_model_len=self.spec.max_position_embeddings,
                captures=captures)
        graphs = stage._graphs
        first = stage._logits

        def logits(arrays: Any) -> Any:
            with watch.part("warm-up: context steps (kernels built or loaded)", done):
                return first(arrays)

        stage._logits = logits
        if graphs is not None:
            capture = graphs.capture

            def timed(make: Any) -> None:
                with watch.part(f"warm-up: {len(graphs.sizes)} generation steps captured", done):
                    capture(make)

            graphs.capture = timed
        stage.warm_up()
        del stage._logits
        return stage, graphs, attention

    def start_rows(self) -> list[list[str]]:
        rows = [[name, time_of(seconds)] for name, seconds in self.watch.seconds.items()]
        return [*rows, ["together", time_of(sum(self.watch.seconds.values()))]]


class Driver:
    """What the engine does with a runner, for requests that all run: launch ahead, take tokens."""

    def __init__(self, rig: Rig, stage: Any) -> None:
        from disagg_mpi.engine.gpu.runner import GpuRunner

        self.rig = rig
        self.runner = GpuRunner(stage)
        self.launch_seconds = 0.0
        self._ids = itertools.count(1)
        self._by_id: dict[int, Any] = {}
        blocks = list(rig.arrangement.block_ids[0])
        random.Random(1).shuffle(blocks)  # as in a pool that has been in use
        self._blocks = blocks

    def requests(self, count: int, num_tokens: int, *, room: int = 0) -> list[Any]:
        """New ones with prompts of so many tokens, over blocks that earlier ones may have had."""
        from disagg_mpi.engine.sequence import Sequence, Status
        from disagg_mpi.request import ExecutorRequest, SamplingParams

        per_request = -(-(num_tokens + room) // options.tokens_per_block)
        if count * per_request > len(self._blocks):
            raise ValueError(f"{count} requests of {num_tokens + room} tokens do not fit into the pool")
        chooser = random.Random(count)
        made = []
        for index in range(count):
            prompt = [chooser.randrange(SHAPE.vocab) for _ in range(num_tokens)]
            sequence = Sequence(ExecutorRequest(
                request_id=next(self._ids), prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=1_000_000, ignore_eos=True)))
            sequence.block_ids = self._blocks[index * per_request : (index + 1) * per_request]
            sequence.status = Status.RUNNING
            self._by_id[sequence.id] = sequence
            made.append(sequence)
        return made

    def launch(self, lengths: list[tuple[Any, int]]) -> None:
        """A step with so many tokens of each request."""
        from disagg_mpi.engine.scheduler import Chunk

        start = time.perf_counter()
        chunks = [Chunk(sequence, sequence.num_scheduled, length) for sequence, length in lengths]
        for chunk in chunks:
            chunk.sequence.num_in_flight += 1
            chunk.sequence.num_scheduled = chunk.end
        self.runner.launch(chunks)
        for chunk in chunks:
            if chunk.is_drawn_on_device:
                chunk.sequence.promise()
        self.launch_seconds += time.perf_counter() - start

    def poll(self) -> None:
        over = self.runner.poll()
        for chunk in over.chunks:
            chunk.sequence.num_in_flight -= 1
            chunk.sequence.num_computed = chunk.end
        for request, token in over.tokens.items():
            self._by_id[request].append(token)

    def drain(self) -> None:
        while self.runner.num_in_flight:
            self.poll()

    def generate(self, requests: list[Any], num_steps: int) -> list[float]:
        """Seconds of each of so many steps of all of them, from the end of one to the end of the next."""
        ends = []
        for _ in range(num_steps + 1):
            while self.runner.num_in_flight < self.runner.depth:
                self.launch([(sequence, 1) for sequence in requests])
            self.poll()
            ends.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(ends)]


class HostParts:
    """Where the host's time of a step goes: seconds within calls, by name."""

    def __init__(self, driver: Driver, stage: Any, graphs: Any, attention: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        import disagg_mpi.engine.gpu.stage as stage_module

        self._watched: list[tuple[Any, str, Any]] = []
        self._watch(driver.runner, "_step", "message")
        self._watch(stage._tables, "arrays", "tables")
        self._watch(stage._buffers, "upload", "upload")
        self._watch(attention, "begin", "attention's plan")
        self._watch(graphs if graphs is not None else stage, "replay" if graphs is not None else "_forward",
                    "replay" if graphs is not None else "forward")
        if graphs is None:  # or it is in the replay
            self._watch(stage_module, "likeliest", "choice")
        self._watch(stage_module, "draw_some", "draws")
        self._watch(stage, "_to_host", "to host")

    def _watch(self, owner: Any, name: str, label: str) -> None:
        call = getattr(owner, name)
        self._watched.append((owner, name, vars(owner).get(name)))

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds[label] += time.perf_counter() - start

        setattr(owner, name, timed)

    def end(self) -> None:
        for owner, name, before in self._watched:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def on_device(rig: Rig, work: Callable[[], Any], count: int) -> float:
    """Seconds of one of ``count`` runs in a row, by the device's own clock."""
    work()
    rig.device.synchronize()
    if rig.device.is_cuda:
        first, last = (rig.torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / count
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def ceilings(rig: Rig, results: Results, *, copies: bool) -> float:
    """Bytes a second of a copy, or FLOPs a second of a product; said and kept."""
    torch = rig.torch
    if copies:
        size = 4_000_000_000 if rig.device.is_cuda else 4_000_000
        source, target = (torch.zeros(size, dtype=torch.uint8, device=rig.device.place) for _ in range(2))
        speed = 2 * size / on_device(rig, lambda: target.copy_(source), 10)
        say(f"ceiling: a copy of {size / 1e9:g} GB within the memory, bytes read and written: "
            f"{speed / 1e12:.2f} TB/s\n")
        results.set("copy_bytes_per_second", speed)
        return speed
    side = 8192 if rig.device.is_cuda else 256
    left, right, out = (torch.empty(side, side, dtype=rig.dtype, device=rig.device.place).normal_()
                        for _ in range(3))
    short, long = (2 * side**3 / on_device(rig, lambda: torch.mm(left, right, out=out), count)
                   for count in ((20, 400) if rig.device.is_cuda else (2, 2)))
    say(f"ceiling: a product of {side}x{side}x{side} in {rig.config.compute_dtype}: {short / 1e12:.1f} "
        f"TFLOP/s in 20 of them, {long / 1e12:.1f} in 400, which take as long as the steps below\n")
    results.set("short_product_flops_per_second", short)
    results.set("product_flops_per_second", long)
    return long


def safely(results: Results, what: str, work: Callable[[], None]) -> None:
    """One row's failure is not the next one's."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        say(f"{what}: {type(error).__name__}: {error}\n")
        results.add("failed", {"what": what, "error": f"{type(error).__name__}: {error}"})


# ---- generation ----------------------------------------------------------------------------------


def decode(folder: Path, results: Results) -> None:
    # Room for what grows while it is measured, and for what the executor reserves.
    rig = Rig(folder, max(BATCHES) * (CONTEXT + max(256, 4 * (STEPS + _WARM)) + 2 * options.tokens_per_block),
              captures=True)
    say(rig.stage.in_words() + "\n")
    results.set("stage", rig.stage.in_words())
    say(table("Start of this part", ["part", "time"], rig.start_rows()))
    results.set("decode_start", rig.watch.seconds)
    bandwidth = ceilings(rig, results, copies=True)
    rows: list[list[Any]] = []

    def measured(stage: Any, graphs: Any, attention: Any, name: str) -> None:
        for batch in BATCHES:
            safely(results, f"{name}, batch {batch}", lambda batch=batch: rows.append(  # type: ignore[misc]
                generation_row(rig, results, bandwidth, batch, name, stage, graphs, attention)))

    measured(rig.stage, rig.graphs, rig.attention, "replayed" if rig.graphs is not None else "not captured")
    for batch in BATCHES:
        safely(results, f"executor, batch {batch}", lambda batch=batch: rows.append(  # type: ignore[misc]
            executor_row(rig, results, bandwidth, batch)))
    if options.profile:
        for batch in dict.fromkeys([BATCHES[0], BATCHES[-1]]):
            safely(results, f"profile, batch {batch}", lambda batch=batch: profile_generation(  # type: ignore[misc]
                rig, results, batch))
    if rig.graphs is not None:
        def eager() -> None:
            stage, graphs, attention = rig.make_stage(captures=False, watch=Watch())
            measured(stage, graphs, attention, "not captured")

        safely(results, "steps without graphs", eager)
    say(table(
        "Generation steps", ["batch", "steps", "ms a step", "tokens/s", "floor, ms", "of floor",
                             "floor at 3.0 TB/s, ms", "replay alone, ms", "of floor", "host, ms a step"],
        rows, f"Contexts of {CONTEXT} tokens, steady state: the next step is prepared while one runs. Floor: "
        "weights once and K and V of all contexts, at the speed of the copy above. Replay alone: the "
        "captured step again and again, by the GPU's own clock. Host: from the call that launches a step to "
        "its return; where it is longer than the replay, the GPU waits. Whole executor: replayed steps "
        "with the engine, its scheduler and the responses around them, as a job's leader runs them."))


def generation_row(rig: Rig, results: Results, bandwidth: float, batch: int, name: str, stage: Any,
                   graphs: Any, attention: Any) -> list[Any]:
    driver = Driver(rig, stage)
    requests = running(driver, batch)
    driver.generate(requests, _WARM)
    parts = HostParts(driver, stage, graphs, attention)
    driver.launch_seconds = 0.0
    start_tokens = requests[0].num_computed
    times = driver.generate(requests, STEPS)
    parts.end()
    kv_tokens = batch * (start_tokens + STEPS / 2)
    driver.drain()
    mean = statistics.mean(times)
    spent = {label: seconds / (STEPS + 1) for label, seconds in parts.seconds.items()}
    host = driver.launch_seconds / (STEPS + 1)
    replay = None
    size = graphs.size_for(batch) if graphs is not None else None
    if size is not None:
        replay = on_device(rig, lambda: graphs.replay(size), 20 if rig.device.is_cuda else 2)
    least = SHAPE.generation_bytes(kv_tokens, rig.dtype.itemsize, rig.kv_dtype.itemsize)
    floor = least / bandwidth
    results.add("decode", {
        "batch": batch, "steps": name, "seconds": mean, "median": median(times), "longest": max(times),
        "tokens_per_second": batch / mean, "floor": floor, "floor_at_reference": least / REFERENCE_BANDWIDTH,
        "replay": replay, "host": host, "host_parts": spent})
    split = ", ".join(f"{label} {1e3 * seconds:.2f}" for label, seconds in spent.items())
    say(f"batch {batch}, {name}: {mean * 1e3:.2f} ms a step (median {median(times) * 1e3:.2f}, longest "
        f"{max(times) * 1e3:.2f}), floor {floor * 1e3:.2f}; host {host * 1e3:.2f} ms: {split}\n")
    return [batch, name, f"{mean * 1e3:.2f}", f"{batch / mean:,.0f}", f"{floor * 1e3:.2f}",
            share(floor, mean), f"{least / REFERENCE_BANDWIDTH * 1e3:.2f}",
            f"{replay * 1e3:.2f}" if replay else "", share(floor, replay) if replay else "",
            f"{host * 1e3:.2f}"]


def executor_row(rig: Rig, results: Results, bandwidth: float, batch: int) -> list[Any]:
    """The same step with all that a leader does for it: engine, scheduler and responses; but no messages."""
    from disagg_mpi.comm.channel import MemoryNetwork
    from disagg_mpi.comm.waiting import Doorbell, Waiter
    from disagg_mpi.engine.block_manager import BlockManager
    from disagg_mpi.engine.engine import Engine
    from disagg_mpi.engine.gpu.runner import GpuRunner
    from disagg_mpi.engine.sampler import Sampler
    from disagg_mpi.engine.scheduler import Scheduler
    from disagg_mpi.executor.builtin import BuiltinExecutor
    from disagg_mpi.request import ExecutorLimits, ExecutorRequest, SamplingParams
    from disagg_mpi.transfer.directory import CacheDirectory
    from disagg_mpi.transfer.memory import private_memory
    from disagg_mpi.transfer.mover import Mover
    from disagg_mpi.transfer.transceiver import Transceiver
    from disagg_mpi.transfer.transports import MemoryTransport, MemoryWire

    config, view = rig.config, rig.view
    nothing = private_memory(0)
    channel = MemoryNetwork().channel(1)
    directory = CacheDirectory(rig.arrangement.views, [(1,)])
    # Nothing is handed over: the transport is never asked.
    empty = type(view.layout)(1, 1, 1, 1, 0, view.layout.dtype)
    small = type(view)(1, 0, view.memory, 0, empty, 0, 0, view.shard)
    mover = Mover(directory, 0, 1, channel, MemoryTransport(1, MemoryWire(), nothing, small), None)
    blocks = BlockManager(rig.arrangement.block_ids[0])
    engine = Engine(
        runner=GpuRunner(rig.stage), sampler=Sampler(()), blocks=blocks, eos_token_ids=(),
        scheduler=Scheduler(blocks, tokens_per_block=options.tokens_per_block,
                            max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
                            reserved_output=config.reserved_output),
        transceiver=Transceiver(1, 0, channel, directory, mover))
    executor = BuiltinExecutor(
        engine, ExecutorLimits(
            num_blocks=blocks.num_blocks, tokens_per_block=options.tokens_per_block,
            max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
            max_model_len=rig.spec.max_position_embeddings, vocab_size=SHAPE.vocab,
            reserved_output=config.reserved_output),
        Waiter(Doorbell(f"bench{os.getpid()}", 0, [0], True)))
    chooser = random.Random(batch)
    # Of those that come first while the others' contexts are computed, as many more.
    extra = 2 + -(-batch * CONTEXT // config.token_budget)
    executor.enqueue_requests(
        ExecutorRequest(
            request_id=n, prompt_token_ids=[chooser.randrange(SHAPE.vocab) for _ in range(CONTEXT)],
            sampling=SamplingParams(max_tokens=STEPS + _WARM + extra, ignore_eos=True)) for n in range(batch))
    counts = [0] * batch
    ends: list[float] = []
    positions = 0
    is_over = False
    while not is_over and len(ends) <= STEPS:
        for response in executor.await_responses():
            counts[response.request_id] += len(response.token_ids)
            is_over = is_over or response.is_final
            if response.error:
                raise RuntimeError(response.error)
        if min(counts) >= 2 and not is_over:
            ends.append(time.perf_counter())
            positions = batch * CONTEXT + sum(counts)
    for n in range(batch):
        executor.cancel_request(n)
    executor.shutdown(10)
    if len(ends) < 2:
        raise RuntimeError("the requests did not run together; give more --steps")
    times = [after - before for before, after in itertools.pairwise(ends)]
    mean = statistics.mean(times)
    least = SHAPE.generation_bytes(
        positions - batch * len(times) / 2, rig.dtype.itemsize, rig.kv_dtype.itemsize)
    floor = least / bandwidth
    results.add("decode", {
        "batch": batch, "steps": "whole executor", "seconds": mean, "median": median(times),
        "longest": max(times), "tokens_per_second": batch / mean, "floor": floor,
        "floor_at_reference": least / REFERENCE_BANDWIDTH, "replay": None, "host": None, "host_parts": {}})
    say(f"batch {batch}, whole executor: {mean * 1e3:.2f} ms a step (median {median(times) * 1e3:.2f}, "
        f"longest {max(times) * 1e3:.2f}), floor {floor * 1e3:.2f}\n")
    return [batch, "whole executor", f"{mean * 1e3:.2f}", f"{batch / mean:,.0f}", f"{floor * 1e3:.2f}",
            share(floor, mean), f"{least / REFERENCE_BANDWIDTH * 1e3:.2f}", "", "", ""]


def running(driver: Driver, batch: int) -> list[Any]:
    """Requests whose contexts are in the pool."""
    requests = driver.requests(batch, CONTEXT, room=4 * (STEPS + _WARM))
    for sequence in requests:
        sequence.adopt_context((7,))
    return requests


# ---- context -------------------------------------------------------------------------------------


def prefill(folder: Path, results: Results) -> None:
    rig = Rig(folder, 2 * PROMPT + 8 * options.tokens_per_block, captures=False)
    say(rig.stage.in_words() + "\n")
    say(table("Start of this part", ["part", "time"], rig.start_rows()))
    results.set("prefill_start", rig.watch.seconds)
    peak = ceilings(rig, results, copies=False)
    driver = Driver(rig, rig.stage)
    quarter = PROMPT // 4
    kinds: dict[str, tuple[int, int, list[int]]] = {
        # name → prompts, tokens of each, lengths of the steps that compute them
        f"one prompt of {PROMPT} tokens": (1, PROMPT, [PROMPT]),
        f"4 prompts of {quarter}, one step": (4, quarter, [quarter]),
        f"one prompt of {PROMPT}, 4 steps of {quarter}": (1, PROMPT, [quarter] * 4),
    }
    rows: list[list[Any]] = []
    for name, kind in kinds.items():
        safely(results, name, lambda name=name, kind=kind: rows.append(  # type: ignore[misc]
            context_row(driver, results, peak, name, *kind)))
    if options.profile:
        safely(results, "profile of a context step", lambda: profile(
            rig, results, f"Context step of {PROMPT} tokens",
            lambda: run_contexts(driver, [driver.requests(1, PROMPT)], [PROMPT]), 1))
    say(table(
        "Context steps", ["tokens", "alone", "one after the other", "tokens/s", "TFLOP/s", "of the product",
                          "TFLOP/s, counted as 2 x all parameters x tokens"], rows,
        f"Alone: from the launch to the token at the host, median of {ROUNDS}. One after the other: the next "
        "is launched while one runs; the columns after it are of this. TFLOP/s: what is computed, which is "
        "all matrices but the output layer for every token, that for the last, and causal attention."))


def run_contexts(driver: Driver, prompts: list[list[Any]], steps: list[int]) -> float:
    """Seconds to compute each of these, through its steps, launched ahead."""
    start = time.perf_counter()
    for requests in prompts:
        for length in steps:
            if driver.runner.num_in_flight == driver.runner.depth:
                driver.poll()
            driver.launch([(sequence, length) for sequence in requests])
    driver.drain()
    return time.perf_counter() - start


def context_row(driver: Driver, results: Results, peak: float, name: str, count: int, num_tokens: int,
                steps: list[int]) -> list[Any]:
    def fresh(rounds: int) -> list[list[Any]]:
        return [driver.requests(count, num_tokens) for _ in range(rounds)]

    run_contexts(driver, fresh(1), steps)
    alone = [run_contexts(driver, fresh(1), steps) for _ in range(ROUNDS)]
    driver.launch_seconds = 0.0
    seconds = run_contexts(driver, fresh(ROUNDS), steps) / ROUNDS
    host = driver.launch_seconds / ROUNDS
    starts = itertools.accumulate(steps, initial=0)
    flops = SHAPE.context_flops(
        [chunk for chunk in zip(starts, steps, strict=False) for _ in range(count)], count)
    tokens = count * num_tokens
    plain = 2 * SHAPE.parameters * tokens
    results.add("prefill", {"what": name, "alone": median(alone), "seconds": seconds, "host": host,
                            "flops": flops, "flops_per_second": flops / seconds, "of_product":
                            flops / seconds / peak, "plain_flops_per_second": plain / seconds})
    say(f"{name}: {time_of(median(alone))} alone, {time_of(seconds)} one after the other, host "
        f"{time_of(host)}; {flops / seconds / 1e12:.1f} TFLOP/s, {share(flops / seconds, peak)} of the "
        "product\n")
    return [name, time_of(median(alone)), time_of(seconds), f"{tokens / seconds:,.0f}",
            f"{flops / seconds / 1e12:.1f}", share(flops / seconds, peak), f"{plain / seconds / 1e12:.1f}"]


# ---- start ---------------------------------------------------------------------------------------


def start_once(folder: Path, results: Results) -> None:
    rig = Rig(folder, max(BATCHES) * options.tokens_per_block, captures=True)
    results.add("startup", rig.watch.seconds)


def startup(results: Results) -> bool:
    """Twice: in a folder for built kernels that is empty, and again."""
    with tempfile.TemporaryDirectory() as folder:
        # Of flashinfer, of what torch compiles and of Triton.
        caches = {"FLASHINFER_WORKSPACE_BASE": folder, "TRITON_CACHE_DIR": f"{folder}/triton",
                  "CUDA_CACHE_PATH": f"{folder}/cuda"}
        good = run_parts(("start-once", "start-once"), results, caches)
    found = results.data.get("startup", [])
    names = dict.fromkeys(name for each in found for name in each)
    rows = [[name, *(time_of(each[name]) if name in each else "" for each in found)] for name in names]
    rows.append(["together", *(time_of(sum(each.values())) for each in found)])
    say(table("Start", ["part", "no kernel built yet", "again"][: 1 + len(found)], rows,
              "Of one rank that holds the whole model, whose weights are drawn and not read."))
    return good


# ---- the kernels that take the time --------------------------------------------------------------


def profile_generation(rig: Rig, results: Results, batch: int) -> None:
    driver = Driver(rig, rig.stage)
    requests = running(driver, batch)
    driver.generate(requests, _WARM)
    profile(rig, results, f"Generation step, batch {batch}", lambda: driver.generate(requests, 3), 4)
    driver.drain()


def profile(rig: Rig, results: Results, title: str, work: Callable[[], Any], num_steps: int) -> None:
    """``work`` runs so many steps, with the start of what is launched ahead."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * rig.device.is_cuda
    # Else the profiler closes CUPTI after each profile, under captured steps that go on: pytorch/kineto 1264
    # made that the default, pytorch 112507 had turned it off for crashes with CUDA graphs.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    work()
    rig.device.synchronize()
    with profiler(activities=activities) as found:
        work()
        rig.device.synchronize()
    events = list(found.key_averages())
    kinds = {"on the device": ("self_device_time_total", True)} if rig.device.is_cuda else {}
    kinds["at the host"] = ("self_cpu_time_total", False)
    for where, (attribute, is_device) in kinds.items():
        ours = [each for each in events if ("CUDA" in str(each.device_type)) == is_device]
        times = sorted(((getattr(each, attribute, 0.0), each.key, each.count) for each in ours), reverse=True)
        total = sum(taken for taken, _, _ in times)
        rows = [[name[:90].replace("|", "/"), f"{count / num_steps:g}", f"{taken / num_steps:,.0f}",
                 f"{taken / count:,.1f}", share(taken, total)] for taken, name, count in times[:25]]
        results.add("profile", {"what": title, "where": where, "microseconds": total / num_steps,
                                "rows": rows})
        say(table(f"{title}: {where}", ["what", "calls a step", "µs a step", "µs a call", "share"], rows,
                  f"{total / num_steps / 1e3:.2f} ms a step in all; the 25 that take most."))


def main() -> None:
    end_in_order()
    if options.device == "cuda":
        need_gpus()
    results = Results(options.json, machine=gpu_in_words() if options.device == "cuda" else "emulated")
    if (options.tiny or options.device == "emulated") and not options.child:
        say("A smoke test: of a tiny model, or on the processor. No figure below means anything.\n")
    if options.part == "all":
        good = run_parts(PARTS, results, {})
    elif options.part == "startup":
        good = startup(results)
    else:
        # Whatever hangs, in C or on the GPU: say where, and end.
        faulthandler.dump_traceback_later(options.limit, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            {"decode": decode, "prefill": prefill, "start-once": start_once}[options.part](
                Path(folder), results)
        faulthandler.cancel_dump_traceback_later()
        good = True
    sys.exit(0 if good and not results.data.get("failed") else 1)


if __name__ == "__main__":
    main()
