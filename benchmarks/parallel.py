"""One instance on several ranks: what a step takes, what a rank holds, what the ranks add up.

Run by ``run_all.py``. A random Llama whose heads divide by 1, 2 and 4, one compute thread a rank; the ranks
of an instance are processes of one host.

    python benchmarks/parallel.py table [SHAPE…]                   tp1 tp2 pp2, or others
    python benchmarks/parallel.py save FOLDER                      the model
    python benchmarks/parallel.py serve SHAPE FOLDER RESULT        a job's part, under mpirun
    python benchmarks/parallel.py sums RESULT                      MPI_Allreduce alone, under mpirun
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median, random_prompt, run_under_mpi, size_of, table, time_of

from disagg_mpi.shapes import parse_instances

ROUNDS = 3
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, CHUNK = 1024, 33, 256
BATCHES = (1, 8)
HIDDEN, LAYERS, VOCABULARY = 1024, 16, 8192
SHAPES = ("tp1", "tp2", "pp2")
# A layer's two rowwise products and the embedding.
SUMS_A_STEP = 2 * LAYERS + 1


def save(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2816, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)).save_pretrained(folder)


def serve(shape: str, folder: Path, target: Path) -> None:
    import disagg_mpi as dm

    config = dm.JobConfig(model=str(folder), aggregated=shape, threads=1, prefix_cache=False,
                          max_num_tokens=CHUNK)
    with dm.launch(config) as orchestrator:
        if orchestrator is not None:
            target.write_text(json.dumps(_measure(orchestrator)))


def _measure(orchestrator: Any) -> dict[str, Any]:
    import disagg_mpi as dm

    def answer(batch: int, num_tokens: int, num_output: int, seed: int) -> list[dm.Timing]:
        params = dm.SamplingParams(max_tokens=num_output, ignore_eos=True)
        handles = [orchestrator.submit(random_prompt(num_tokens, seed + n), params) for n in range(batch)]
        return [handle.result().timing for handle in handles]

    answer(1, CHUNK, 4, 0)
    found: dict[str, Any] = {
        "prefill": median([answer(1, NUM_PROMPT_TOKENS, 1, turn)[0].ttft for turn in range(ROUNDS)])}
    for batch in BATCHES:
        found[f"decode {batch}"] = median([
            statistics.median(timing.tpot for timing in answer(batch, 8, NUM_OUTPUT_TOKENS, turn))
            for turn in range(ROUNDS)])
    found["memory"] = _resident()
    return found


def _resident() -> list[dict[str, int]]:
    """Bytes of each engine rank of this job, in no order: with, and without, what others map too."""
    import psutil

    me = psutil.Process()
    found = []
    for process in me.parent().children():
        if process.pid != me.pid:
            memory = process.memory_full_info()
            found.append({"resident": memory.rss, "own": memory.uss})
    return found


def sums(target: Path) -> None:
    """Median seconds of one sum of ``[tokens, HIDDEN]`` over all ranks, by number of tokens."""
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    found = {}
    for tokens in (*BATCHES, CHUNK):
        array = np.zeros((tokens, HIDDEN), dtype=np.float32)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            world.Allreduce(MPI.IN_PLACE, [array, MPI.FLOAT])
            times.append(time.perf_counter() - start)
        found[tokens] = median(times)
    if world.rank == 0:
        target.write_text(json.dumps(found))


def main(shapes: list[str]) -> str:
    rows, baseline = [], None
    alone: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        for shape in shapes:
            (instance,) = parse_instances(shape)
            found = run_under_mpi(1 + instance.num_ranks, "parallel.py", "serve", shape, name)
            if instance.tp > 1 and instance.tp not in alone:
                alone[instance.tp] = run_under_mpi(instance.tp, "parallel.py", "sums")
            baseline = baseline or found
            times = [found["prefill"], *(found[f"decode {batch}"] for batch in BATCHES)]
            first = [baseline["prefill"], *(baseline[f"decode {batch}"] for batch in BATCHES)]
            rows.append([
                shape, f"{NUM_PROMPT_TOKENS / times[0]:,.0f} ({first[0] / times[0]:.2f})",
                *(f"{time_of(t)} ({f / t:.2f})" for f, t in zip(first[1:], times[1:], strict=True)),
                ", ".join(size_of(memory["resident"]) for memory in found["memory"]),
                ", ".join(size_of(memory["own"]) for memory in found["memory"])])
    steps = table(
        "Tensor and pipeline parallelism: one instance, one thread a rank",
        ["shape", "prefill, tokens/s",
         *(f"time per output token, batch {batch}" for batch in BATCHES), "resident, each rank",
         "its own"], rows,
        f"Llama with random weights: hidden size {HIDDEN}, {LAYERS} layers, 16 heads, 4 of KV, fp32. "
        f"Prompts of {NUM_PROMPT_TOKENS:,} tokens in chunks of {CHUNK}; medians of {ROUNDS}. In brackets: "
        "times as fast as the first row. Stages overlap only where several chunks or requests are there. "
        "Resident counts the mapped weights that a rank has touched and its part of the pool; its own is "
        "what no other process maps, so of one rank alone all of it.")
    return steps + "\n" + _table_of_sums(alone)


def _table_of_sums(alone: dict[int, dict[str, float]]) -> str:
    rows = []
    for tp, found in alone.items():
        for tokens, seconds in found.items():
            num_bytes = int(tokens) * HIDDEN * 4
            rows.append([f"tp{tp}", tokens, size_of(num_bytes), time_of(seconds),
                         size_of(SUMS_A_STEP * num_bytes), time_of(SUMS_A_STEP * seconds)])
    return table("Sums over the ranks of a stage: MPI_Allreduce alone",
                 ["shape", "tokens in the step", "one sum", "time", "a step", "its sums' time"], rows,
                 f"{SUMS_A_STEP} sums a step, of fp32.")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "serve":
        serve(arguments[0], Path(arguments[1]), Path(arguments[2]))
    elif command == "sums":
        sums(Path(arguments[0]))
    else:
        print(main(arguments or list(SHAPES)))
