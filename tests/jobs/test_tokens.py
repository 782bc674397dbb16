"""Disaggregated equals aggregated equals transformers, token for token, on the real model.

Layouts of up to five ranks and both ways of handing over; batched and alone; logits to the bit; sampled
text. After each job no block is owned and no transfer is open, on any rank. Instances of several ranks are in
test_shapes.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpirun import run_job
from reference import MAX_TOKENS, compare, prompts, reference

SCRIPT = Path(__file__).parent / "scripts" / "tokens.py"
# Two minutes each: under the second MPI only the one whose bytes are MPI's own.
_ONCE = pytest.mark.openmpi_only
LAYOUTS = [
    pytest.param(2, {"aggregated": 1}, id="n2-aggregated", marks=_ONCE),
    pytest.param(3, {"transport": "shared"}, id="n3-shared", marks=_ONCE),
    pytest.param(3, {"transport": "mpi"}, id="n3-mpi"),
    pytest.param(4, {"context": 2, "transport": "shared"}, id="n4-shared", marks=_ONCE),
    pytest.param(5, {"context": 2, "generation": 2, "transport": "mpi"}, id="n5-mpi", marks=_ONCE),
]
# What each layout gave, for the comparison of layouts with one another.
_found: dict[str, dict[str, list]] = {}


@pytest.mark.model
@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS)
def test_layout_gives_the_tokens_of_transformers(
    num_ranks: int, layout: dict, model: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = reference(model)
    questions, answers = tmp_path / "prompts.json", tmp_path / "answers.json"
    questions.write_text(json.dumps(prompts()))
    # Equal threads are part of what "to the bit" takes.
    config = {"model": str(model), "threads": 1, **layout}
    job = run_job(num_ranks, [str(SCRIPT), json.dumps(config), str(questions), str(answers),
                              str(MAX_TOKENS)], timeout=900)
    assert job.returncode == 0, job.text
    assert "integrity holds" in job.stdout
    job.assert_clean()
    found = json.loads(answers.read_text())
    name = request.node.callspec.id
    for way in ("batched", "alone"):
        problems, near_ties = compare(f"{name} {way}", found[way], truth)
        with capsys.disabled():  # said even when the test passes
            for text in near_ties:
                print(f"\nnear-tie, allowed: {text}")
        assert not problems, "\n".join(problems)
    assert found["cached alone"] > 1000, "the batch before it has filled the prefix cache"
    for other, theirs in _found.items():
        assert found["sampled"] == theirs["sampled"], f"{name} and {other} draw differently"
        for kind in ("logits short", "logits long"):
            assert found[kind] == theirs[kind], f"{name} and {other}: {kind} differ in some bit"
    _found[name] = found
