"""The models that a client sees: names, roles, and each one's ``ModelConfig``.

Made once, before the servers: from a model repository, or by :func:`default_models` for a job that was
started without one. Nothing in it changes afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2, service_pb2

from disagg_mpi.errors import UnknownModelError
from disagg_mpi.frontend.kserve import ensemble
from disagg_mpi.frontend.triton.plan import ServePlan
from disagg_mpi.frontend.triton.wiring import Kind

ModelConfig: TypeAlias = model_config_pb2.ModelConfig

DEFAULT_MAX_BATCH_SIZE = 64
"""Rows of one request to the default ensemble."""


@dataclass(frozen=True)
class Model:
    """One name that a client may ask for."""

    name: str
    kind: Kind
    config: ModelConfig
    version: str = "1"
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Its name of an input → the table's, where a repository calls it otherwise."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """The table's name of an output → its own, where a repository calls it otherwise."""

    def ours(self, name: str) -> str:
        """The table's name of the input that this model calls ``name``."""
        return self.inputs.get(name, name)

    def theirs(self, name: str) -> str:
        """This model's name of the output that the table calls ``name``."""
        return self.outputs.get(name, name)

    @property
    def takes_text(self) -> bool:
        """Whether clients send it requests; the others are its parts."""
        return any(self.ours(tensor.name) == "text_input" for tensor in self.config.input)

    @property
    def max_batch_size(self) -> int:
        """0: it has no batches."""
        size: int = self.config.max_batch_size
        return size

    def metadata(self) -> service_pb2.ModelMetadataResponse:
        batch = [-1] if self.config.max_batch_size else []
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata

        def described(tensors: Any) -> list[Any]:
            return [tensor(name=each.name, datatype=_datatype(each.data_type), shape=[*batch, *each.dims])
                    for each in tensors]

        return service_pb2.ModelMetadataResponse(
            name=self.name, versions=[self.version], platform=self.config.platform or self.config.backend,
            inputs=described(self.config.input), outputs=described(self.config.output))


@dataclass(frozen=True)
class Models:
    """All of them, and what their configurations say about requests."""

    models: Sequence[Model]
    tokens_per_block: int
    """Of the job's KV-cache; for the block counts of ``return_perf_metrics``."""
    exclude_input_in_output: bool = False
    """The parameter of that name: what holds for requests that do not say."""
    _by_name: dict[str, Model] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {model.name: model for model in self.models})

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models)

    def get(self, name: str, version: str = "") -> Model:
        """Raises :class:`UnknownModelError`."""
        model = self._by_name.get(name)
        if model is None:
            raise UnknownModelError(f"Request for unknown model: '{name}' is not found; served are "
                                    f"{', '.join(self._by_name)}")
        if version not in ("", model.version):
            raise UnknownModelError(f"Request for unknown model: '{name}' version {version} is not found; "
                                    f"served is version {model.version}")
        return model

    def has(self, name: str, version: str = "") -> bool:
        model = self._by_name.get(name)
        return model is not None and version in ("", model.version)

    def composing(self, model: Model) -> list[Model]:
        """The models that an inference of ``model`` passes through, itself not among them, in order."""
        names = [step.model_name for step in model.config.ensemble_scheduling.step]
        parts = [self._by_name[name] for name in names if name in self._by_name and name != model.name]
        if model.kind is Kind.BLS or any(part.kind is Kind.BLS for part in parts):
            parts += [each for each in self.models if each.kind in (Kind.CONTEXT, Kind.GENERATION)]
        return parts


