"""A Triton model repository as a job: the example, templates, ids and copies, paths, and everything off."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.config import Instance, JobConfig
from disagg_mpi.errors import ConfigError, DisaggError, LayoutError, ModelError
from disagg_mpi.frontend.triton.parameters import Parameters
from disagg_mpi.frontend.triton.pbtxt import close_template, parse_config, read_config
from disagg_mpi.frontend.triton.plan import ServePlan, plan_of
from disagg_mpi.frontend.triton.wiring import Kind
from disagg_mpi.shapes import format_ids

EXAMPLE = Path(__file__).parents[2] / "examples" / "model_repository"
MODELS = ("context", "disaggregated_serving_bls", "ensemble", "generation", "postprocessing", "preprocessing")


class Copy:
    """A copy of the example that a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(EXAMPLE, folder)

    def file(self, model: str) -> Path:
        return self.folder / model / "config.pbtxt"

    def sub(self, model: str, pattern: str, text: str) -> None:
        """Replace every match of ``pattern``; there must be one."""
        changed, count = re.subn(pattern, lambda _: text, self.file(model).read_text())
        assert count, pattern
        self.file(model).write_text(changed)

    def set(self, model: str, **values: str) -> None:
        """Parameters, in place or added at the end."""
        for name, value in values.items():
            line = f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'
            text = self.file(model).read_text()
            pattern = rf'parameters {{ key: "{name}" .*\n'
            self.file(model).write_text(re.sub(pattern, lambda _, line=line: line, text)
                                        if re.search(pattern, text) else text + line)

    def copies(self, model: str, count: int) -> None:
        self.sub(model, r"count: -?\d+", f"count: {count}")

    def plan(self, **given: Any) -> ServePlan:
        return plan_of(self.folder, given)

    def fault(self, kind: type[DisaggError] = ConfigError, **given: Any) -> str:
        with pytest.raises(kind) as caught:
            self.plan(**given)
        assert caught.value.exit_code == 2
        return str(caught.value)

    def line(self, model: str, text: str) -> str:
        """``…/config.pbtxt:N``: where ``text`` is."""
        lines = self.file(model).read_text().splitlines()
        return f"{self.file(model)}:{next(n for n, line in enumerate(lines, start=1) if text in line)}: "


@pytest.fixture
def repository(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "models")


def as_template(repository: Copy) -> None:
    """Every value that Triton's files leave open, left open, as they leave it."""
    for model in MODELS:
        text = repository.file(model).read_text()
        text = text.replace("max_batch_size: 64", "max_batch_size: ${triton_max_batch_size}")
        text = text.replace("decoupled: true", "decoupled: ${decoupled_mode}")
        text = re.sub(r"count: \d+", "count: ${instance_count}", text)
        text = re.sub(r'(name: "\w*logits", data_type: )TYPE_FP32', r"\1${logits_datatype}", text)
        if model in ("context", "generation"):
            text = re.sub(r'(key: "(\w+)" value { string_value: )"[^"]*"', r'\1"${\2}"', text)
            text += ('dynamic_batching {\n  preferred_batch_size: [ ${triton_max_batch_size} ]\n'
                     '  max_queue_delay_microseconds: ${max_queue_delay_microseconds}\n}\n')
        repository.file(model).write_text(text)


# ---- the example ----


def test_the_example_is_the_guides_job(repository: Copy) -> None:
    plan = repository.plan()
    assert plan.topology.sum_text() == "3 = 1 orchestrator + 1 context + 1 generation"
    assert [(group.name, group.ranks, group.device_ids) for group in plan.topology.groups] == [
        ("context 0", (1,), (0,)), ("generation 0", (2,), (1,))]
    assert plan.job.model is None
    assert {model.kind: model.name for model in plan.models} == {
        Kind.ENSEMBLE: "ensemble", Kind.PREPROCESSING: "preprocessing", Kind.BLS: "disaggregated_serving_bls",
        Kind.POSTPROCESSING: "postprocessing", Kind.CONTEXT: "context", Kind.GENERATION: "generation"}
    assert all(model.version == "1" and model.config.name == model.name for model in plan.models)
    assert plan.exclude_input_in_output
    assert not plan.unused and not plan.remarks
    assert plan.lines() == [
        f"model repository {repository.folder}: ensemble → preprocessing → disaggregated_serving_bls → "
        "postprocessing; context is context, generation is generation"]


def test_the_example_has_every_model_and_version_of_the_guide() -> None:
    assert sorted(path.name for path in EXAMPLE.iterdir() if path.is_dir()) == sorted(MODELS)
    assert all(len((EXAMPLE / model / "1" / "NOTE").read_text().splitlines()) == 1 for model in MODELS)


