"""Files of prompts and results: every bad line is named, nothing is lost, nothing is computed twice."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import PATIENCE, Job, LetterTokenizer, OrchestratedJob

from disagg_mpi.errors import InputError
from disagg_mpi.frontend.batch import BatchSummary, run_batch
from disagg_mpi.frontend.console import run_prompts, run_prompts_as_data, summary
from disagg_mpi.frontend.jsonl import ResultFile, count_lines, parse_line, read_requests, result_data
from disagg_mpi.request import Choice, Request, Result, SamplingParams, Timing
from disagg_mpi.topology import Role

DEFAULTS = SamplingParams(max_tokens=4)


def parse(line: str | bytes, number: int = 3) -> Any:
    return parse_line(line.encode() if isinstance(line, str) else line, number, DEFAULTS)


# ---- lines ----


def test_a_line_takes_what_it_lacks_from_the_defaults() -> None:
    line = parse_line(b'{"prompt": "a", "temperature": 0.5, "seed": 0, "stop": ["x"]}', 7,
                      SamplingParams(max_tokens=9, top_p=0.5), 2.5)
    assert (line.id, line.number, line.error) == ("7", 7, None)
    assert line.request.deadline == 2.5
    assert line.request.sampling == SamplingParams(
        max_tokens=9, top_p=0.5, temperature=0.5, seed=0, stop=("x",))


def test_a_line_has_its_own_say() -> None:
    line = parse_line(b'{"id": 5, "prompt_token_ids": [1, 2], "max_tokens": 1, "deadline": 1}', 7,
                      DEFAULTS, 60.0)
    assert line.id == line.request.id == "5"
    assert (line.request.prompt_token_ids, line.request.deadline) == ([1, 2], 1.0)
    assert line.request.sampling.max_tokens == 1
    chat = parse('{"messages": [{"role": "user", "content": "hi"}]}')
    assert chat.request.messages[0]["content"] == "hi"


@pytest.mark.parametrize(("line", "text"), [
    ("nonsense", "not valid JSON"),
    ('{"prompt": "a"', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    ('{"prompt": "\\ud800"}', "not valid JSON"),
    ('{"prompt": "a", "stop": ["\\udfff"]}', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1]", "a JSON object is needed, found an array"),
    ("3", "found a number"), ("true", "found a boolean"), ("null", "found null"), ('"a"', "found a string"),
    ("{}", "exactly one of prompt, prompt_token_ids, messages; found none"),
    ('{"prompt": "a", "messages": []}', "found prompt and messages"),
    ('{"prompt": 5}', "Expected `str"),
    ('{"prompt_token_ids": [1.5]}', "prompt_token_ids"),
    ('{"prompt_token_ids": "abc"}', "prompt_token_ids"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
    ('{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
    ('{"prompt": "a", "max_tokens": null}', "max_tokens"),
    ('{"prompt": "a", "temperature": NaN}', "temperature is nan"),
    ('{"prompt": "a", "stop": "x"}', "stop"),
    ('{"prompt": "a", "tempreature": 1}', "unknown field 'tempreature'; known: id, prompt"),
    ('{"prompt": "a", "deadline": -1}', "deadline is -1"),
    ('{"prompt": "a", "deadline": NaN}', "deadline is nan"),
    ('{"prompt": "a", "sampling": {}}', "unknown field 'sampling'"),
])
def test_a_line_that_is_no_request_says_why(line: str | bytes, text: str) -> None:
    found = parse(line)
    assert found.request is None and found.number == 3
    assert text in found.error


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
       | st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(["id", "prompt", "messages", "stop", "n", "x", "seed"]), inner,
                          max_size=4), max_leaves=8).map(lambda value: json.dumps(value).encode()))
def test_no_line_ends_the_run(raw: bytes) -> None:
    line = parse_line(raw, 1, DEFAULTS)
    assert (line.request is None) == (line.error is not None)
    json.dumps({"id": line.id, "error": line.error}, ensure_ascii=False).encode()


def test_ids_are_unique_and_blank_lines_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": "x"}\n\n  \n{"prompt": "b", "id": "x"}\n{"prompt": "c"}\n'
                    '{"prompt": "d", "id": "5"}\n{"prompt": "e", "id": null}')
    lines = list(read_requests(path, DEFAULTS))
    assert count_lines(path) == len(lines) == 5
    assert [(line.number, line.id, line.error) for line in lines] == [
        (1, "x", None), (4, "x (line 4)", "the id 'x' was used on line 1 already"), (5, "5", None),
        (6, "5 (line 6)", "the id '5' was used on line 5 already"), (7, "7", None)]


def test_an_input_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=f"cannot read the input {path}"):
            count_lines(path)
        with pytest.raises(InputError, match="cannot read the input"):
            list(read_requests(path, DEFAULTS))


# ---- the output ----


def test_an_earlier_runs_results_are_kept_and_its_errors_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    good = ['{"id": "1", "text": "é"}\n', '{"id": 2, "text": ""}\n']
    path.write_text(good[0] + '{"id": "3", "error": "late"}\n' + good[1] + '{"id": "4", "te')
    output = ResultFile(path)
    assert output.done == {"1", "2"}
    assert path.read_text() == "".join(good)
    output.write({"id": "5", "text": "ü"})
    assert path.read_text() == "".join(good) + '{"id": "5", "text": "ü"}\n'
    output.close()
    assert ResultFile(path).done == {"1", "2", "5"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_last_line_without_its_end_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "1"}\n{"id": "2"}')
    assert ResultFile(path).done == {"1"}
    assert path.read_text() == '{"id": "1"}\n'


@pytest.mark.parametrize("text", [
    "my notes\n", "my notes", '{"id": "1"}\nmy notes\n', '{"prompt": "an input"}\n', "[1]\n", "3"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"notes\.txt, line \d, is no result of an earlier run"):
        ResultFile(path)
    assert path.read_text() == text


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "out.jsonl"):
        with pytest.raises(InputError, match=f"cannot write the output {path}"):
            ResultFile(path)


def test_a_full_disk_is_said_and_not_read(tmp_path: Path) -> None:
    output = ResultFile(Path("/dev/full"))
    with pytest.raises(InputError, match="cannot write to /dev/full: No space left on device; the "
                                         "results before this one are in it"):
        output.write({"id": "1"})
    output.close()


def test_a_device_holds_nothing_of_an_earlier_run() -> None:
    output = ResultFile(Path("/dev/null"))
    output.write({"id": "1"})
    assert output.done == set()
    output.close()


def result(**changes: Any) -> Result:
    choice = {"index": 0, "text": "é", "token_ids": [1, 2], "finish_reason": "length", **changes}
    return Result(id="a", request_id=1, prompt_token_ids=[5], choices=[Choice(**choice)])


def test_a_result_as_a_line() -> None:
    data = result_data(result())
    assert (data["id"], data["text"], data["finish_reason"]) == ("a", "é", "length")
    assert data["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert "choices" not in data and "logprobs" not in data and "error" not in data
    several = Result(id="a", request_id=1, prompt_token_ids=[5],
                     choices=[Choice(0, "x", [1]), Choice(1, "y", [2])])
    assert [c["text"] for c in result_data(several)["choices"]] == ["x", "y"]
    failed = Result(id="a", request_id=1, prompt_token_ids=[5], error="late",
                    choices=[Choice(0, "x", [1], "deadline")])
    assert result_data(failed) == {
        "id": "a", "error": "late", "finish_reason": "deadline", "text": "x", "token_ids": [1]}


# ---- the whole ----


@pytest.fixture(scope="module")
def job(tiny_llama: Path) -> Iterator[OrchestratedJob]:
    job = OrchestratedJob(Job(tiny_llama, (Role.CONTEXT, Role.GENERATION), shared=True), LetterTokenizer())
    yield job
    job.orchestrator.check_integrity()
    job.close()


def batch(
    job: OrchestratedJob, source: Path, target: Path, **changes: Any
) -> tuple[BatchSummary, dict[str, Any]]:
    output = ResultFile(target)
    found = run_batch(job.orchestrator, source, output, DEFAULTS, **{"progress": False, **changes})
    output.close()
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return found, {line["id"]: line for line in lines}


@pytest.mark.parametrize("progress", [True, False])
def test_a_file_is_answered_line_by_line(
        job: OrchestratedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps({"id": f"r{i}", "prompt": f"prompt {i}"}) for i in range(40)]
    source.write_text("\n".join([
        good[0], "nonsense", *good[1:20], '{"id": "r3", "prompt": "again"}', *good[20:],
        '{"id": "long", "prompt_token_ids": [' + ",".join("1" * 300) + "]}",
        '{"id": "late", "prompt": "a", "deadline": 1e-9}', '{"id": "bad", "prompt": "a", "n": 0}']))
    found, lines = batch(job, source, target, progress=progress)
    assert found.num_done == 40
    assert found.num_tokens == 160
    assert found.failed_lines == [2, 22, 43, 44, 45]
    assert all(len(lines[f"r{i}"]["token_ids"]) == 4 for i in range(40))
    assert {name: line["line"] for name, line in lines.items() if "error" in line} == {
        "2": 2, "r3 (line 22)": 22, "long": 43, "late": 44, "bad": 45}
    captured = capsys.readouterr()
    assert "line 43: 300 prompt tokens" in captured.err
    assert ("45/45" in captured.err) == progress
    assert captured.out == ""

    again, _ = batch(job, source, target)
    assert (again.num_done, again.num_skipped, again.num_tokens) == (0, 40, 0)
    assert again.failed_lines == [2, 22, 43, 44, 45]


def test_a_run_goes_on_where_the_last_was_killed(job: OrchestratedJob, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(10)))
    _, whole = batch(job, source, target)
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:4]) + lines[4][:-7])
    found, again = batch(job, source, target)
    assert (found.num_done, found.num_skipped) == (6, 4)
    assert {i: line["token_ids"] for i, line in again.items()} == {
        i: line["token_ids"] for i, line in whole.items()}


def test_the_default_deadline_is_every_lines(job: OrchestratedJob, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "deadline": 60}\n')
    found, lines = batch(job, source, tmp_path / "out.jsonl", deadline=1e-9)
    assert found.failed_lines == [1]
    assert lines["1"]["finish_reason"] == "deadline"
    assert lines["2"]["finish_reason"] == "length"


def test_a_disk_that_fills_up_ends_the_run(job: OrchestratedJob, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n' * 5)
    with pytest.raises(InputError, match="No space left"):
        run_batch(job.orchestrator, source, ResultFile(Path("/dev/full")), DEFAULTS, progress=False)
    end = time.monotonic() + PATIENCE
    while job.orchestrator.num_open:
        assert time.monotonic() < end


def test_an_empty_file_is_done_at_once(job: OrchestratedJob, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    found, lines = batch(job, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (found, lines) == (BatchSummary(), {})


# ---- the console ----


def test_prompts_are_answered_in_order_with_a_summary(job: OrchestratedJob) -> None:
    out = io.StringIO()
    requests = [Request(prompt="one ", id="1", sampling=DEFAULTS),
                Request(prompt="two ", id="2", sampling=SamplingParams(max_tokens=3, n=2, temperature=1.0)),
                Request(prompt="three", id="3", sampling=SamplingParams(max_tokens=999))]
    results = run_prompts(job.orchestrator, requests, out)
    text = out.getvalue()
    assert [r.id for r in results] == ["1", "2", "3"]
    assert f"── 1 ──\none {results[0].text}\n" in text
    assert f"[1] two {results[1].choices[1].text}\n" in text
    assert "error: 5 prompt tokens and max_tokens 999 exceed" in text
    assert "stayed where it is, 0 bytes moved (shared)" in text
    data = run_prompts_as_data(job.orchestrator, requests)
    assert [item["id"] for item in data] == ["1", "2", "3"]
    assert data[0]["text"] == results[0].text and "error" in data[2]


def test_a_summary_shows_what_there_was() -> None:
    one = result()
    one.choices[0].timing = Timing(
        queue=1e-6, context=0.5, handover=0.25, transfer=0.25, handover_bytes=2**30,
        kv_bytes=2**30, transport="mpi",
        ttft=0.0123, second_token=0.01, tpot=0.02, total=2.5)
    text = summary(one)
    assert "1024.0 MiB moved, 4.29 GB/s (mpi)" in text
    assert "1 tokens, 2 tokens/s" in text
    assert "12.3 ms   from submission" in text
    assert "2.50 s   finished: length" in text
    nothing = summary(result(timing=Timing()))
    assert nothing.count("\n") == 1
