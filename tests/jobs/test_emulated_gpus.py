"""Real jobs on pretended GPUs: all that a job on GPUs does but CUDA's own calls.

Ranks open each other's pools and weights, blocks change hands, are gathered or sent, stages follow one
another: the tokens are transformers' own. What a job on GPUs refuses to start with is said once.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from inprocess import VOCABULARY, save_tiny_model
from mpirun import JobResult, MpiJob, run_job

SCRIPTS = Path(__file__).parent / "scripts"
# Of one and a half blocks, of several steps, of one token; more than fit one step.
PROMPTS = [[random.Random(seed).randrange(VOCABULARY) for _ in range(length)]
           for seed, length in enumerate((12, 45, 1, 30, 7))]
NUM_TOKENS = 8
# Where the two largest logits are nearer to each other, another order of additions might choose the other.
GAP = 1e-3
SMALL = {"device": "emulated", "tokens_per_block": 8, "kv_tokens": 1024, "max_num_tokens": 32,
         "max_batch_size": 16, "threads": 1}

# By world size; each with how its KV-cache passes.
JOBS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    3: [
        ("shared", {"context_device_ids": "0", "generation_device_ids": "0"}),
        ("copy", {}),
        ("copy", {"context_device_ids": "1", "generation_device_ids": "1",
                  "generation_tokens_per_block": 12}),
        ("mpi", {"transport": "mpi"}),
        ("", {"aggregated": "tp2"}),
        # K and V rounded to 8 bits of mantissa give tokens of their own: the processor's.
        ("", {"aggregated": "pp2", "kv_dtype": "bf16"}),
        ("", {"aggregated": "pp2", "kv_dtype": "bf16", "device": "cpu"}),
    ],
    5: [
        ("shared", {"context": "tp2", "generation": "tp2"}),
        ("copy", {"context": "tp2", "generation": "pp2"}),
        ("mpi", {"context": "2", "generation": "tp2", "transport": "mpi"}),
        ("", {"aggregated": "tp2pp2"}),
    ],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family that goes the short way, with biases."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "Qwen2", hidden_size=64,
                           intermediate_size=96, num_attention_heads=8, num_hidden_layers=4)


@pytest.fixture(scope="module")
def truth(tiny: Path) -> list[list[int]]:
    """What transformers' ``generate`` answers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NUM_TOKENS,
            do_sample=False, return_dict_in_generate=True, output_logits=True)
        tops = [step[0].topk(2).values for step in output.logits]
        assert min(float(top[0] - top[1]) for top in tops) > GAP, "choose another prompt or seed"
        found.append(output.sequences[0, len(prompt):].tolist())
    return found


@pytest.mark.parametrize("num_ranks", JOBS)
def test_tokens_are_transformers_own(
        num_ranks: int, tiny: Path, truth: list[list[int]], tmp_path: Path) -> None:
    jobs = [{"prompts": PROMPTS, "max_tokens": NUM_TOKENS, "config": {"model": str(tiny), **SMALL, **layout}}
            for _, layout in JOBS[num_ranks]]
    questions, answers = tmp_path / "jobs.json", tmp_path / "answers.json"
    questions.write_text(json.dumps(jobs))
    job = run_job(num_ranks, [str(SCRIPTS / "answers.py"), str(questions), str(answers)], timeout=120)
    assert job.returncode == 0, job.text
    job.assert_clean()
    found = json.loads(answers.read_text())
    assert len(found) == len(jobs)
    for (way, layout), results in zip(JOBS[num_ranks], found, strict=True):
        assert [result["error"] for result in results] == [None] * len(PROMPTS), layout
        assert {result["way"] for result in results} == {way}, layout
        expected = truth
        if "kv_dtype" in layout:
            expected = [result["token_ids"] for result in found[-1]]
            assert expected != truth, "the type of the KV-cache matters"
        assert [result["token_ids"] for result in results] == expected, layout


def test_where_nothing_can_be_opened_all_goes_in_messages(
        tiny: Path, truth: list[list[int]], tmp_path: Path) -> None:
    """Ranks on GPUs of their own find it out; those that share one say ``--transport mpi``, and load the
    weights twice. Without that they cannot start, and say so."""
    layouts: list[dict[str, Any]] = [
        {}, {"transport": "mpi", "context_device_ids": "0", "generation_device_ids": "0"}]
    questions, answers = tmp_path / "jobs.json", tmp_path / "answers.json"
    arguments = [str(SCRIPTS / "no_ipc.py"), str(questions), str(answers)]
    questions.write_text(json.dumps([
        {"prompts": PROMPTS, "max_tokens": NUM_TOKENS, "config": {"model": str(tiny), **SMALL, **layout}}
        for layout in layouts]))
    job = run_job(3, arguments, timeout=120)
    assert job.returncode == 0, job.text
    for results in json.loads(answers.read_text()):
        assert [result["token_ids"] for result in results] == truth
        assert {result["way"] for result in results} == {"mpi"}
    questions.write_text(json.dumps([{"prompts": PROMPTS, "max_tokens": 1, "config": {
        "model": str(tiny), **SMALL, "context_device_ids": "0", "generation_device_ids": "0"}}]))
    job = run_job(3, arguments, timeout=120)
    assert job.returncode != 0
    assert "cannot open the KV pool on its GPU, which rank 1 allocated: not permitted here" in job.text


def run(*options: str, num_ranks: int = 3, gpus: str = "2x8GiB", device: str = "emulated",
        env: Mapping[str, str] | None = None) -> JobResult:
    """A job of one prompt, of token ids."""
    return run_job(num_ranks, ["-m", "disagg_mpi", "run", "--device", device, "--threads", "1", *options],
                   timeout=60, env={"DISAGG_MPI_EMULATED_GPUS": gpus, **(env or {})})


