"""The page's state over a real job: the ranks as they are and where, and a request's way through them."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_job import ServingJob

STATE_SECONDS = 20.0


def state_when_ended(client: httpx.Client) -> Any:
    """The page's state once a request has ended: it is up to half a second old."""
    end = time.monotonic() + STATE_SECONDS
    while not (state := client.get("/page/state").raise_for_status().json())["recent"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    return state


PIPELINE = ["--aggregated", "pp2", "--aggregated-participant-ids", "2,1", "--aggregated-device-ids", "4,5"]


@pytest.mark.model
@pytest.mark.openmpi_only
@pytest.mark.parametrize(("layout", "ranks"), [
    ([], [("context 0", [1], "tp1", None), ("generation 0", [2], "tp1", None)]),
    (PIPELINE, [("aggregated 0", [2, 1], "tp1pp2", [4, 5])]),
], ids=["disaggregated", "pipeline"])
def test_the_page_of_a_real_job(layout: list[str], ranks: list[Any], model: Path, tmp_path: Path) -> None:
    with (ServingJob(3, tmp_path, "--model", str(model), *layout) as job,
          httpx.Client(base_url=job.http, timeout=60) as client):
        assert "<title>disagg_mpi</title>" in client.get("/").text
        answer = client.post("/v1/completions", json={
            "prompt": "Machine learning is", "max_tokens": 6, "temperature": 0, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        state = state_when_ended(client)
        assert [(i["name"], i["ranks"], i["shape"], i["device_ids"]) for i in state["instances"]] == ranks
        assert all(i["hosts"] == [socket.gethostname()] * len(i["ranks"]) for i in state["instances"])
        (line,) = state["recent"]
        assert (line["outcome"], line["output_tokens"], state["itl"]["count"]) == ("done", 6, 5)
        assert line["transport"] == ("" if layout else "shared")
        parts = [line[name] for name in ("queue", "context", "handover", "generation", "other")]
        assert sum(parts) == pytest.approx(line["total"], rel=0.02)

        job.send_signal(signal.SIGTERM, rank=0)  # while the page's connection is open
        result = job.finish(30)
        assert "Traceback" not in result.stderr, result.text
        result.assert_clean()