def test_the_example_says_what_clients_send() -> None:
    plan = plan_of(EXAMPLE)
    ensemble = plan.model(Kind.ENSEMBLE)
    assert ensemble is not None
    assert {tensor.name for tensor in ensemble.config.input if not tensor.optional} == {
        "text_input", "max_tokens"}
    assert all(ours == theirs for theirs, ours in plan.tensors.inputs.items())
    assert {"text_output", "cum_log_probs", "generation_logits"} <= set(plan.tensors.outputs)
    assert [step.model_name for step in ensemble.config.ensemble_scheduling.step] == [
        "preprocessing", "disaggregated_serving_bls", "postprocessing"]


def test_devices_that_it_names_are_gpus_where_there_are_any(repository: Copy) -> None:
    assert plan_of(EXAMPLE).job.device == "auto"
    assert plan_of(EXAMPLE, {"device": "cpu"}).job.device == "cpu"
    for model in ("context", "generation"):
        repository.set(model, gpu_device_ids="")
    assert repository.plan().job.device == "cpu"


def test_data_parallel_copies_as_in_the_guides_last_section(repository: Copy) -> None:
    repository.set("context", participant_ids="1,2;3,4", gpu_device_ids="0,1;2,3")
    repository.copies("context", 2)
    repository.set("generation", participant_ids="5", gpu_device_ids="3")
    topology = repository.plan().topology
    assert topology.sum_text() == "6 = 1 orchestrator + 4 context + 1 generation"
    assert [(group.name, str(group.shape), group.ranks, group.device_ids) for group in topology.groups] == [
        ("context 0", "tp2", (1, 2), (0, 1)), ("context 1", "tp2", (3, 4), (2, 3)),
        ("generation 0", "tp1", (5,), (3,))]


def test_one_model_for_both_phases(repository: Copy) -> None:
    for model in ("generation", "disaggregated_serving_bls"):
        shutil.rmtree(repository.folder / model)
    (repository.folder / "context").rename(repository.folder / "tensorrt_llm")
    repository.sub("tensorrt_llm", '^#.*\n\nname: "context"', 'name: "tensorrt_llm"')
    repository.sub("ensemble", '"disaggregated_serving_bls"', '"tensorrt_llm"')
    repository.set("tensorrt_llm", participant_ids="1;2", gpu_device_ids="0")
    repository.copies("tensorrt_llm", 2)
    plan = repository.plan()
    assert plan.topology.sum_text() == "3 = 1 orchestrator + 2 aggregated"
    assert [group.device_ids for group in plan.topology.groups] == [(0,), (0,)]
    assert "ensemble → preprocessing → tensorrt_llm → postprocessing" in plan.lines()[0]
    assert set(plan.tensors.outputs) >= {"text_output", "output_log_probs"}


# ---- templates ----


def test_a_template_is_the_default_job(repository: Copy) -> None:
    as_template(repository)
    repository.sub("disaggregated_serving_bls", r'string_value: "\w+"', 'string_value: "${name}"')
    plan = repository.plan()
    assert plan.job == JobConfig(context=(Instance(),), generation=(Instance(),))
    assert [group.ranks for group in plan.topology.groups] == [(1,), (2,)]
    assert not plan.exclude_input_in_output
    for model in plan.models:
        assert model.config.max_batch_size == plan.job.max_batch_size
    context = plan.model(Kind.CONTEXT)
    assert context is not None and context.config.model_transaction_policy.decoupled
    logits = [tensor for tensor in context.config.output if tensor.name.endswith("logits")]
    assert {tensor.data_type for tensor in logits} == {11}  # TYPE_FP32
    assert plan.unused["context"] == ("dynamic_batching (requests join a running batch at once)",)


def test_ids_that_nobody_gave_are_numbered_context_first(repository: Copy) -> None:
    as_template(repository)
    repository.sub("generation", r"count: \$\{\w+\}", "count: 2")
    repository.set("generation", gpu_device_ids="0,1;2,3")
    assert [(group.name, group.ranks) for group in repository.plan().topology.groups] == [
        ("context 0", (1,)), ("generation 0", (2, 3)), ("generation 1", (4, 5))]


