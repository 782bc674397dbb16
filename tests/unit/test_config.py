"""JobConfig, its file and its options: what is refused, in which words, and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg_mpi.cli.options import settings_of
from disagg_mpi.cli.run import RunOptions
from disagg_mpi.cli.run import _check as check_run_options
from disagg_mpi.config import Instance, JobConfig, convert, read_toml
from disagg_mpi.errors import ConfigError


def settings(file: Path | None = None, **options: Any) -> Any:
    return settings_of({"config_file": file, **options})


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "job.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(("changes", "text"), [
    ({"kv_tokens": 0}, "kv_tokens is 0"),
    ({"kv_tokens": 1.5}, "kv_tokens is 1.5"),
    ({"tokens_per_block": -1}, "tokens_per_block is -1"),
    ({"max_batch_size": 0}, "max_batch_size is 0"),
    ({"max_num_tokens": True}, "max_num_tokens is True"),
    ({"max_num_tokens": 4, "max_batch_size": 5}, r"max_num_tokens \(4\) is below max_batch_size \(5\)"),
    ({"start_timeout": 0.0}, "start_timeout is 0.0"),
    ({"start_timeout": float("nan")}, "start_timeout is nan"),
    ({"threads": 0}, "threads is 0"),
    ({"dtype": "fp16"}, "dtype is 'fp16'; known are fp32, bf16"),
    ({"kv_dtype": "int8"}, "kv_dtype is 'int8'"),
    ({"transport": "tcp"}, "transport is 'tcp'; known are auto, shared, mpi"),
    ({"engine": "vllm"}, "engine is 'vllm'"),
    ({"context": -1}, "context is -1"),
    ({"context": True}, "context is True"),
    ({"context": "two"}, "context is 'two'; needed is a number of copies"),
    ({"context": "0"}, "no context instance"),
    ({"context": (Instance(tp="2"),)}, "tp=2 pp=1; both must be"),
    ({"context": (Instance(participant_ids=3),)}, "participant_ids 3; they are a sequence"),
    ({"context": (Instance(device_ids=(-1,)),)}, r"device_ids \(-1,\); they are"),
    ({"context_participant_ids": 3}, "context_participant_ids is 3; it is text"),
    ({"generation_tokens_per_block": 0}, "generation_tokens_per_block is 0"),
    ({"reserved_output": 0}, "reserved_output is 0"),
    ({"context_gpu_share": 0}, "context_gpu_share is 0; it is a share"),
    ({"overlap_tokens": 0}, "overlap_tokens is 0"),
    ({"local_context": -1}, "local_context is -1"),
    ({"local_context": "never"}, "local_context is 'never'; it is a number of tokens, 0 for never, or auto"),
    ({"local_context": True}, "local_context is True"),
    ({"prefix_cache": 1}, "prefix_cache is 1"),
    ({"router": "random"}, "router is 'random'; known are prefix, least-loaded"),
    ({"aggregated": 1, "context_device_ids": "0"}, "aggregated and context_device_ids exclude each other"),
    ({"generation": ["tp2"]}, "generation is "),
    ({"generation": 2.0}, "generation is 2.0"),
    ({"context": 0}, "no context instance"),
    ({"generation": ()}, "no generation instance"),
    ({"context": (Instance(tp=0),)}, "tp=0 pp=1; both must be at least 1"),
    ({"aggregated": -1}, "aggregated is -1"),
])
def test_what_no_job_could_run_with_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        JobConfig(**changes)


@pytest.mark.parametrize(("device", "default"), [("cpu", 512), ("emulated", 4096), ("cuda", 4096)])
def test_a_step_takes_a_token_of_each_request_unless_told_otherwise(device: Any, default: int) -> None:
    assert JobConfig(device=device).token_budget == default
    assert JobConfig(device=device, max_batch_size=5000).token_budget == 5000
    assert JobConfig(device=device, max_batch_size=5, max_num_tokens=7).token_budget == 7


def test_a_copy_is_checked_again() -> None:
    with pytest.raises(ConfigError, match="kv_tokens"):
        JobConfig().replace(kv_tokens=-1)


def test_instances_are_counted_or_listed() -> None:
    config = JobConfig(context=2, generation=[Instance(tp=2), Instance(pp=3)])
    assert config.instances("context") == (Instance(), Instance())
    assert [str(i) for i in config.instances("generation")] == ["tp2", "tp1pp3"]
    assert config.instances("aggregated") == ()
    assert not config.is_aggregated


def test_generation_may_have_blocks_of_its_own() -> None:
    config = JobConfig(tokens_per_block=32, generation_tokens_per_block=64)
    assert [config.block_size(role) for role in ("context", "generation", "aggregated")] == [32, 64, 32]
    assert JobConfig(tokens_per_block=16).block_size("generation") == 16


def test_aggregated_instances_leave_none_of_the_others() -> None:
    config = JobConfig(aggregated=3)
    assert config.instances("context") == config.instances("generation") == ()
    assert len(config.instances("aggregated")) == 3


def test_the_kv_cache_has_the_compute_type_unless_told_otherwise() -> None:
    assert JobConfig(dtype="bf16").effective_kv_dtype == "bf16"
    assert JobConfig(dtype="fp32", kv_dtype="bf16").effective_kv_dtype == "bf16"


def test_a_file_gives_job_sampling_and_run(toml: Any) -> None:
    found = settings(toml('model = "m"\ncontext = [{tp = 2}]\n[sampling]\nstop = ["."]\n'
                          '[run]\ninput = "in.jsonl"\n'))
    assert found.job.model == "m"
    assert found.job.context == (Instance(tp=2),)
    assert found.sampling.stop == (".",)
    assert found.command == {"input": "in.jsonl"}


@pytest.mark.parametrize("text", [
    'context = "tp2,pp2"', "context = [{tp = 2}, {pp = 2}]",
    'context = "tp2,pp2"\ncontext_participant_ids = "1,2;3,4"'])
def test_a_file_gives_shapes_as_text_or_tables(toml: Any, text: str) -> None:
    assert [str(shape) for shape in settings(toml(text)).job.instances("context")] == ["tp2", "tp1pp2"]


def test_a_file_places_instances(toml: Any) -> None:
    found = settings(toml("context = [{tp = 2, participant_ids = [3, 1], device_ids = [0, 1]}]\n"
                          'local_context = "auto"\nprefix_cache = false\n'))
    assert found.job.context == (Instance(tp=2, participant_ids=(3, 1), device_ids=(0, 1)),)
    assert found.job.local_context == "auto"
    assert not found.job.prefix_cache


def test_a_path_in_the_file_is_a_path() -> None:
    options = convert({"input": "in.jsonl", "output": Path("out.jsonl")}, RunOptions, "[run]")
    assert options.input == Path("in.jsonl")
    assert options.output == Path("out.jsonl")
    with pytest.raises(ConfigError, match=r"\[run\]: .*Path.*int"):
        convert({"input": 3}, RunOptions, "[run]")


def test_options_win_over_the_file(toml: Any) -> None:
    path = toml("context = 2\nkv_tokens = 64\n[sampling]\nmax_tokens = 5\ntemperature = 0.5\n")
    found = settings(path, context=3, temperature=0.0, max_tokens=None, stop=())
    assert found.job.context == 3
    assert found.job.kv_tokens == 64
    assert found.sampling.max_tokens == 5
    assert found.sampling.temperature == 0.0


def test_a_switch_that_is_off_is_a_value_that_was_given(toml: Any) -> None:
    assert settings().job.prefix_cache
    assert not settings(toml("prefix_cache = true\n"), prefix_cache=False).job.prefix_cache
    assert settings(toml("prefix_cache = false\n"), prefix_cache=True).job.prefix_cache
    # A plain flag that was not typed says nothing.
    assert settings(toml("[run]\nchat = true\n"), chat=False).command == {"chat": True}


@pytest.mark.parametrize(("name", "section"), [
    ("seed", "sampling"), ("temperature", "sampling"), ("top_k", "sampling"),
    ("min_tokens", "sampling"), ("logprobs", "sampling")])
def test_zero_is_a_value_that_was_given(toml: Any, name: str, section: str) -> None:
    path = toml(f"[{section}]\n{name} = 1\n")
    assert getattr(settings(path, **{name: 0}).sampling, name) == 0


@pytest.mark.parametrize("name", ["kv_tokens", "threads", "max_tokens", "n", "context"])
def test_a_zero_that_cannot_be_is_refused_not_ignored(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        settings(**{name: 0})


@pytest.mark.parametrize(("text", "message"), [
    ("contxt = 2", "unknown field `contxt`.*Known keys: .*context"),
    ("context = 2.5", "context"),
    ('dtype = "fp8"', "fp8"),
    ("context = [{tp = 2, ep = 1}]", "ep"),
    ("[sampling]\ntop = 1", r"\[sampling\]: .*`top`.*Known keys: .*top_p"),
    ("[sampling]\ntop_p = 1.5", r"job\.toml: top_p is 1.5"),
    ('context = "many"', r"job\.toml: context is 'many'"),
    ("sampling = 3", r"sampling must be a table"),
    ("a = 1\ncontext = = 2", "not valid TOML.*line 2"),
    ("\x00", "not valid TOML"),
    ("aggregated = 1\ncontext = 2", "aggregated and context exclude each other"),
])
def test_what_is_wrong_in_the_file_is_named(toml: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(toml(text))


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a")
    for name in ("binary", "absent", "."):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            read_toml(tmp_path / name)


def test_the_baseline_on_the_command_line_outweighs_the_files_split(toml: Any) -> None:
    job = settings(toml("context = 2\ngeneration = 2\n"), aggregated=2).job
    assert len(job.instances("aggregated")) == 2


def test_a_split_on_the_command_line_outweighs_the_files_baseline(toml: Any) -> None:
    job = settings(toml("aggregated = 2\n"), context=2).job
    assert not job.is_aggregated
    assert len(job.instances("context")) == 2
    assert not settings(toml("aggregated = 2\n"), aggregated=0).job.is_aggregated


def test_ids_ask_for_their_role_too(toml: Any) -> None:
    path = toml('context = "tp2"\ncontext_participant_ids = "1,2"\ngeneration_device_ids = "0"\n')
    assert settings(path, aggregated_participant_ids="1").job.is_aggregated
    assert settings(path, aggregated="2xtp2").job.is_aggregated
    path = toml('aggregated_participant_ids = "1;2"\n')
    assert settings(path).job.is_aggregated
    assert not settings(path, generation_participant_ids="2").job.is_aggregated
    assert not settings(path, aggregated=0).job.is_aggregated
    with pytest.raises(ConfigError, match="--aggregated and --context-device-ids exclude each other"):
        settings(aggregated=1, context_device_ids="0")


def test_baseline_and_split_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="--aggregated and --generation exclude each other"):
        settings(aggregated=1, generation=1)


def test_unknown_keys_of_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[run\]: .*outptu"):
        convert({"outptu": "x"}, RunOptions, "[run]")


@pytest.mark.parametrize(("options", "message"), [
    ({}, "give --prompt"),
    ({"prompt": ("a",), "input": Path("x"), "output": Path("y")}, "not both"),
    ({"input": Path("x")}, "go together"),
    ({"prompt": ("a",), "output": Path("y")}, "go together"),
    ({"input": Path("x"), "output": Path("y"), "chat": True}, "--chat is for --prompt"),
    ({"prompt": ("a", "")}, "the prompt is empty"),
    ({"prompt": ("a",), "deadline": 0.0}, "deadline is 0.0"),
    ({"prompt": ("a",), "deadline": float("nan")}, "deadline is nan"),
])
def test_run_refuses_what_does_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run_options(RunOptions(**options))


def test_run_does_not_write_over_its_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n')
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="same file"):
        check_run_options(RunOptions(input=path, output=tmp_path / "link"))