@pytest.fixture
def ask(tiny: Path, tmp_path: Path) -> list[str]:
    """Options of a job that answers one prompt."""
    questions = tmp_path / "in.jsonl"
    question = {"id": "0", "prompt_token_ids": PROMPTS[0], "max_tokens": NUM_TOKENS}
    questions.write_text(json.dumps(question) + "\n")
    return ["--model", str(tiny), "--input", str(questions), "--output", str(tmp_path / "out.jsonl")]


def test_ranks_that_share_a_gpu_take_what_fits_together(
        ask: list[str], truth: list[list[int]], tmp_path: Path) -> None:
    """No size of the pools is given: both lie in one allocation as large as may be."""
    job = run(*ask, "--check", "--context-gpu-share", "0.5", gpus="1x4GiB")
    assert job.returncode == 0, job.text
    assert "ranks 1, 2 on GPU 0 (emulated), which 2 ranks share" in job.stderr
    if not Path("/tmp/nvidia-mps").exists():  # or a daemon of this host's may run
        assert job.stderr.count("context_gpu_share 0.5 has no effect: there is no MPS here") == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["token_ids"] == truth[0]
    assert "integrity: no block and no transfer is left over" in job.stderr
    job.assert_clean()


SHARED = """
import os, sys
import disagg_mpi as dm
model, when = sys.argv[1:]
config = dm.JobConfig(model=model, device="emulated", kv_tokens=512, threads=1, context_gpu_share=0.6)
if when == "early":
    from mpi4py import MPI
found = None
try:
    for each in (config, config.replace(prefix_cache=False), config.replace(context_gpu_share=0.5)):
        with dm.launch(each):
            pass
except dm.ConfigError as error:
    found = error
from mpi4py import MPI
percentage = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
os.write(1, f"rank {MPI.COMM_WORLD.rank} {percentage} {found}\\n".encode())  # whole, beside other ranks'
"""


@pytest.mark.parametrize(("when", "percentages", "error"), [
    ("late", ["None", "60", "None"], r"an earlier job of this process held ranks 1 to .* 0\.6"),
    ("early", ["None"] * 3, r"context_gpu_share is 0\.6, .*: import mpi4py\.MPI after the first launch"),
])
def test_a_context_rank_may_be_held_to_a_share_of_its_gpu(
        tiny: Path, tmp_path: Path, when: str, percentages: list[str], error: str) -> None:
    """By what MPS asks it for when CUDA is loaded, which MPI may do; the generation rank beside it is not. A
    second job of these processes has the same share, or is refused."""
    script = tmp_path / "job.py"
    script.write_text(SHARED)
    job = run_job(3, [str(script), str(tiny), when], timeout=60, env={"DISAGG_MPI_EMULATED_GPUS": "1x8GiB"})
    assert job.returncode == 0, job.text
    for rank, percentage in enumerate(percentages):
        assert re.search(f"rank {rank} {percentage} {error}", job.stdout), job.text


@pytest.mark.parametrize(("options", "message"), [
    ({"device": "cuda"}, r"LayoutError: context 0 is to compute on a GPU, and rank 1 on host .* sees none"),
    ({"more": ["--generation-device-ids", "7"]},
     r"LayoutError: generation 0 names device 7, but rank 2 on host"),
    ({"gpus": "2x1GiB"},
     r"ConfigError: GPU 0 of .* of weights \+ 1\.\d\d GiB of workspace .*1\.00 GiB are free"),
    ({"gpus": "2x4GiB", "more": ["--kv-tokens", "99999999"]},
     r"ConfigError: GPU 0 of .*give --kv-tokens \d+$"),
    ({"gpus": "two"}, r"ConfigError: DISAGG_MPI_EMULATED_GPUS is 'two'"),
], ids=["no GPU", "no such device", "too little memory", "too many tokens", "pretended wrongly"])
def test_what_cannot_start_is_said_once(ask: list[str], options: dict[str, Any], message: str) -> None:
    options = dict(options)
    job = run(*ask, *options.pop("more", ()), **options)
    assert job.returncode == 2, job.text
    assert len(re.findall(message, job.stderr, re.M)) == 1, job.text
    assert len(re.findall(r"^\w+Error: ", job.stderr, re.M)) == 1, job.text
    assert "Traceback" not in job.stderr
    job.assert_clean()


@pytest.mark.openmpi_only
def test_a_killed_rank_ends_the_job_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """One that has opened another's pool, and weights, dies in the middle of its work."""
    questions = tmp_path / "in.jsonl"
    questions.write_text("".join(json.dumps(
        {"id": str(number), "prompt_token_ids": PROMPTS[1], "max_tokens": 180, "ignore_eos": True}) + "\n"
        for number in range(1000)))
    answers = tmp_path / "out.jsonl"
    with MpiJob(3, ["-m", "disagg_mpi", "run", "--device", "emulated", "--context-device-ids", "0",
                    "--generation-device-ids", "0", "--kv-tokens", "4096", "--threads", "1",
                    "--model", str(tiny), "--input", str(questions), "--output", str(answers)],
                env={"DISAGG_MPI_EMULATED_GPUS": "1x8GiB"}) as job:
        end = time.monotonic() + 60
        while not (answers.exists() and answers.stat().st_size) and time.monotonic() < end:
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL, 2)
        result = job.finish(15)
    assert result.returncode != 0
    assert result.seconds < 10, result.text
    result.assert_clean()