def test_only_fields_that_are_open_are_left_out() -> None:
    text = """# name: ${x}
name: "a ${name} # no comment" max_batch_size: ${b}
backend: '${c}'
model_transaction_policy { decoupled: ${decoupled_mode}, }
dynamic_batching { preferred_batch_size: [ 4, ${d} ]
  max_queue_delay_microseconds:
    ${e}, preserve_ordering: true }
instance_group [ { count: ${f}, kind: KIND_CPU } ]
output [ { name: "k" }, { name: "k" } ],
input: [ { name: "i", data_type: ${logits_datatype}, dims: [ -1 ] } ]
parameters { key: "p" value { string_value: "${p}" } }
"""
    assert close_template(text).count("\n") == text.count("\n")
    config = parse_config(text, Path("x"))
    assert config.name == "a ${name} # no comment"
    assert config.backend == "${c}"
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled
    assert list(config.dynamic_batching.preferred_batch_size) == []
    assert config.dynamic_batching.preserve_ordering
    assert config.instance_group[0].count == 0 and config.instance_group[0].kind == 2  # KIND_CPU
    assert [tensor.name for tensor in config.output] == ["k", "k"]
    assert config.input[0].data_type == 11 and list(config.input[0].dims) == [-1]
    assert config.parameters["p"].string_value == "${p}"


PIECES = [*'ab:[]{}"\'#$\n ,;-1\\', "${x}", "name", "input", "count", "parameters", "key"]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_configuration_or_an_error_with_its_line(text: str) -> None:
    assert close_template(text).count("\n") == text.count("\n")
    try:
        parse_config(text, Path("m/config.pbtxt"))
    except ConfigError as error:
        found = re.match(r"m/config\.pbtxt:(\d+): not a model configuration: .", str(error))
        assert found and 1 <= int(found[1]) <= text.count("\n") + 1, str(error)


@pytest.mark.parametrize(("data", "message"), [
    (b"\xff\xfe\x00", r":1: not a model configuration: not UTF-8"),
    (b'name: "a"\nbackend: "\xff"\n', r":2: not a model configuration: not UTF-8"),
    (b"\x7fELF\x00\x00" * 50_000, r":1: not a model configuration"),
    (b"name: 'context'\nmax_batch: 3\n", r':2: .*no field named "max_batch"'),
    (b"input [" * 5000, r":1: not a model configuration"),
    (b"ensemble_scheduling {" * 5000, r"not a model configuration"),
    (b"x" * 300_000, r":1: not a model configuration: .{0,210}$"),
    (b'\n\nparameters { key: "a" value: { string_value: 3 } }', r":3: "),
    (b"instance_group [ { count: 99999999999 } ]", r":1: .*out of range"),
])
def test_garbage_is_one_clear_error(repository: Copy, data: bytes, message: str) -> None:
    repository.file("context").write_bytes(data)
    fault = repository.fault()
    assert re.search(message, fault) and str(repository.file("context")) in fault
    assert "\n" not in fault and len(fault) < 600


def test_a_byte_order_mark_is_nothing(repository: Copy) -> None:
    repository.file("context").write_bytes(b"\xef\xbb\xbf" + repository.file("context").read_bytes())
    assert repository.plan().job == plan_of(EXAMPLE).job


# ---- parameters ----


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "False", "false", "0"])
def test_booleans_in_every_spelling(repository: Copy, text: str) -> None:
    for model in ("context", "generation"):
        repository.set(model, enable_kv_cache_reuse=text)
    assert repository.plan().job.prefix_cache is (text.lower() in ("true", "1"))


def test_sizes_are_taken_and_where_they_differ_the_larger(repository: Copy) -> None:
    repository.set("context", max_tokens_in_paged_kv_cache="2048", enable_kv_cache_reuse="false")
    repository.set("generation", max_tokens_in_paged_kv_cache="4096", enable_kv_cache_reuse="false")
    repository.sub("generation", "max_batch_size: 64", "max_batch_size: 1024")
    plan = repository.plan()
    assert (plan.job.kv_tokens, plan.job.prefix_cache) == (4096, False)
    assert (plan.job.max_batch_size, plan.job.token_budget) == (1024, 1024)
    assert plan.job.replace(device="cuda").token_budget == 4096, "a GPU's is not lowered to the batch"
    assert "max_batch_size is 64 of context and 1024 of generation: this engine has one for both, 1024" \
        in plan.remarks
    assert any("2048 of context and 4096 of generation" in remark for remark in plan.remarks)
    assert not any("enable_kv_cache_reuse" in remark for remark in plan.remarks)


def test_what_is_typed_wins(repository: Copy) -> None:
    repository.set("context", participant_ids="1,2,3,4", gpu_device_ids="", gpt_model_path="/nowhere")
    repository.set("generation", participant_ids="5")
    plan = repository.plan(model="some/model", context="tp2pp2", kv_tokens=77, dtype="bf16")
    assert (plan.job.model, plan.job.kv_tokens, plan.job.dtype) == ("some/model", 77, "bf16")
    assert [(str(group.shape), group.ranks) for group in plan.topology.groups] == [
        ("tp2pp2", (1, 2, 3, 4)), ("tp1", (5,))]
    plan = repository.plan(model="m", context_participant_ids="1;2", generation_participant_ids="3")
    assert [group.ranks for group in plan.topology.groups] == [(1,), (2,), (3,)]


