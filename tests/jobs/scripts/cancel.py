"""Requests given up at all moments of their life, by cancel and by deadline, among others that go on."""

import json
import random
import sys
import time

import msgspec

import disagg_mpi as dm

config = msgspec.convert(json.loads(sys.argv[1]), dm.JobConfig)
chooser = random.Random(5)
with dm.launch(config) as orchestrator:
    if orchestrator is not None:
        alone = orchestrator.submit([5, 6, 7], dm.SamplingParams(max_tokens=12, ignore_eos=True)).result()
        handles = []
        for number in range(24):
            prompt = [chooser.randrange(100, 40000) for _ in range(chooser.choice((3, 200, 1500)))]
            params = dm.SamplingParams(max_tokens=chooser.choice((1, 8, 400)), ignore_eos=True)
            deadline = chooser.uniform(0.05, 4.0) if number % 3 == 0 else None
            handles.append(orchestrator.submit(
                dm.Request(prompt_token_ids=prompt, sampling=params, deadline=deadline)))
            time.sleep(chooser.uniform(0.0, 0.2))
            if number % 3 == 1:
                chooser.choice(handles).cancel()
        going_on = orchestrator.submit([5, 6, 7], dm.SamplingParams(max_tokens=12, ignore_eos=True))
        for handle in handles[::2]:
            handle.cancel()
        start = time.monotonic()
        for handle in handles[1::2]:
            time.sleep(0.02)
            handle.cancel()
        results = [handle.result(timeout=60) for handle in handles]
        # Ten cancelled long prompts must not block a short request.
        assert going_on.result(timeout=60).token_ids == alone.token_ids
        print(f"the short request took {time.monotonic() - start:.1f} s after the cancels")
        reasons = {result.finish_reason for result in results}
        assert reasons <= {"cancelled", "deadline", "length"} and "cancelled" in reasons, reasons
        assert all((result.error is None) == (result.finish_reason == "length") for result in results)
        orchestrator.check_integrity()
        print("integrity holds", sorted(reasons))
