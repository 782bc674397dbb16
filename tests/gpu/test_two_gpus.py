"""Two GPUs: the guide's own set-up, context on 0 and generation on 1; and one instance on both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpirun import ROOT, run_job
from test_engine import SCRIPT, model_path

__all__ = ["model_path"]  # a fixture

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} CUDA devices here, it takes two")


def tokens_of(model: Path, folder: Path, num_ranks: int, **job: Any) -> list[list[int]]:
    script = folder / "job.py"
    script.write_text(SCRIPT)
    config = {"model": str(model), "device": "cuda", "kv_tokens": 4096, "max_batch_size": 8, **job}
    result = run_job(num_ranks, [str(script), json.dumps(config)], timeout=240)
    assert result.returncode == 0, result.text
    found: list[list[int]] = json.loads(result.stdout.splitlines()[-1])
    return found


# Not "mpi" alone: pytest-mpi skips what has its marker's name for an id.
@pytest.mark.parametrize("transport", ["auto", pytest.param("mpi", id="messages")])
def test_context_and_generation_each_on_its_own(model_path: Path, tmp_path: Path, transport: str) -> None:
    apart = tokens_of(model_path, tmp_path, 3, context_device_ids="0", generation_device_ids="1",
                      transport=transport)
    assert apart == tokens_of(model_path, tmp_path, 2, aggregated=1)


def test_an_instance_on_both(model_path: Path, tmp_path: Path) -> None:
    """Sums by NCCL, in another order than one rank's: random weights have near-ties."""
    both = tokens_of(model_path, tmp_path, 3, aggregated="tp2", aggregated_device_ids="0,1")
    one = tokens_of(model_path, tmp_path, 2, aggregated=1)
    assert [tokens[:4] for tokens in both] == [tokens[:4] for tokens in one]
    assert np.mean(np.array(both) == np.array(one)) > 0.5


def test_the_guides_repository(tmp_path: Path) -> None:
    """As it stands, by the launch line's own program: what it names as devices are these GPUs."""
    httpx = pytest.importorskip("httpx", reason="pip install 'disagg_mpi[test]'")
    from serving_job import ServingJob

    from disagg_mpi.errors import ModelError
    from disagg_mpi.model.fetch import fetch_default_model

    try:
        fetch_default_model(progress=False)
    except ModelError as error:
        pytest.skip(f"the repository's model cannot be had here: {error}")
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "examples" / "model_repository", repository)
    with ServingJob(3, tmp_path, "--model-repository", str(repository)) as job:
        answer = httpx.post(f"{job.http}/v1/completions", timeout=60, json={
            "prompt": "Machine learning is", "max_tokens": 8, "temperature": 0}).json()
        job.send_signal(2, 0)
        result = job.finish(30)
    assert answer["usage"]["completion_tokens"] == 8
    assert "rank 1 on GPU 0" in result.text and "rank 2 on GPU 1" in result.text