def test_what_is_not_used_is_listed_once_by_model(repository: Copy) -> None:
    for model in ("context", "generation"):
        repository.set(model, kv_cache_free_gpu_mem_fraction="0.9", gpt_model_type="V1", max_beam_width="1",
                       sink_token_length="${sink_token_length}", medusa_choices="x" * 100)
    repository.set("generation", max_beam_width="4", enable_chunked_context="false")
    repository.set("preprocessing", add_special_tokens="False")
    repository.sub("postprocessing", "count: 1", "count: 3")
    repository.file("ensemble").write_text(repository.file("ensemble").read_text()
                                           + "version_policy { latest { num_versions: 1 } }\n")
    plan = repository.plan()
    same = ("gpt_model_type=V1 (requests are always batched in flight)", "kv_cache_free_gpu_mem_fraction=0.9")
    assert plan.unused["context"] == (*same, f"medusa_choices={'x' * 40}…")
    assert plan.unused["generation"] == (
        "enable_chunked_context=false (a prompt beyond --max-num-tokens is always computed in chunks)",
        same[0], same[1], "max_beam_width=4 (there is no beam search)", f"medusa_choices={'x' * 40}…")
    assert plan.unused["preprocessing"] == ("add_special_tokens=False",)
    assert plan.unused["postprocessing"] == ("count=3 of instance_group",)
    assert plan.unused["ensemble"] == ("version_policy",)
    assert sum("not used, of" in line for line in plan.lines()) == 5
    repository.file("generation").write_text(
        repository.file("context").read_text().replace('name: "context"', 'name: "generation"')
        .replace('participant_ids" value { string_value: "1"', 'participant_ids" value { string_value: "2"'))
    assert any(line.startswith("not used, of context and generation: ") for line in repository.plan().lines())


def test_programs_and_models_that_are_not_served_are_told(repository: Copy) -> None:
    (repository.folder / "preprocessing" / "1" / "model.py").write_text("")
    (repository.folder / "preprocessing" / "7").mkdir()
    (repository.folder / "preprocessing" / "7" / "model.py").write_text("")
    (repository.folder / "old").mkdir()
    (repository.folder / "old" / "config.pbtxt").write_text('backend: "python"')
    (repository.folder / ".git").mkdir()
    plan = repository.plan()
    assert any("model.py is not run, of preprocessing:" in remark for remark in plan.remarks)
    assert any(remark.startswith("not served: old ") for remark in plan.remarks)
    assert [model.version for model in plan.models if model.name == "preprocessing"] == ["7"]


def test_a_parameter_that_is_there_twice_is_told(repository: Copy) -> None:
    file = repository.file("context")
    file.write_text(file.read_text() + '\nparameters {\n  key: "participant_ids"\n'
                                       '  value { string_value: "${participant_ids}" }\n}\n')
    (remark,) = repository.plan().remarks
    assert re.search(r"context/config\.pbtxt has participant_ids on lines \d+ and \d+; the last one holds",
                     remark)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("participant_ids", "1,x", "participant_ids is '1,x'; needed are whole numbers"),
    ("participant_ids", "1;", "participant_ids is '1;'; needed are whole numbers"),
    ("gpu_device_ids", "-1", "gpu_device_ids is '-1'; needed are whole numbers"),
    ("max_tokens_in_paged_kv_cache", "0", "max_tokens_in_paged_kv_cache is '0'; needed is a whole number"),
    ("max_tokens_in_paged_kv_cache", "1e9", "is '1e9'; needed is a whole number"),
    ("pipeline_parallel_size", "-2", "pipeline_parallel_size is '-2'; needed is a whole number"),
    ("enable_kv_cache_reuse", "yes", "enable_kv_cache_reuse is 'yes'; needed is true or false"),
    ("gpt_model_path", "/no/such/folder", "gpt_model_path is '/no/such/folder'; found nothing there"),
])
def test_a_value_that_cannot_be_is_named_with_its_line(
        repository: Copy, name: str, value: str, message: str) -> None:
    repository.set("context", **{name: value})
    fault = repository.fault()
    assert fault.startswith(repository.line("context", f'"{name}"'))
    assert message in fault


