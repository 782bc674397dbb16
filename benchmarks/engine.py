"""Prefill and decode against transformers' own ``generate``, and llama.cpp where it is installed.

One process, the same weights in fp32, the same prompts, the same threads; the engines take turns and the
ratio is taken round by round, because the machine's speed drifts. Ours is the whole executor: scheduling,
paged attention, sampling, text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from common import median, table, verdict

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, ROUNDS = 512, 33, 3
THREADS = int(os.environ.get("THREADS", len(os.sched_getaffinity(0))))
AIMS = {1: (1.1, 1.5), 8: (1.1, 1.3)}

Measure = Callable[[list[list[int]]], tuple[float, float]]
"""Prompts → seconds to all first tokens, seconds for all the next ones."""


def ours(model: Path) -> Measure:
    """An aggregated instance of one rank, made without MPI: it needs no messages."""
    from disagg_mpi.comm.channel import MemoryNetwork
    from disagg_mpi.comm.waiting import Doorbell, Waiter
    from disagg_mpi.config import JobConfig
    from disagg_mpi.engine.attention import KvPool
    from disagg_mpi.engine.block_manager import BlockManager
    from disagg_mpi.engine.engine import Engine
    from disagg_mpi.engine.model import StageModel
    from disagg_mpi.engine.runner import Runner, StageRunner
    from disagg_mpi.engine.sampler import Sampler
    from disagg_mpi.engine.scheduler import Scheduler
    from disagg_mpi.engine.tensor_parallel import ModelShard
    from disagg_mpi.executor.builtin import BuiltinExecutor
    from disagg_mpi.job.arrangement import arrange
    from disagg_mpi.model.checkpoint import read_model_spec
    from disagg_mpi.model.tokenizer import Detokenizer, Tokenizer
    from disagg_mpi.request import ExecutorLimits, ExecutorRequest, SamplingParams
    from disagg_mpi.topology import build_topology
    from disagg_mpi.transfer.directory import CacheDirectory
    from disagg_mpi.transfer.memory import private_memory
    from disagg_mpi.transfer.mover import Mover
    from disagg_mpi.transfer.transceiver import Transceiver
    from disagg_mpi.transfer.transports import MemoryTransport, MemoryWire

    # The prompts are the same in every round, so none of them may be reused.
    config = JobConfig(aggregated=1, transport="mpi", kv_tokens=8192, prefix_cache=False)
    spec = read_model_spec(model)
    topology = build_topology(config)
    places = arrange(config, topology, [0] * topology.world_size, spec)
    (group,) = topology.groups
    rank, view = group.leader, places.views[group.leader]
    memory, layout = private_memory(places.private_bytes[rank]), view.layout
    directory = CacheDirectory(places.views, [group.ranks])
    channel = MemoryNetwork().channel(rank)
    mover = Mover(directory, group.instance_id, rank, channel,
                  MemoryTransport(rank, MemoryWire(), memory, view), None)
    stage = StageRunner(
        StageModel(model, dtype="fp32", shard=ModelShard(), link=None), KvPool(memory, view), None)
    stage.warm_up()
    blocks = BlockManager(places.block_ids[group.instance_id])
    engine = Engine(
        runner=Runner(stage, layout=layout), sampler=Sampler(()), blocks=blocks, eos_token_ids=(),
        scheduler=Scheduler(
            blocks, tokens_per_block=layout.tokens_per_block, max_batch_size=config.max_batch_size,
            max_num_tokens=config.token_budget, reserved_output=config.reserved_output),
        transceiver=Transceiver(rank, group.instance_id, channel, directory, mover))
    limits = ExecutorLimits(
        num_blocks=layout.num_blocks, tokens_per_block=layout.tokens_per_block,
        max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
        max_model_len=spec.max_position_embeddings, vocab_size=spec.vocab_size,
        reserved_output=config.reserved_output)
    tokenizer = Tokenizer(model)
    executor = BuiltinExecutor(engine, limits, Waiter(Doorbell(f"bench{os.getpid()}", 0, [0], True)),
                               lambda: Detokenizer(tokenizer))

    def measure(prompts: list[list[int]]) -> tuple[float, float]:
        params = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        start = time.perf_counter()
        executor.enqueue_requests(
            ExecutorRequest(request_id=n, prompt_token_ids=prompt, sampling=params)
            for n, prompt in enumerate(prompts))
        seen: set[int] = set()
        open_requests, first = len(prompts), 0.0
        decoded = 0
        while open_requests:
            for response in executor.await_responses():
                seen.add(response.request_id)
                open_requests -= response.is_final
                # Tokens that were decoded while others still waited for their first count as decode.
                decoded += bool(first)
            if not first and len(seen) == len(prompts):
                first = time.perf_counter() - start
        total = time.perf_counter() - start
        wanted = len(prompts) * (NUM_OUTPUT_TOKENS - 1)
        return first, (total - first) * wanted / max(decoded, 1)

    return measure


def transformers_generate(model_path: Path) -> Measure:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def measure(prompts: list[list[int]]) -> tuple[float, float]:
        clock = Clock()
        start = time.perf_counter()
        ids = torch.tensor(prompts)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_OUTPUT_TOKENS,
                       min_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=0,
                       stopping_criteria=StoppingCriteriaList([clock]))
        return clock.times[0] - start, clock.times[-1] - clock.times[0]

    return measure


def llama_cpp(gguf: Path) -> Measure:
    """llama-cpp-python on an F32 GGUF; batch 1 only, its Python API has no other."""
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def measure(prompts: list[list[int]]) -> tuple[float, float]:
        (prompt,) = prompts
        model.reset()
        start = time.perf_counter()
        tokens = model.generate(prompt, temp=0.0, reset=True)
        next(tokens)
        first = time.perf_counter() - start
        for _ in range(NUM_OUTPUT_TOKENS - 1):
            next(tokens)
        return first, time.perf_counter() - start - first

    return measure


def main(model: Path) -> str:
    import random

    chooser = random.Random(1)
    engines = {"disagg_mpi": ours(model), "transformers": transformers_generate(model)}
    gguf = os.environ.get("LLAMA_CPP_GGUF")
    notes = (f"{NUM_PROMPT_TOKENS} tokens in, {NUM_OUTPUT_TOKENS} out, fp32, {THREADS} threads, medians of "
             f"{ROUNDS}.")
    if gguf and find_spec("llama_cpp"):
        engines["llama.cpp"] = llama_cpp(Path(gguf))
    else:
        notes += (" llama.cpp: not compared (install llama-cpp-python and name an F32 GGUF in "
                  "LLAMA_CPP_GGUF).")
    rows = []
    for batch in (1, 8):
        prompts = [[chooser.randrange(100, 40000) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(batch)]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, measure in engines.items():
                if name == "llama.cpp" and batch > 1:
                    continue
                times = measure(prompts)
                if turn:  # the first warms up
                    found[name].append(times)
        for phase, count in ((0, NUM_PROMPT_TOKENS), (1, NUM_OUTPUT_TOKENS - 1)):
            speeds = {name: median([batch * count / times[phase] for times in runs])
                      for name, runs in found.items() if runs}
            what = ("prefill", "decode")[phase]
            for other in [name for name in speeds if name != "disagg_mpi"]:
                ratio = median([theirs[phase] / mine[phase] for mine, theirs in
                                zip(found["disagg_mpi"], found[other], strict=True)])
                aim = AIMS[batch][phase] if other == "transformers" else 1.0
                rows.append([what, batch, f"{speeds['disagg_mpi']:.1f}", other, f"{speeds[other]:.1f}",
                             f"{ratio:.2f}", verdict(ratio, aim)])
    return table("Engine: tokens a second", ["phase", "batch", "disagg_mpi", "against", "its tokens/s",
                                             "ratio", "aim"], rows, notes)


if __name__ == "__main__":
    from disagg_mpi.comm import environment

    environment.apply(num_threads=THREADS)
    import torch

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    print(main(Path(sys.argv[1])))