def default_models(
    *, is_aggregated: bool, tokens_per_block: int, max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
) -> Models:
    """What the guide's repository would have for this job."""
    made = [Model("ensemble", Kind.ENSEMBLE, _ensemble_config(
        "tensorrt_llm" if is_aggregated else "disaggregated_serving_bls", max_batch_size))]
    kinds = [("preprocessing", Kind.PREPROCESSING), ("postprocessing", Kind.POSTPROCESSING)]
    if is_aggregated:
        kinds.append(("tensorrt_llm", Kind.AGGREGATED))
    else:
        kinds += [("disaggregated_serving_bls", Kind.BLS), ("context", Kind.CONTEXT),
                  ("generation", Kind.GENERATION)]
    made += [Model(name, kind, _part_config(name, kind, max_batch_size)) for name, kind in kinds]
    return Models(made, tokens_per_block)


def repository_models(plan: ServePlan, tokens_per_block: int) -> Models:
    """The models of a repository, as its files describe them."""
    inputs = {theirs: ours for theirs, ours in plan.tensors.inputs.items() if theirs != ours}
    outputs = {ours: theirs for ours, theirs in plan.tensors.outputs.items() if theirs != ours}
    made = []
    for model in plan.models:
        names = (inputs, outputs) if model.kind is Kind.ENSEMBLE else ({}, {})
        made.append(Model(model.name, model.kind, model.config, model.version, *names))
    return Models(made, tokens_per_block, plan.exclude_input_in_output)


# Ensemble input → what the preprocessing and the language model call it, where they take it.
_PREPROCESSED = {
    "text_input": "QUERY", "decoder_text_input": "DECODER_QUERY", "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT", "stop_words": "STOP_WORDS_DICT",
    "embedding_bias_words": "EMBEDDING_BIAS_WORDS", "embedding_bias_weights": "EMBEDDING_BIAS_WEIGHTS",
    "end_id": "END_ID", "pad_id": "PAD_ID", "prompt_table_extra_id": "PROMPT_TABLE_EXTRA_ID",
}
_PREPARED = {  # tensors between preprocessing and the language model
    "INPUT_ID": ("input_ids", "INT32", (-1,)), "REQUEST_INPUT_LEN": ("input_lengths", "INT32", (1,)),
    "REQUEST_OUTPUT_LEN": ("request_output_len", "INT32", (1,)),
    "BAD_WORDS_IDS": ("bad_words_list", "INT32", (2, -1)),
    "STOP_WORDS_IDS": ("stop_words_list", "INT32", (2, -1)),
    "EMBEDDING_BIAS": ("embedding_bias", "FP32", (-1,)),
    "OUT_END_ID": ("end_id", "INT32", (1,)), "OUT_PAD_ID": ("pad_id", "INT32", (1,)),
}
_RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty",
            "stream": "streaming"}
_TOKENS = {  # tensors between the language model and postprocessing
    "output_ids": ("TOKENS_BATCH", "INT32", (-1, -1)),
    "sequence_length": ("SEQUENCE_LENGTH", "INT32", (-1,)),
}


def _direct_inputs() -> list[tuple[str, ensemble.Input]]:
    """Inputs that go past the preprocessing, with the names that the language model has for them."""
    return [(_RENAMED.get(tensor.name, tensor.name), tensor) for tensor in ensemble.INPUTS
            if tensor.name not in _PREPROCESSED]


def _ensemble_config(language_model: str, max_batch_size: int) -> ModelConfig:
    step = model_config_pb2.ModelEnsembling.Step
    others = [tensor.name for tensor in ensemble.OUTPUTS if tensor.name != "text_output"]
    return ModelConfig(
        name="ensemble", platform="ensemble", max_batch_size=max_batch_size,
        input=[_input(tensor.name, tensor.datatype, tensor.dims, optional=not tensor.is_required)
               for tensor in ensemble.INPUTS],
        output=[_output(*tensor) for tensor in ensemble.OUTPUTS],
        model_transaction_policy={"decoupled": True},
        ensemble_scheduling={"step": [
            step(model_name="preprocessing", model_version=-1,
                 input_map={theirs: ours for ours, theirs in _PREPROCESSED.items()},
                 output_map={name: f"_{name}" for name in _PREPARED}),
            step(model_name=language_model, model_version=-1,
                 input_map={**{theirs: f"_{name}" for name, (theirs, _, _) in _PREPARED.items()},
                            **{theirs: tensor.name for theirs, tensor in _direct_inputs()}},
                 output_map={**{name: f"_{theirs}" for name, (theirs, _, _) in _TOKENS.items()},
                             **{name: name for name in others}}),
            step(model_name="postprocessing", model_version=-1,
                 input_map={theirs: f"_{theirs}" for theirs, _, _ in _TOKENS.values()},
                 output_map={"OUTPUT": "text_output"}),
        ]})