@given(st.dictionaries(st.sampled_from(["a", "b", "participant_ids"]), st.text(max_size=8), max_size=3))
@settings(max_examples=50, deadline=None)
def test_any_parameters_are_read_or_refused(values: dict[str, str]) -> None:
    config = parse_config("", Path("m/config.pbtxt"))
    for name, value in values.items():
        config.parameters[name].string_value = value
    file = read_config(EXAMPLE / "context" / "config.pbtxt")
    parameters = Parameters(type(file)(file.path, "", config))
    for read in (parameters.positive, parameters.flag, parameters.ids, parameters.text):
        try:
            read("participant_ids")
        except ConfigError as error:
            assert "participant_ids is " in str(error)
    assert set(parameters.unused()) == {name for name in ("a", "b") if values.get(name, "").strip()}


# ---- ids and copies ----

WIDTHS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(context=WIDTHS, generation=WIDTHS, order=st.randoms(use_true_random=False), with_devices=st.booleans())
@settings(max_examples=40, deadline=None)
def test_ids_and_copies_are_the_topology(
        tmp_path_factory: pytest.TempPathFactory, context: list[int], generation: list[int], order: Any,
        with_devices: bool) -> None:
    repository = Copy(tmp_path_factory.mktemp("ids") / "models")
    ranks = list(range(1, 1 + sum(context) + sum(generation)))
    order.shuffle(ranks)
    expected = []
    for model, widths in (("context", context), ("generation", generation)):
        groups = [tuple(ranks.pop() for _ in range(width)) for width in widths]
        devices = [tuple(range(width)) for width in widths]
        repository.set(model, participant_ids=format_ids(groups),
                       gpu_device_ids=format_ids(devices) if with_devices else "")
        repository.copies(model, len(widths))
        expected += [(f"{model} {index}", group, device if with_devices else None)
                     for index, (group, device) in enumerate(zip(groups, devices, strict=True))]
    topology = repository.plan().topology
    assert [(group.name, group.ranks, group.device_ids) for group in topology.groups] == expected
    assert topology.world_size == 1 + sum(context) + sum(generation)


@given(num_groups=st.integers(1, 4), count=st.integers(1, 4))
@settings(max_examples=16, deadline=None)
def test_groups_and_copies_must_be_as_many(
        tmp_path_factory: pytest.TempPathFactory, num_groups: int, count: int) -> None:
    repository = Copy(tmp_path_factory.mktemp("counts") / "models")
    repository.set("context", participant_ids=format_ids([(rank,) for rank in range(1, 1 + num_groups)]),
                   gpu_device_ids="")
    repository.set("generation", participant_ids=str(1 + num_groups))
    repository.copies("context", count)
    if count == num_groups:
        assert repository.plan().topology.world_size == 2 + count
        return
    fault = repository.fault(LayoutError)
    assert "participant_ids of context/config.pbtxt has" in fault
    assert 'type e.g. context/config.pbtxt participant_ids "' in fault
    assert "rank 0   orchestrator" in fault


@pytest.mark.parametrize(("context", "generation", "message"), [
    ("1", "1", "rank 1 is named by context 0 and by generation 0"),
    ("0", "1", "rank 0 is named by context 0, but is the orchestrator's"),
    ("1", "4", "rank 2 is nobody's, but generation 0 names rank 4"),
    ("1,1", "2", "rank 1 is named twice by context 0"),
])
def test_ranks_that_do_not_match_are_shown_on_the_map(
        repository: Copy, context: str, generation: str, message: str) -> None:
    repository.set("context", participant_ids=context, gpu_device_ids="")
    repository.set("generation", participant_ids=generation)
    fault = repository.fault(LayoutError)
    assert message in fault and str(repository.folder) in fault and "rank 0" in fault
    assert "--context" not in fault


def test_devices_must_be_as_many_as_ranks(repository: Copy) -> None:
    repository.set("context", participant_ids="1,2", gpu_device_ids="0")
    repository.set("generation", participant_ids="3")
    assert "context 0 is tp2, 2 ranks, but has 1 device id: 0" in repository.fault(LayoutError)


@pytest.mark.parametrize("count", [-1, 70000])
def test_copies_that_cannot_be(repository: Copy, count: int) -> None:
    repository.copies("context", count)
    assert repository.fault().startswith(repository.line("context", "count:"))


def test_counts_of_several_groups_add_up(repository: Copy) -> None:
    repository.sub("generation", r"instance_group \[.*\]",
                   "instance_group [ { count: 1 }, { kind: KIND_CPU, gpus: [ 0 ] } ]")
    repository.set("generation", participant_ids="2;3", gpu_device_ids="0")
    plan = repository.plan()
    assert plan.topology.world_size == 4
    assert plan.unused["generation"] == ("gpus of instance_group",)


def test_a_batch_size_that_cannot_be(repository: Copy) -> None:
    repository.sub("context", "max_batch_size: 64", "max_batch_size: -3")
    assert repository.fault().startswith(repository.line("context", "max_batch_size"))


