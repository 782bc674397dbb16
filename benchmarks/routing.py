"""Routing by prefix and conditional disaggregation, replayed on traces of requests in simulated time.

    python benchmarks/routing.py --trace FILE [--load 0.7 0.9] [--context 4] [--cache-tokens N] …

The router, its ledger and the prefix index are the real ones; instances are simulated: a context instance
computes one prompt after the other at ``--seconds-per-token``; a generation instance makes a token for each
of its requests every ``--step-seconds``, and chunks of a local context lengthen its steps. The trace's
arrival times are scaled so that computing every prompt whole keeps the context instances ``--load`` busy.

A trace has a JSON object a line: ``timestamp`` in ms, ``input_length`` and ``output_length`` in tokens and,
where prefixes are shared, ``hash_ids``: one for each ``--tokens-per-block`` tokens of the prompt, equal for
equal prefixes. github.com/kvcache-ai/Mooncake publishes such traces.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import table

from disagg_mpi.orchestrator.prefix_index import PrefixIndex
from disagg_mpi.orchestrator.router import LocalContext, hit_tokens, pick_context, pick_generation
from disagg_mpi.orchestrator.table import InstanceView
from disagg_mpi.request import ExecutorLimits
from disagg_mpi.topology import Role

PickContext = Callable[[list[InstanceView], int, list[int], int], tuple[InstanceView, int]]


@dataclass
class Machine:
    """The simulated job; times in seconds."""

    num_context: int
    num_generation: int
    tokens_per_block: int
    cache_tokens: int
    seconds_per_token: float
    step_seconds: float
    handover_seconds: float
    max_num_tokens: int
    has_shared_pool: bool = False


@dataclass
class Job:
    """One request of the trace."""

    arrival: float
    num_tokens: int
    num_output: int
    hashes: list[int]
    promised: int = 0
    """Tokens that the router expects to be computed."""
    computed: int = 0
    is_local: bool = False
    generation: Any = None
    """Its :class:`Generation`, where that side is simulated."""
    num_blocks: int = 0
    """Promised there."""
    first: float = 0.0
    last: float = 0.0


def held_tokens(cache: PrefixIndex, job: Job, tokens_per_block: int) -> int:
    """Prompt tokens that are really there; the last one is always computed."""
    return cache.match(job.hashes[:(job.num_tokens - 1) // tokens_per_block]) * tokens_per_block


@dataclass
class Context:
    """A context instance: first come, first served, one prompt at a time."""

    view: InstanceView
    cache: PrefixIndex
    machine: Machine
    queue: deque[Job] = field(default_factory=deque)
    end: float = math.inf
    busy: float = 0.0

    def add(self, job: Job, now: float) -> None:
        self.queue.append(job)
        if len(self.queue) == 1:
            self._start(now)

    def finish(self, now: float) -> Job:
        """The head of the queue, at ``end``."""
        job = self.queue.popleft()
        self.cache.insert(job.hashes)
        self.end = math.inf
        if self.queue:
            self._start(now)
        return job

    def _start(self, now: float) -> None:
        job, machine = self.queue[0], self.machine
        job.computed = job.num_tokens - held_tokens(self.cache, job, machine.tokens_per_block)
        seconds = job.computed * machine.seconds_per_token
        self.busy += seconds
        self.end = now + seconds


@dataclass
class Generation:
    """A generation instance: its requests advance together, slower while it computes a local context.

    A step with a chunk of context takes the chunk's seconds and a step's, and gives each request one token:
    ``clock``, in seconds of undisturbed steps, goes on by ``step_seconds`` in that time.
    """

    view: InstanceView
    cache: PrefixIndex
    machine: Machine
    clock: float = 0.0
    time: float = 0.0
    running: list[tuple[float, int, Job]] = field(default_factory=list)
    local: deque[tuple[Job, float]] = field(default_factory=deque)
    """Context phases here, with the seconds of computing that each is to take yet."""

    def _speeds(self) -> tuple[float, float]:
        """Of the requests and of the local context, 1 being undisturbed."""
        if not self.local:
            return 1.0, 0.0
        if not self.running:
            return 0.0, 1.0
        chunk = self.machine.max_num_tokens * self.machine.seconds_per_token
        whole = chunk + self.machine.step_seconds
        return self.machine.step_seconds / whole, chunk / whole

    @property
    def end(self) -> float:
        """When the next request or local context ends."""
        speed, local_speed = self._speeds()
        ends = [math.inf]
        if self.running and speed:
            ends.append(self.time + max(0.0, self.running[0][0] - self.clock) / speed)
        if self.local:
            ends.append(self.time + max(0.0, self.local[0][1]) / local_speed)
        return min(ends)

    def advance(self, now: float) -> None:
        speed, local_speed = self._speeds()
        passed = now - self.time
        self.clock += passed * speed
        if self.local:
            job, left = self.local[0]
            self.local[0] = job, left - passed * local_speed
        self.time = now

    def add(self, job: Job, number: int) -> None:
        seconds = (job.num_output - 1) * self.machine.step_seconds
        heapq.heappush(self.running, (self.clock + seconds, number, job))

    def finish(self) -> tuple[Job, bool]:
        """Whose end is now, and whether only its context phase is over."""
        if self.local and self.local[0][1] <= 1e-9:
            return self.local.popleft()[0], True
        return heapq.heappop(self.running)[2], False


def read(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:
        return sorted((json.loads(line) for line in lines if line.strip()), key=lambda r: r["timestamp"])


class Simulation:
    """The life of requests as the dispatcher leads it: admission, context, hand-over, generation."""

    def __init__(self, machine: Machine, pick: PickContext, local: LocalContext | None = None) -> None:
        self._machine = machine
        self._pick = pick
        self._local = local
        size = machine.tokens_per_block
        num_blocks = machine.cache_tokens // size
        limits = ExecutorLimits(
            num_blocks=num_blocks, tokens_per_block=size, max_batch_size=10**6,
            max_num_tokens=machine.max_num_tokens, max_model_len=10**9, vocab_size=1, reserved_output=1)

        def view(number: int, role: Role) -> InstanceView:
            made = InstanceView(number, role, f"{role} {number}", number, limits, pool=f"{role} {number}")
            made.prefix = PrefixIndex(num_blocks)
            return made

        self._contexts = [Context(view(number, Role.CONTEXT), PrefixIndex(num_blocks), machine)
                          for number in range(machine.num_context)]
        if machine.has_shared_pool:
            held, guessed = (PrefixIndex(num_blocks * machine.num_context) for _ in range(2))
            for context in self._contexts:
                context.cache, context.view.prefix = held, guessed
        self._generations = [Generation(view(number, Role.GENERATION), PrefixIndex(num_blocks), machine)
                             for number in range(machine.num_generation)]
        self._numbers = itertools.count()
        self._waiting: deque[Job] = deque()
        self._handing_over: list[tuple[float, int, Job]] = []

    def run(self, trace: Sequence[dict[str, Any]], scale: float) -> tuple[list[Job], float]:
        """Every request's fate, and the share of time that context instances were busy."""
        jobs = [self._job(row, scale) for row in trace]
        arrivals = deque(jobs)
        last_context = 0.0
        while True:
            context = min(self._contexts, key=lambda c: c.end)
            generation = min(self._generations, key=lambda g: g.end, default=None)
            ends = (context.end, generation.end if generation else math.inf,
                    self._handing_over[0][0] if self._handing_over else math.inf,
                    arrivals[0].arrival if arrivals else math.inf)
            now = min(ends)
            if now == math.inf:
                break
            for each in self._generations:
                each.advance(now)
            if ends[0] == now:
                last_context = now
                self._end_context(context, now)
            elif generation is not None and ends[1] == now:
                job, is_context = generation.finish()
                if is_context:
                    job.first = now
                    self._generate(job, now)
                else:
                    self._leave(job, now)
            elif ends[2] == now:
                if self._local is not None:
                    self._local.observe_handover(self._machine.handover_seconds)
                self._generate(heapq.heappop(self._handing_over)[2], now)
            else:
                self._waiting.append(arrivals.popleft())
            while self._waiting and self._admit(self._waiting[0], now):
                self._waiting.popleft()
        busy = sum(context.busy for context in self._contexts)
        return jobs, busy / last_context / len(self._contexts) if last_context else 0.0

    def _job(self, row: dict[str, Any], scale: float) -> Job:
        tokens = row["input_length"]
        return Job(row["timestamp"] / 1000 / scale, tokens, row["output_length"],
                   row.get("hash_ids", [])[:tokens // self._machine.tokens_per_block])

    def _admit(self, job: Job, now: float) -> bool:
        """Choose the instances; ``False`` if no generation instance has room."""
        machine, size = self._machine, self._machine.tokens_per_block
        if self._generations:
            job.num_blocks = -(-(job.num_tokens + job.num_output) // size)
            view = pick_generation([g.view for g in self._generations], job.num_blocks, job.hashes)
            if view is None:
                return False
            job.generation = self._generations[view.id]
            view.free_blocks -= job.num_blocks
            view.num_requests += 1
        chosen, held = self._pick(
            [context.view for context in self._contexts], job.num_tokens, job.hashes, size)
        if job.generation is not None:
            view = job.generation.view
            here = job.num_tokens - hit_tokens(view, job.num_tokens, job.hashes, size)
            job.is_local = self._local is not None and self._local.is_local(
                here, chosen.pending_context_tokens, view.num_requests - 1, job.num_tokens - held)
            view.prefix.insert(job.hashes)
            if job.is_local:
                job.computed = job.num_tokens - held_tokens(job.generation.cache, job, size)
                job.generation.local.append((job, job.computed * machine.seconds_per_token))
                return True
        job.promised = job.num_tokens - held
        chosen.pending_context_tokens += job.promised
        chosen.num_requests += 1
        chosen.prefix.insert(job.hashes)
        self._contexts[chosen.id].add(job, now)
        return True

    def _end_context(self, context: Context, now: float) -> None:
        job = context.finish(now)
        job.first = now
        context.view.pending_context_tokens -= job.promised
        context.view.num_requests -= 1
        if self._local is not None:
            self._local.observe_context(job.computed, job.computed * self._machine.seconds_per_token)
        if self._generations:
            heapq.heappush(self._handing_over,
                           (now + self._machine.handover_seconds, next(self._numbers), job))

    def _generate(self, job: Job, now: float) -> None:
        job.generation.cache.insert(job.hashes)
        if job.num_output > 1:
            job.generation.add(job, next(self._numbers))
        else:
            self._leave(job, now)

    def _leave(self, job: Job, now: float) -> None:
        job.last = now
        view = job.generation.view
        view.free_blocks += job.num_blocks
        view.num_requests -= 1


def in_turn() -> PickContext:
    turn = itertools.count()

    def pick(views: list[InstanceView], num_tokens: int, hashes: list[int], size: int
             ) -> tuple[InstanceView, int]:
        view = views[next(turn) % len(views)]
        return view, hit_tokens(view, num_tokens, hashes, size)

    return pick


def least_loaded(views: list[InstanceView], num_tokens: int, hashes: list[int], size: int
                 ) -> tuple[InstanceView, int]:
    view, _ = pick_context(views, num_tokens, (), size)
    return view, hit_tokens(view, num_tokens, hashes, size)


def weighing(weight: float) -> PickContext:
    """The real router with another weight; 1: the earliest first token for each request by itself."""
    return lambda views, num_tokens, hashes, size: pick_context(views, num_tokens, hashes, size, weight)


def quantiles(values: list[float]) -> list[str]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [f"{value:.2f}" for value in (statistics.fmean(values), cuts[49], cuts[89], cuts[98])]


def routers(trace: Sequence[dict[str, Any]], loads: Sequence[float], machine: Machine, name: str) -> str:
    """The context side alone: which instance computes a prompt."""
    policies: list[tuple[str, PickContext, bool]] = [
        ("in turn", in_turn(), False), ("least loaded", least_loaded, False),
        ("prefix, load weight 1", weighing(1.0), False), ("prefix", pick_context, False),
        ("least loaded, one pool shared by all", least_loaded, True)]
    rows = []
    for load in loads:
        scale = scale_for(trace, load, machine)
        for label, pick, is_shared in policies:
            model = replace(machine, num_generation=0, has_shared_pool=is_shared)
            jobs, busy = Simulation(model, pick).run(trace, scale)
            hit = 1 - sum(job.computed for job in jobs) / sum(job.num_tokens for job in jobs)
            rows.append([f"{load:.2f} (x{scale:.2f})", label, f"{hit:.1%}", f"{busy:.0%}",
                         *quantiles([job.first - job.arrival for job in jobs])])
    return table(
        f"Routers on {name}",
        ["load (rate)", "router", "hit rate", "busy", "TTFT mean", "P50", "P90", "P99"], rows,
        f"{len(trace):,} requests, {machine.num_context} context instances of "
        f"{1 / machine.seconds_per_token:,.0f} tokens/s, each with a cache of "
        f"{machine.cache_tokens:,} tokens. Hit rate: of prompt tokens. Simulated seconds.")


def local_contexts(
    trace: Sequence[dict[str, Any]], loads: Sequence[float], machine: Machine, thresholds: Sequence[int],
    name: str,
) -> str:
    """Both sides: whether a prompt is computed on a context instance or on its generation instance."""
    rows = []
    for load in loads:
        scale = scale_for(trace, load, machine)
        for threshold in [*sorted({0, *thresholds}), None]:
            local = LocalContext(threshold, machine.max_num_tokens)
            jobs, busy = Simulation(machine, pick_context, local).run(trace, scale)
            label = {0: "never", None: "auto"}.get(threshold, f"at most {threshold} tokens")
            each = [(job.last - job.first) / (job.num_output - 1) * 1e3 for job in jobs if job.num_output > 1]
            mean, _, p90, p99 = quantiles([job.first - job.arrival for job in jobs])
            per_token, _, per_token_90, _ = quantiles(each)
            total = statistics.fmean(job.last - job.arrival for job in jobs)
            share = sum(job.is_local for job in jobs) / len(jobs)
            rows.append([f"{load:.2f} (x{scale:.2f})", label, f"{share:.0%}", f"{busy:.0%}", mean, p90, p99,
                         per_token, per_token_90, f"{total:.2f}"])
    return table(
        f"Conditional disaggregation on {name}",
        ["load (rate)", "context phase at the generation instance", "of requests", "context busy",
         "TTFT mean", "P90", "P99", "ms a token, mean", "P90", "submission to last token, mean"], rows,
        f"{machine.num_context} context instances of {1 / machine.seconds_per_token:,.0f} tokens/s, "
        f"{machine.num_generation} generation instances with steps of "
        f"{machine.step_seconds * 1e3:g} ms and at most {machine.max_num_tokens} tokens, hand-over "
        f"{machine.handover_seconds * 1e3:g} ms. Simulated seconds.")


def scale_for(trace: Sequence[dict[str, Any]], load: float, machine: Machine) -> float:
    """What arrival rates are multiplied by, so that the prompts whole are ``load`` of the capacity."""
    seconds = (trace[-1]["timestamp"] - trace[0]["timestamp"]) / 1000
    tokens = sum(row["input_length"] for row in trace)
    return load * machine.num_context / machine.seconds_per_token / (tokens / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--load", type=float, nargs="+", default=[0.7, 0.9, 1.1],
                        help="tokens that arrive / tokens that the context instances compute without reuse")
    parser.add_argument("--context", type=int, default=4, help="context instances")
    parser.add_argument("--generation", type=int, default=4,
                        help="generation instances; 0: no table of conditional disaggregation")
    parser.add_argument("--tokens-per-block", type=int, default=512, help="tokens for each of hash_ids")
    parser.add_argument("--cache-tokens", type=int, default=3_000_000, help="of one instance")
    parser.add_argument("--seconds-per-token", type=float, default=1e-4, help="of context")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="of generation")
    parser.add_argument("--handover-seconds", type=float, default=0.02)
    parser.add_argument("--max-num-tokens", type=int, default=2048, help="token budget of a generation step")
    parser.add_argument("--threshold", type=int, nargs="*", default=[256, 2048],
                        help="of local context phases")
    options = parser.parse_args()
    trace = read(options.trace)
    machine = Machine(
        num_context=options.context, num_generation=options.generation,
        tokens_per_block=options.tokens_per_block, cache_tokens=options.cache_tokens,
        seconds_per_token=options.seconds_per_token, step_seconds=options.step_seconds,
        handover_seconds=options.handover_seconds, max_num_tokens=options.max_num_tokens)
    print(routers(trace, options.load, machine, options.trace.stem))
    if options.generation:
        print(local_contexts(trace, options.load, machine, options.threshold, options.trace.stem))


if __name__ == "__main__":
    main()
