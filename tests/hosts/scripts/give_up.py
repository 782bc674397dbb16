"""Long prompts given up at all moments of a hand-over that runs while they are computed.

    mpirun -n N python give_up.py CONFIG.json

Each ends with one final event, by the reason asked for; between and after them a request is served as alone.
"""

import json
import random
import sys
import time
from pathlib import Path

import msgspec

import disagg_mpi as dm

NUM_TOKENS = 1100
config = msgspec.convert(json.loads(Path(sys.argv[1]).read_text()), dm.JobConfig)
chooser = random.Random(5)
LONG = dm.SamplingParams(max_tokens=400, ignore_eos=True)
SHORT = dm.SamplingParams(max_tokens=8, ignore_eos=True)


def new_prompt() -> list[int]:
    """One that no cache knows."""
    return [chooser.randrange(100, 40000) for _ in range(NUM_TOKENS)]


def end_of(handle: dm.RequestHandle) -> dm.Result:
    """The result, after one event that says so."""
    finals = [event.finish_reason for event in handle if event.finish_reason is not None]
    result = handle.result(timeout=60)
    assert finals == [result.finish_reason], finals
    return result


with dm.launch(config) as orchestrator:
    if orchestrator is not None:
        start = time.monotonic()
        whole = orchestrator.submit(new_prompt(), SHORT).result(timeout=120)
        seconds = time.monotonic() - start
        # Handed over while it was computed: what follows gives up in the middle of just that.
        assert whole.timing.transport == "mpi" and whole.timing.transfer > whole.timing.handover, whole.timing
        alone = orchestrator.submit([5, 6, 7], SHORT).result(timeout=60)

        num_before_a_token = 0
        for part in (0.0, 0.25, 0.45, 0.7, 0.95):
            handle = orchestrator.submit(new_prompt(), LONG)
            time.sleep(part * seconds)
            handle.cancel()
            result = end_of(handle)
            assert result.finish_reason == "cancelled", result
            num_before_a_token += not result.token_ids
        assert num_before_a_token >= 2, num_before_a_token

        handle = orchestrator.submit(new_prompt(), LONG)
        next(iter(handle))  # the first token: the last pieces are on their way
        handle.cancel()
        assert handle.result(timeout=60).finish_reason == "cancelled"
        orchestrator.check_integrity()

        deadline = orchestrator.submit(dm.Request(
            prompt_token_ids=new_prompt(), sampling=LONG, deadline=0.5 * seconds))
        # Behind it one that is given up as well, and one that is not.
        other, going_on = orchestrator.submit(new_prompt(), LONG), orchestrator.submit(new_prompt(), SHORT)
        assert end_of(deadline).finish_reason == "deadline"
        other.cancel()
        assert end_of(other).finish_reason == "cancelled"
        assert end_of(going_on).finish_reason == "length"
        assert orchestrator.submit([5, 6, 7], SHORT).result(timeout=60).token_ids == alone.token_ids
        orchestrator.check_integrity()
        print("integrity holds")
