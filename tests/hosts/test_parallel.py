"""Across hosts: instances that span them, prompts handed over while they are computed, prefixes reused.

Answers are held against those of one plain instance on one host; where the two likeliest tokens are all but
equal, another order of additions may choose the other.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emulated import EmulatedHosts, HostsJob, run_on_hosts
from mpirun import JobResult
from reference import compare, prompts

SCRIPTS = Path(__file__).parent / "scripts"
MAX_TOKENS = 8
ALL = prompts()
SHORT = [ALL[number] for number in (0, 1, 4, 11)]
MIDDLE = [ALL[number] for number in (28, 29, 31, 33)]
"""About 100 to 220 tokens: several blocks."""
LONG = ALL[-1]
"""1,156 tokens, 53 MB of KV-cache: above the default of --overlap-tokens."""

Answers = list[list[dict[str, Any]]]

pytestmark = pytest.mark.model


def ask(hosts: EmulatedHosts, layout: dict[str, int], folder: Path, rounds: list[list[str]],
        **config: Any) -> tuple[JobResult, Answers]:
    """A job's answers, round by round; its end was an orderly one."""
    # One thread each, and pools that fit a few of the longest prompts.
    settings, questions, answers = (folder / name for name in ("config.json", "rounds.json", "answers.json"))
    settings.write_text(json.dumps({"threads": 1, "kv_tokens": 4096, **config}))
    questions.write_text(json.dumps(rounds))
    job = run_on_hosts(hosts, layout, [str(SCRIPTS / "ask.py"), str(settings), str(questions), str(answers),
                                       str(MAX_TOKENS)], timeout=180)
    assert job.returncode == 0, job.text
    assert "integrity holds" in job.stdout, job.text
    return job, json.loads(answers.read_text())


@pytest.fixture(scope="session")
def plain(two_hosts: EmulatedHosts, model: Path, tmp_path_factory: pytest.TempPathFactory
          ) -> dict[str, dict[str, Any]]:
    """Prompt → what one instance that does both phases answers."""
    asked = [*SHORT, *MIDDLE, LONG]
    _, (answers,) = ask(two_hosts, {"hA": 2}, tmp_path_factory.mktemp("plain"), [asked], aggregated=1)
    return dict(zip(asked, answers, strict=True))


def slow_link(emulate: Callable[..., EmulatedHosts], rate: str) -> EmulatedHosts:
    """Hosts hA and hB with a link of so much."""
    try:
        return emulate("hA", "hB", rate=rate)
    except OSError as error:
        pytest.skip(f"this kernel cannot limit a link: {error}")


def assert_same(found: list[dict[str, Any]], asked: list[str], plain: dict[str, dict[str, Any]]) -> None:
    problems, near_ties = compare("across hosts", [answer["token_ids"] for answer in found],
                                  [plain[prompt] for prompt in asked])
    assert not problems, "\n".join(problems)
    assert len(near_ties) < len(asked), "\n".join(near_ties)


def test_an_instance_that_spans_hosts(two_hosts: EmulatedHosts, plain: dict[str, dict[str, Any]],
                                      tmp_path: Path) -> None:
    """Context tp3 on hA, hA, hB, generation pp2 on hA, hB: half of the pairs by copy, half by messages."""
    asked = [*SHORT[:2], *MIDDLE[:2]]
    job, (found,) = ask(
        two_hosts, {"hA": 4, "hB": 2}, tmp_path, [asked],
        context="tp3", context_participant_ids="1,2,4", generation="pp2", generation_participant_ids="3,5")
    assert "hand-over: MPI messages\n" in job.stderr, job.text
    assert_same(found, asked, plain)
    for answer in found:
        timing = answer["timing"]
        assert timing["transport"] == "mpi"
        assert timing["handover_bytes"] == timing["kv_bytes"] > 0


def test_a_long_prompt_passes_while_it_is_computed(emulate: Callable[..., EmulatedHosts],
                                                   plain: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """At 1 Gbit/s its KV-cache takes about 0.45 s, of which the reader waits for hardly any."""
    hosts = slow_link(emulate, "1gbit")
    _, rounds = ask(hosts, {"hA": 2, "hB": 1}, tmp_path, [[LONG], [LONG]])
    _, (whole,) = ask(hosts, {"hA": 2, "hB": 1}, tmp_path, [[LONG]], overlap_tokens=1_000_000)
    for found in (*rounds, whole):
        assert_same(found, [LONG], plain)
    pieces, again, at_once = (found[0]["timing"] for found in (*rounds, whole))
    for timing in (pieces, at_once):
        assert timing["transport"] == "mpi"
        assert timing["handover_bytes"] == timing["kv_bytes"] > 50e6
    assert pieces["transfer"] > pieces["handover"]
    assert pieces["handover"] < at_once["handover"] / 10, (pieces, at_once)
    # What the generation's pool holds since the first time does not pass again.
    assert again["held_tokens"] >= 1100 and again["cached_tokens"] >= 1100, again
    assert again["handover_bytes"] < pieces["handover_bytes"] / 10, again


def test_given_up_in_the_middle_of_a_hand_over(emulate: Callable[..., EmulatedHosts], model: Path,
                                               tmp_path: Path) -> None:
    """At 400 Mbit/s bytes are on their way at most moments."""
    hosts = slow_link(emulate, "400mbit")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"threads": 1, "kv_tokens": 8192}))
    job = run_on_hosts(hosts, {"hA": 2, "hB": 1}, [str(SCRIPTS / "give_up.py"), str(config)], timeout=180)
    assert job.returncode == 0, job.text
    assert "integrity holds" in job.stdout, job.text


def test_contexts_on_both_hosts_reuse_what_they_computed(
    two_hosts: EmulatedHosts, plain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Context 0 on hA, contexts 1 and 2 and generation 0 on hB, where they share one pool."""
    asked = [*MIDDLE, *SHORT]
    job, rounds = ask(two_hosts, {"hA": 2, "hB": 3}, tmp_path, [asked] * 2, context=3)
    assert ("hand-over: one shared pool on a host, 0 bytes to move and MPI messages\n"
            in job.stderr), job.text
    for found in rounds:
        assert_same(found, asked, plain)
    first, again = ([answer["timing"] for answer in found] for found in rounds)
    assert {timing["transport"] for timing in first} == {"shared", "mpi"}
    assert not any(timing["cached_tokens"] for timing in first)
    # Each went where its beginning is: all but what fills no block of 32 is there.
    assert all(timing["cached_tokens"] >= 96 for timing in again[: len(MIDDLE)]), again


def test_a_killed_follower_ends_the_job_on_every_host(two_hosts: EmulatedHosts, model: Path) -> None:
    """In the middle of the sums that all ranks of its instance wait for."""
    arguments = ["-m", "disagg_mpi", "run", "--aggregated", "tp3", "--threads", "1", "--kv-tokens", "8192",
                 "--prompt", SHORT[0], "--max-tokens", "4000", "--ignore-eos"]
    with HostsJob(two_hosts, {"hA": 3, "hB": 1}, arguments) as job:
        job.wait_for(SHORT[0] + " a process")
        job.send_signal(signal.SIGKILL, rank=3)
        result = job.finish(10)
    assert result.returncode != 0
    result.assert_clean()
