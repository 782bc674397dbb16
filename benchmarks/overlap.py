"""What a hand-over between hosts costs a request, in one piece and while the prompt is computed.

Two emulated hosts (``tests/hosts``) and a link of stated bandwidth between them: rank 0 and the context
instance on one, the generation instance on the other, one compute thread each. Prompts come one at a time.

    python benchmarks/overlap.py RATE[,RATE…]                the tables; a rate in tc's words
    python benchmarks/overlap.py serve TOKENS[,…] OVERLAP_TOKENS RESULT       a job's part, under mpirun
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import HERE, median, random_prompt, size_of, table, time_of, verdict

ROUNDS = 3
PROMPTS = (300, 600, 1100, 2000, 4000)
NUM_OUTPUT_TOKENS = 64
ALWAYS, NEVER = 1, 1_000_000
AIM_FROM, AIM_PERCENT = 1000, 1.0


def serve(lengths: list[int], overlap_tokens: int, target: Path) -> None:
    import disagg_mpi as dm

    config = dm.JobConfig(context=1, generation=1, threads=1, prefix_cache=False,
                          overlap_tokens=overlap_tokens)
    with dm.launch(config) as orchestrator:
        if orchestrator is None:
            return
        params = dm.SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        found: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
        orchestrator.submit(random_prompt(lengths[0], 0), params).result()
        for turn in range(1, ROUNDS + 1):
            for length in lengths:
                timing = orchestrator.submit(random_prompt(length, turn), params).result().timing
                found[length].append({
                    "exposed": timing.handover, "transfer": timing.transfer, "total": timing.total,
                    "ttft": timing.ttft, "bytes": timing.handover_bytes, "way": timing.transport})
        target.write_text(json.dumps(found))


def measure(rate: str, overlap_tokens: int) -> dict[int, dict[str, float]]:
    """Prompt length → medians. Raises :class:`OSError` where hosts or their links cannot be made."""
    from emulated import EmulatedHosts, run_on_hosts

    with tempfile.TemporaryDirectory() as folder, EmulatedHosts(["hA", "hB"], rate=rate) as hosts:
        target = Path(folder) / "result.json"
        done = run_on_hosts(
            hosts, {"hA": 2, "hB": 1},
            [str(HERE / "overlap.py"), "serve", ",".join(map(str, PROMPTS)), str(overlap_tokens),
             str(target)],
            timeout=600)
        if done.returncode != 0:
            sys.exit(done.text)
        found = json.loads(target.read_text())
    medians = {}
    for length, runs in found.items():
        assert all(run["way"] == "mpi" for run in runs)
        medians[int(length)] = {name: median([run[name] for run in runs])
                                for name in ("exposed", "transfer", "total", "ttft", "bytes")}
    return medians


def compare(rate: str) -> str:
    found = {overlap: measure(rate, overlap) for overlap in (NEVER, ALWAYS)}
    rows = []
    for length in PROMPTS:
        whole, pieces = (found[overlap][length] for overlap in (NEVER, ALWAYS))
        share = pieces["exposed"] / pieces["total"] * 100
        rows.append([
            f"{length:,}", size_of(whole["bytes"]), time_of(whole["exposed"]),
            f"{whole['exposed'] / whole['total'] * 100:.1f} %", time_of(whole["total"]),
            time_of(pieces["exposed"]), f"{share:.1f} %", time_of(pieces["total"]),
            time_of(pieces["transfer"]),
            verdict(share, AIM_PERCENT, at_most=True) if length >= AIM_FROM else ""])
    return table(
        f"Overlap of hand-over and prompt between two hosts, {rate}",
        ["prompt, tokens", "KV-cache", "in one piece: exposed", "of the request", "request",
         "overlapped: exposed", "of the request", "request", "first byte to last",
         f"aim, % from {AIM_FROM:,} tokens on"], rows,
        f"Default model, one thread a rank, {NUM_OUTPUT_TOKENS} tokens out, one request at a time, medians "
        f"of {ROUNDS}. Exposed: how long generation waited for the KV-cache after the prompt was computed.")


def main(rates: list[str]) -> str:
    # Hosts and what runs on them end with this process, if it is let.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    tests = HERE.parent / "tests"
    sys.path[:0] = [str(tests / "hosts"), str(tests)]
    from emulated import why_not

    title = "### Overlap of hand-over and prompt between two hosts"
    reason = why_not()
    if reason is not None:
        return f"{title}\n\nNot measured: {reason}.\n"
    texts = []
    for rate in rates:
        try:
            texts.append(compare(rate))
        except OSError as error:  # a kernel that cannot limit a link
            texts.append(f"{title}, {rate}\n\nNot measured: {error}.\n")
    return "\n".join(texts)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve([int(length) for length in sys.argv[2].split(",")], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        print(main(sys.argv[1].split(",")))