def _part_config(name: str, kind: Kind, max_batch_size: int) -> ModelConfig:
    if kind is Kind.PREPROCESSING:
        inputs = [_input(_PREPROCESSED[tensor.name], tensor.datatype, tensor.dims,
                         optional=not tensor.is_required)
                  for tensor in ensemble.INPUTS if tensor.name in _PREPROCESSED]
        outputs = [_output(theirs, datatype, dims) for theirs, (_, datatype, dims) in _PREPARED.items()]
    elif kind is Kind.POSTPROCESSING:
        inputs = [_input(theirs, datatype, dims, optional=False)
                  for theirs, datatype, dims in _TOKENS.values()]
        outputs = [_output("OUTPUT", "BYTES", (-1,))]
    else:
        needed = ("input_ids", "input_lengths", "request_output_len")
        inputs = [_input(theirs, datatype, dims, optional=theirs not in needed)
                  for theirs, datatype, dims in _PREPARED.values()]
        inputs += [_input(theirs, tensor.datatype, tensor.dims, optional=True)
                   for theirs, tensor in _direct_inputs()]
        outputs = [_output(ours, datatype, dims) for ours, (_, datatype, dims) in _TOKENS.items()]
        outputs += [_output(*tensor) for tensor in ensemble.OUTPUTS if tensor.name != "text_output"]
    is_text_work = kind in (Kind.PREPROCESSING, Kind.POSTPROCESSING)
    return ModelConfig(
        name=name, backend="disagg_mpi", max_batch_size=max_batch_size, input=inputs, output=outputs,
        model_transaction_policy={"decoupled": not is_text_work})


def _input(name: str, datatype: str, dims: Sequence[int], *, optional: bool) -> model_config_pb2.ModelInput:
    return model_config_pb2.ModelInput(
        name=name, data_type=_type_of(datatype), dims=dims, optional=optional)


def _output(name: str, datatype: str, dims: Sequence[int]) -> model_config_pb2.ModelOutput:
    return model_config_pb2.ModelOutput(name=name, data_type=_type_of(datatype), dims=dims)


def _type_of(datatype: str) -> Any:
    """KServe's name of a type as the configuration's number."""
    return model_config_pb2.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def _datatype(number: int) -> str:
    name = model_config_pb2.DataType.Name(number).removeprefix("TYPE_")  # type: ignore[arg-type]
    return "BYTES" if name == "STRING" else name


def as_json(message: Message) -> dict[str, Any]:
    """A message as Triton's HTTP endpoints show it: every plain field, numbers as numbers.

    protobuf's own JSON writes 64-bit numbers as text, which clients that read ``dims`` do not take.
    """
    data: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        nested = descriptor.message_type
        if nested is not None and nested.GetOptions().map_entry:
            holds = nested.fields_by_name["value"].message_type is not None
            data[descriptor.name] = {
                key: as_json(value[key]) if holds else value[key] for key in sorted(value)}
        elif descriptor.is_repeated:
            data[descriptor.name] = [_plain(descriptor, item) for item in value]
        elif nested is None or message.HasField(descriptor.name):
            data[descriptor.name] = _plain(descriptor, value)
    return data


def _plain(descriptor: Any, value: Any) -> Any:
    if descriptor.message_type is not None:
        return as_json(value)
    if descriptor.enum_type is not None:
        return descriptor.enum_type.values_by_number[value].name
    return value
