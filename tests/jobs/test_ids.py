"""Participant and device ids through real jobs: the ranks they name do the work, wrong ones are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from inprocess import save_tiny_model
from mpirun import run_job

PROMPT = [5, 17, 99, 3, 64, 1, 1, 42]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", num_hidden_layers=4)


def run(num_ranks: int, *arguments: str):
    return run_job(num_ranks, ["-m", "disagg_mpi", "run", *arguments], timeout=120)


@pytest.mark.openmpi_only
@pytest.mark.parametrize(("num_ranks", "ids"), [
    (6, ["--context-participant-ids", "4,2;1", "--generation-participant-ids", "3,5",
         "--context-device-ids", "0,1;0", "--generation-device-ids", "0,1"]),
    # Copies without ids take the ranks that are left.
    (6, ["--context", "pp2", "--generation", "tp2pp1,1", "--generation-participant-ids", "5,1;4"]),
    (5, ["--aggregated", "2xpp2", "--aggregated-participant-ids", "4,1;2,3"]),
])
def test_the_ranks_that_ids_name_do_the_work(
    num_ranks: int, ids: list[str], tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(json.dumps(
        {"id": str(number), "prompt_token_ids": PROMPT, "max_tokens": 6, "ignore_eos": True}) + "\n"
        for number in range(3)))
    job = run(num_ranks, "--model", str(tiny), "--input", str(questions), "--output", str(answers), "--check",
              *ids)
    assert job.returncode == 0, job.text
    assert "integrity: no block and no transfer is left over" in job.stderr
    job.assert_clean()
    import torch

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[0, len(PROMPT):]
    found = [json.loads(line)["token_ids"] for line in answers.read_text().splitlines()]
    assert found == [expected.tolist()] * 3


@pytest.mark.openmpi_only
@pytest.mark.parametrize(("ids", "headline", "marked"), [
    (["--context-participant-ids", "1,2", "--generation-participant-ids", "2"],
     "LayoutError: rank 2 is named by context 0 and by generation 0", "rank 2 .*<-- taken twice"),
    (["--context-participant-ids", "1", "--generation-participant-ids", "3"],
     "LayoutError: rank 2 is nobody's, but generation 0 names rank 3", "rank 2 .*<-- nobody's"),
    (["--context-participant-ids", "0", "--generation-participant-ids", "1"],
     "LayoutError: rank 0 is named by context 0", "rank 0 .*<-- the orchestrator's"),
    (["--context-participant-ids", "1,2;3,4"],
     "WorldTooSmallError: 4 ranks, this layout needs 6", "rank 5 .*<-- not in this world of 4 ranks"),
    (["--context-participant-ids", "1"],
     "WorldTooLargeError: 4 ranks, this layout needs 3", "rank 3 .*<-- nobody's"),
    (["--context", "tp2", "--context-participant-ids", "1"],
     "LayoutError: context 0 is tp2, 2 ranks, but has 1 participant id: 1", "rank 1 .*<-- 1 participant id"),
    (["--context", "2", "--context-participant-ids", "1"],
     "LayoutError: --context-participant-ids has 1 group of ids, but there are 2 context instances",
     "rank 2 .*<-- no participant ids for context 1"),
    (["--context", "tp2", "--context-device-ids", "0"],
     "LayoutError: context 0 is tp2, 2 ranks, but has 1 device id: 0", "rank 1 .*<-- 1 device id"),
])
def test_wrong_ids_are_shown_once_on_a_map(ids: list[str], headline: str, marked: str) -> None:
    check_refused(["--prompt", "x", *ids], headline, marked)


@pytest.mark.openmpi_only
def test_a_shape_that_does_not_divide_the_heads(tmp_path: Path) -> None:
    odd = save_tiny_model(tmp_path / "odd", hidden_size=48, num_attention_heads=6,
                          num_key_value_heads=3)
    check_refused(["--prompt", "x", "--model", str(odd), "--context-participant-ids", "2,1"],
                  "LayoutError: context 0 is tp2: 6 heads and 3 KV heads cannot be divided among 2 ranks; "
                  "tp can be 1, 3 or 6", "rank 2 .*<-- tp2 does not fit the model")


def check_refused(arguments: list[str], headline: str, marked: str) -> None:
    """Four ranks are refused in one line, with the map behind it, told by rank 0 alone."""
    job = run(4, *arguments)
    assert job.returncode == 2, job.text
    assert job.stderr.count(headline) == 1, job.text
    assert len(re.findall(r"^\w+Error: ", job.stderr, re.M)) == 1, job.text
    rows = [int(number) for number in re.findall(r"^  rank (\d+) ", job.stderr, re.M)]
    assert rows == list(range(max(rows) + 1)), job.text
    assert re.search(rf"^  {marked}", job.stderr, re.M), job.text
    assert "Traceback" not in job.stderr
    job.assert_clean(in_mpi_init=True)
