"""The job itself across hosts: the same text, KV-cache by messages, and one end for all."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from emulated import EmulatedHosts, HostsJob, run_on_hosts
from mpirun import JobResult

PROMPT = "Machine learning is"
RUN = ["-m", "disagg_mpi", "run"]

pytestmark = pytest.mark.model


def run(hosts: EmulatedHosts, layout: dict[str, int], *arguments: str) -> JobResult:
    result = run_on_hosts(hosts, layout, [*RUN, "--max-tokens", "8", "--check", *arguments], timeout=90)
    assert result.returncode == 0, result.text
    assert "integrity: no block and no transfer is left over" in result.stderr, result.text
    return result


def test_context_and_generation_on_two_hosts_answer_as_on_one(two_hosts: EmulatedHosts, model: Path) -> None:
    one = run(two_hosts, {"hA": 3}, "--prompt", PROMPT)
    two = run(two_hosts, {"hA": 2, "hB": 1}, "--prompt", PROMPT)
    assert "hand-over: one shared pool on a host, 0 bytes to move\n" in one.stderr, one.text
    assert "hand-over: MPI messages\n" in two.stderr, two.text
    assert "(mpi)" in two.stdout, two.text
    answers = [result.stdout.split("\n\n")[0] for result in (one, two)]
    assert answers[0].startswith(PROMPT) and answers[0] == answers[1]
    for text in (one.stderr, two.stderr):
        assert "Error" not in text


def test_each_pair_goes_its_own_way(two_hosts: EmulatedHosts, model: Path, tmp_path: Path) -> None:
    """Context 0 on hA, context 1 and generation 0 on hB: one pair by messages, one in the shared pool."""
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(json.dumps({"id": str(n), "prompt": PROMPT}) + "\n" for n in range(4)))
    result = run(two_hosts, {"hA": 2, "hB": 2}, "--context", "2", "--input", str(questions),
                 "--output", str(answers))
    assert ("hand-over: one shared pool on a host, 0 bytes to move and MPI messages\n"
            in result.stderr), result.text
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(found) == 4
    assert len({data["text"] for data in found}) == 1


def test_a_killed_rank_ends_the_job_on_every_host(two_hosts: EmulatedHosts, model: Path) -> None:
    arguments = [*RUN, "--prompt", PROMPT, "--max-tokens", "4000", "--ignore-eos"]
    with HostsJob(two_hosts, {"hA": 2, "hB": 1}, arguments) as job:
        job.wait_for(PROMPT + " a process")
        job.send_signal(signal.SIGKILL, rank=2)
        result = job.finish(10)
    assert result.returncode != 0
    result.assert_clean()