# ---- pipeline stages ----


def test_stages_are_a_parameter(repository: Copy) -> None:
    repository.set("context", participant_ids="1,2,3,4", gpu_device_ids="", pipeline_parallel_size="2")
    repository.set("generation", participant_ids="5")
    assert str(repository.plan().topology.groups[0].shape) == "tp2pp2"
    repository.set("context", pipeline_parallel_size="3")
    fault = repository.fault(LayoutError)
    assert fault.startswith(repository.line("context", '"participant_ids"'))
    assert "has 4 ranks, which 3 pipeline stages cannot share evenly" in fault


def make_engine(folder: Path, tp: int, pp: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(
        {"version": "0.19.0", "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}}, "build_config": {}}))
    return folder


def make_model(folder: Path, tokenizer: str = "{}") -> Path:
    """The smallest directory that has all that a model needs."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_an_engine_gives_its_shape_and_the_tokenizers_directory_the_weights(
        repository: Copy, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    as_template(repository)
    repository.set("context", gpt_model_path=str(make_engine(tmp_path / "a", 2, 2)))
    repository.set("generation", gpt_model_path=str(make_engine(tmp_path / "b", 1, 1)))
    fault = repository.fault()
    assert "is an engine of TensorRT-LLM, which nothing else can load" in fault
    assert "set gpt_model_path of context and generation" in fault
    repository.set("preprocessing", tokenizer_dir=str(model))
    plan = repository.plan()
    assert plan.job.model == str(model)
    assert [str(group.shape) for group in plan.topology.groups] == ["tp2pp2", "tp1"]
    assert plan.remarks[0] == (
        f"context: gpt_model_path is an engine of TensorRT-LLM; the weights are those of {model}")
    repository.set("context", participant_ids="1,2")
    assert "has 2 ranks, but its engine" in repository.fault(LayoutError)


def test_with_engine_tensorrt_llm_the_engines_themselves_are_run(
        repository: Copy, tmp_path: Path) -> None:
    as_template(repository)
    wide, narrow = make_engine(tmp_path / "a", 2, 2), make_engine(tmp_path / "b", 1, 1)
    repository.set("context", gpt_model_path=str(wide))
    repository.set("preprocessing", tokenizer_dir=str(tmp_path))
    given = {"engine": "tensorrt_llm"}
    job = repository.plan(**given).job
    assert (job.context_engine_dir, job.generation_engine_dir) == (str(wide), None)
    repository.set("generation", gpt_model_path=str(narrow))
    plan = repository.plan(**given)
    assert plan.job.generation_engine_dir == str(narrow) and plan.job.model == str(tmp_path)
    assert [str(group.shape) for group in plan.topology.groups] == ["tp2pp2", "tp1"]
    assert not any("gpt_model_path" in what for unused in plan.unused.values() for what in unused)
    typed = repository.plan(**given, context_engine_dir="typed", model="mine").job
    assert (typed.context_engine_dir, typed.model) == ("typed", "mine")
    repository.set("context", gpt_model_path=str(make_model(tmp_path / "hf")))
    fault = repository.fault(**given)
    assert fault.startswith(repository.line("context", '"gpt_model_path"'))
    assert "found no engine of TensorRT-LLM there" in fault


def test_old_engines_say_it_elsewhere(repository: Copy, tmp_path: Path) -> None:
    engine = tmp_path / "old"
    engine.mkdir()
    (engine / "config.json").write_text('{"builder_config": {"tensor_parallel": 2, "pipeline_parallel": 3}}')
    as_template(repository)
    repository.set("context", gpt_model_path=str(engine))
    repository.set("preprocessing", tokenizer_dir=str(make_model(tmp_path / "hf")))
    assert str(repository.plan().topology.groups[0].shape) == "tp2pp3"
    (engine / "config.json").write_text('{"builder_config": {"tensor_parallel": "many"}}')
    assert "found tp 'many'" in repository.fault(ModelError)
    (engine / "config.json").unlink()
    (engine / "rank0.engine").write_text("")
    assert "has an engine of TensorRT-LLM but no config.json" in repository.fault()


# ---- the model ----


def test_the_model_is_a_hugging_face_directory(repository: Copy, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    (tmp_path / "link").symlink_to(model)
    repository.set("context", gpt_model_path=str(model))
    assert repository.plan().job.model == str(model)
    repository.set("generation", gpt_model_path=str(tmp_path / "link"))
    repository.set("preprocessing", tokenizer_dir=str(model))
    plan = repository.plan()
    assert plan.job.model == str(model) and not plan.remarks
    repository.set("generation", gpt_model_path=str(make_model(tmp_path / "other")))
    fault = repository.fault()
    assert fault.startswith(repository.line("generation", '"gpt_model_path"'))
    assert "one job serves one model" in fault


def test_a_model_that_is_not_whole_is_refused(repository: Copy, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    (model / "model.safetensors").unlink()
    repository.set("context", gpt_model_path=str(model))
    fault = repository.fault(ModelError)
    assert fault.startswith(repository.line("context", '"gpt_model_path"'))
    assert "which is not a whole model" in fault
    repository.set("context", gpt_model_path=str(model / "config.json"))
    assert "found a file there" in repository.fault()


def test_hub_ids_and_gguf_files_are_passed_on(repository: Copy, tmp_path: Path) -> None:
    repository.set("context", gpt_model_path="some-org/some-model")
    assert repository.plan().job.model == "some-org/some-model"
    (tmp_path / "m.gguf").write_text("")
    repository.set("context", gpt_model_path=str(tmp_path / "m.gguf"))
    repository.set("postprocessing", tokenizer_dir="some-org/some-tokenizer")
    plan = repository.plan()
    assert plan.job.model == str(tmp_path / "m.gguf")
    assert any("tokenizer_dir some-org/some-tokenizer is not used" in remark for remark in plan.remarks)


def test_another_tokenizer_is_refused(repository: Copy, tmp_path: Path) -> None:
    model, other = make_model(tmp_path / "hf"), make_model(tmp_path / "other")
    repository.set("context", gpt_model_path=str(model))
    repository.set("preprocessing", tokenizer_dir=str(other))
    assert repository.plan().job.model == str(model)
    (other / "tokenizer.json").write_text('{"version": "2"}')
    fault = repository.fault()
    assert fault.startswith(repository.line("preprocessing", '"tokenizer_dir"'))
    assert "is not the model's own tokenizer" in fault


# ---- which model does what ----


def test_the_step_that_was_not_renamed_is_named(repository: Copy) -> None:
    repository.sub("ensemble", '"disaggregated_serving_bls"', '"tensorrt_llm"')
    fault = repository.fault()
    assert fault.startswith(repository.line("ensemble", '"tensorrt_llm"'))
    assert 'write model_name: "disaggregated_serving_bls"' in fault
    shutil.copytree(repository.folder / "context", repository.folder / "tensorrt_llm")
    repository.sub("tensorrt_llm", 'name: "context"', 'name: "tensorrt_llm"')
    assert repository.fault() == fault


def test_a_copied_model_must_be_renamed(repository: Copy) -> None:
    repository.sub("context", 'name: "context"', 'name: "tensorrt_llm"')
    fault = repository.fault()
    assert fault.startswith(repository.line("context", 'name: "tensorrt_llm"'))
    assert 'write name: "context"' in fault


def test_names_are_free(repository: Copy) -> None:
    for old, new in (("context", "prefill"), ("generation", "decode"), ("ensemble", "chat"),
                     ("preprocessing", "before"), ("disaggregated_serving_bls", "lead")):
        (repository.folder / old).rename(repository.folder / new)
        repository.sub(new, f'name: "{old}"', f'name: "{new}"')
    repository.sub("lead", 'string_value: "context"', 'string_value: "prefill"')
    repository.sub("lead", 'string_value: "generation"', 'string_value: "decode"')
    repository.sub("chat", '"preprocessing"', '"before"')
    repository.sub("chat", '"disaggregated_serving_bls"', '"lead"')
    plan = repository.plan()
    assert [model.name for model in plan.models] == [
        "chat", "before", "lead", "postprocessing", "prefill", "decode"]
    assert "context is prefill, generation is decode" in plan.lines()[0]
    repository.set("prefill", participant_ids="1;2")
    assert "participant_ids of prefill/config.pbtxt has 2 groups" in repository.fault(LayoutError)


@pytest.mark.parametrize(("model", "pattern", "text", "message"), [
    ("disaggregated_serving_bls", '"context" }', '"prefill" }',
     "context_model_name names the model 'prefill', but .* has no model of that name; its models are: con"),
    ("disaggregated_serving_bls", '"generation" }', '"context" }', "and generation are the same model"),
    ("ensemble", 'model_name: "preprocessing"', 'model_name: "pre"', "a step of .* names the model 'pre'"),
    ("ensemble", 'value: "_TOKENS"', 'value: "_OTHER"', None),
    ("ensemble", 'key: "TOKENS_BATCH" value: "_TOKENS"', 'key: "TOKENS_BATCH" value: "_X"', None),
    ("ensemble", 'key: "QUERY" value: "text_input"', 'key: "QUERY" value: "_text"',
     "no input of the ensemble is what the guide calls text_input; needed is an input .* QUERY"),
    ("ensemble", 'value: "text_output"', 'value: "_text"', "no output of the ensemble .* text_output"),
    ("ensemble", "(?s)ensemble_scheduling .*", "", "the ensemble has no steps"),
    ("ensemble", r"(?s),\n    \{\n      model_name: .postproc.*", "]}", "has no step for postprocessing"),
])
def test_what_does_not_lead_from_text_to_text(
        repository: Copy, model: str, pattern: str, text: str, message: str | None) -> None:
    repository.sub(model, pattern, text)
    if message is None:  # still linked by another tensor
        assert repository.plan().model(Kind.POSTPROCESSING) is not None
        return
    assert re.search(message, repository.fault())


def test_a_step_that_nothing_links(repository: Copy) -> None:
    repository.sub("ensemble", '"_INPUT_ID"|"_REQUEST_INPUT_LEN"', '"_A"')
    text = repository.file("ensemble").read_text()
    first, rest = text.split('model_name: "disaggregated_serving_bls"')
    for name in set(re.findall(r'value: "(_\w+)"', first)):
        rest = rest.replace(f'"{name}"', f'"{name}_ELSEWHERE"')
    repository.file("ensemble").write_text(f'{first}model_name: "disaggregated_serving_bls"{rest}')
    fault = repository.fault()
    assert fault.startswith(repository.line("ensemble", 'model_name: "preprocessing"'))
    assert "is neither the step before" in fault


def test_an_open_name_must_have_its_usual_model(repository: Copy) -> None:
    repository.sub("disaggregated_serving_bls", '"context" }', '"${context_model_name}" }')
    assert repository.plan().model(Kind.CONTEXT) is not None
    (repository.folder / "context").rename(repository.folder / "prefill")
    repository.sub("prefill", 'name: "context"', 'name: "prefill"')
    assert re.search("context_model_name is not set and .* has no model 'context'; set it to .*prefill",
                     repository.fault())


def test_what_is_missing_is_named(repository: Copy, tmp_path: Path) -> None:
    repository.file("context").unlink()
    assert re.search(r"context has no config\.pbtxt", repository.fault())
    shutil.copy(EXAMPLE / "context" / "config.pbtxt", repository.file("context"))
    shutil.rmtree(repository.folder / "disaggregated_serving_bls")
    assert "to serve context and generation add disaggregated_serving_bls" in repository.fault()
    shutil.rmtree(repository.folder / "ensemble")
    assert "has no ensemble, the model that clients send text to" in repository.fault()
    for folder, message in ((tmp_path / "nothing", "no such folder"), (repository.file("context"), "a file"),
                            (repository.folder / "context", "the folder of one model"),
                            (repository.folder / "context" / "1", "no folder in it has a config.pbtxt")):
        with pytest.raises(ConfigError, match=message):
            plan_of(folder)


def test_two_bls_are_one_too_many(repository: Copy) -> None:
    shutil.copytree(repository.folder / "disaggregated_serving_bls", repository.folder / "second")
    repository.sub("second", 'name: "disaggregated_serving_bls"', 'name: "second"')
    assert "both name context and generation models" in repository.fault()


# ---- tensors ----


def test_an_ensemble_may_call_its_tensors_what_it_likes(repository: Copy) -> None:
    for old, new in (("text_input", "INPUT_0"), ("top_k", "runtime_top_k"), ("text_output", "OUTPUT_0"),
                     ("cum_log_probs", "_CUM")):
        repository.sub("ensemble", f'(?<=name: )"{old}"|(?<=value: )"{old}"', f'"{new}"')
    repository.sub("ensemble", 'key: "min_tokens"', 'key: "min_length"')
    names = repository.plan().tensors
    assert names.inputs["INPUT_0"] == "text_input"
    assert names.inputs["runtime_top_k"] == "top_k"
    assert names.inputs["min_tokens"] == "min_tokens"
    assert names.outputs["text_output"] == "OUTPUT_0"
    assert names.outputs["cum_log_probs"] == "_CUM"


def test_old_ensembles_pass_log_probabilities_through_postprocessing(repository: Copy) -> None:
    repository.sub("ensemble", 'output_map { key: "cum_log_probs" value: "cum_log_probs" }',
                   'output_map { key: "cum_log_probs" value: "_CUM" }')
    repository.sub("ensemble", 'output_map { key: "OUTPUT" value: "text_output" }',
                   'input_map { key: "CUM_LOG_PROBS" value: "_CUM" }\n'
                   'output_map { key: "OUTPUT" value: "text_output" }\n'
                   'output_map { key: "OUT_CUM_LOG_PROBS" value: "cum_log_probs" }')
    assert repository.plan().tensors.outputs["cum_log_probs"] == "cum_log_probs"
