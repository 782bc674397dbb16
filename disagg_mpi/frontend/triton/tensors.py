"""The ensemble's names for its tensors, and ours.

An ensemble may call its tensors what it likes: its steps map them to the tensors of the models behind, which
have fixed names. Requests are understood by what a tensor feeds, so that a repository that calls the prompt
``INPUT_0`` works as well as the guide's.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.triton.wiring import Kind, Wiring, steps_of

# Where a model's tensor has another name than the ensemble's of the newest template; the others have the
# same.
_INPUTS: dict[Kind, dict[str, str]] = {
    Kind.PREPROCESSING: {
        "QUERY": "text_input", "DECODER_QUERY": "decoder_text_input", "REQUEST_OUTPUT_LEN": "max_tokens",
        "BAD_WORDS_DICT": "bad_words", "STOP_WORDS_DICT": "stop_words",
    },
    Kind.BLS: {
        "request_output_len": "max_tokens", "runtime_top_k": "top_k", "runtime_top_p": "top_p",
        "len_penalty": "length_penalty", "streaming": "stream", "min_length": "min_tokens",
        "random_seed": "seed", "prompt_table_extra_ids": "prompt_table_extra_id",
    },
}
_INPUTS[Kind.AGGREGATED] = _INPUTS[Kind.BLS]
_OUTPUTS = {"OUTPUT": "text_output"}

_NEEDED_INPUTS, _NEEDED_OUTPUT = ("text_input", "max_tokens"), "text_output"


@dataclass(frozen=True)
class TensorNames:
    """Both ways, for every tensor that the ensemble declares."""

    inputs: dict[str, str]
    """The ensemble's name → ours."""
    outputs: dict[str, str]
    """Our name → the ensemble's."""


def tensor_names(wiring: Wiring) -> TensorNames:
    """Follow the ensemble's tensors to what they feed and come from.

    An input that feeds nothing keeps its name. Raises :class:`ConfigError` unless there are a prompt, a
    number of tokens and a text that comes back.
    """
    config = wiring.ensemble.config
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    declared_in = [tensor.name for tensor in config.input]
    declared_out = {tensor.name for tensor in config.output}
    for model, takes, gives in steps_of(wiring.ensemble):
        kind = wiring.kind_of(model)
        assert kind is not None, "every step's model is wired"
        for inner, outer in sorted(takes.items()):  # protobuf's maps have no order
            inputs.setdefault(outer, _input_name(kind, inner))
        for inner, outer in sorted(gives.items()):
            if outer in declared_out:  # others only go from step to step
                outputs.setdefault(_output_name(kind, inner), outer)
    found = TensorNames({name: inputs.get(name, name) for name in declared_in}, outputs)
    fed = {ours for name, ours in inputs.items() if name in declared_in}
    missing = [name for name in _NEEDED_INPUTS if name not in fed]
    if missing or _NEEDED_OUTPUT not in found.outputs:
        name = missing[0] if missing else _NEEDED_OUTPUT
        raise ConfigError(f"{wiring.ensemble.path}: no {'input' if missing else 'output'} of the ensemble "
                          f"is what the guide calls {name}; needed is {_ADVICE[name]}")
    return found


_ADVICE = {
    "text_input": "an input that a step passes on as QUERY of preprocessing",
    "max_tokens": "an input that a step passes on as REQUEST_OUTPUT_LEN of preprocessing",
    "text_output": "an output that is OUTPUT of postprocessing",
}


def _input_name(kind: Kind, inner: str) -> str:
    special = _INPUTS.get(kind, {})
    return special.get(inner) or (inner.lower() if kind is Kind.PREPROCESSING else inner)


def _output_name(kind: Kind, inner: str) -> str:
    if kind is not Kind.POSTPROCESSING:
        return inner
    return _OUTPUTS.get(inner) or inner.removeprefix("OUT_").lower()
