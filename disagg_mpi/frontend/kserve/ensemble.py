"""The table of the ensemble's tensors, and what a request of them asks of the engine. Pure.

:data:`INPUTS` and :data:`OUTPUTS` are the one definition of names, types and shapes: the default
configuration and metadata are made of it, requests are checked against it. Shapes are ``[batch] + dims``
where a model has batches. Absent tensors mean what they mean to TensorRT-LLM: without ``top_k`` and ``top_p``
the output is greedy whatever the temperature, ``top_k`` 0 is all tokens, ``top_p`` 0 or less is none.
Differences on purpose: an absent ``seed`` is a new one each time, and ``min_tokens`` starts at 0, as in the
other front ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from disagg_mpi.errors import RequestError
from disagg_mpi.frontend.kserve.tensors import Incoming
from disagg_mpi.request import Guided, SamplingParams

MAX_WORDS = 256
"""Stop words, bad words or bias words of one prompt: the leader looks for each of them in every step."""
MAX_WORD_LENGTH = 1024
"""Characters of one of them: they are turned into tokens between two steps of the event loop."""

_FLOATS = ("FP16", "FP32", "FP64")
_INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")


class Input(NamedTuple):
    """An input tensor. Any width of its kind of number is taken: templates changed theirs over time."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    """Names that older templates gave it."""
    is_required: bool = False

    @property
    def datatypes(self) -> tuple[str, ...]:
        """Those that are taken."""
        return next((kind for kind in (_INTEGERS, _FLOATS) if self.datatype in kind), (self.datatype,))


class Output(NamedTuple):
    """An output tensor."""

    name: str
    datatype: str
    dims: tuple[int, ...]


_ONE, _MANY = (1,), (-1,)

INPUTS = (
    Input("text_input", "BYTES", _ONE, is_required=True),
    Input("max_tokens", "INT32", _ONE, ("request_output_len",), is_required=True),
    Input("decoder_text_input", "BYTES", _ONE),
    Input("num_return_sequences", "INT32", _ONE),
    Input("bad_words", "BYTES", _MANY),
    Input("stop_words", "BYTES", _MANY),
    Input("end_id", "INT32", _ONE),
    Input("pad_id", "INT32", _ONE),
    Input("top_k", "INT32", _ONE, ("runtime_top_k",)),
    Input("top_p", "FP32", _ONE, ("runtime_top_p",)),
    Input("temperature", "FP32", _ONE),
    Input("length_penalty", "FP32", _ONE, ("len_penalty",)),
    Input("repetition_penalty", "FP32", _ONE),
    Input("min_tokens", "INT32", _ONE, ("min_length",)),
    Input("presence_penalty", "FP32", _ONE),
    Input("frequency_penalty", "FP32", _ONE),
    Input("seed", "UINT64", _ONE, ("random_seed",)),
    Input("return_log_probs", "BOOL", _ONE),
    Input("return_context_logits", "BOOL", _ONE),
    Input("return_generation_logits", "BOOL", _ONE),
    Input("return_perf_metrics", "BOOL", _ONE, ("return_kv_cache_reuse_stats",)),
    Input("exclude_input_in_output", "BOOL", _ONE),
    Input("beam_width", "INT32", _ONE),
    Input("stream", "BOOL", _ONE, ("streaming",)),
    Input("prompt_embedding_table", "FP16", (-1, -1)),
    Input("prompt_vocab_size", "INT32", _ONE),
    Input("prompt_table_extra_id", "UINT64", _ONE),
    Input("embedding_bias_words", "BYTES", _MANY),
    Input("embedding_bias_weights", "FP32", _MANY),
    Input("num_draft_tokens", "INT32", _ONE),
    Input("use_draft_logits", "BOOL", _ONE),
    Input("lora_task_id", "UINT64", _ONE),
    Input("lora_weights", "FP16", (-1, -1)),
    Input("lora_config", "INT32", (-1, 3)),
    Input("guided_decoding_guide_type", "BYTES", _ONE),
    Input("guided_decoding_guide", "BYTES", _ONE),
)

OUTPUTS = (
    Output("text_output", "BYTES", (-1,)),
    Output("cum_log_probs", "FP32", (-1,)),
    Output("output_log_probs", "FP32", (-1, -1)),
    Output("context_logits", "FP32", (-1, -1)),
    Output("generation_logits", "FP32", (-1, -1, -1)),
    Output("batch_index", "INT32", _ONE),
    Output("sequence_index", "INT32", _ONE),
    Output("kv_cache_alloc_new_blocks", "INT32", _ONE),
    Output("kv_cache_reused_blocks", "INT32", _ONE),
    Output("kv_cache_alloc_total_blocks", "INT32", _ONE),
    Output("arrival_time_ns", "INT64", _ONE),
    Output("first_scheduled_time_ns", "INT64", _ONE),
    Output("first_token_time_ns", "INT64", _ONE),
    Output("last_token_time_ns", "INT64", _ONE),
    Output("acceptance_rate", "FP32", _ONE),
    Output("total_accepted_draft_tokens", "INT32", _ONE),
    Output("total_draft_tokens", "INT32", _ONE),
)

INPUT_OF = {name: tensor for tensor in INPUTS for name in (tensor.name, *tensor.aliases)}
OUTPUT_NAMES = frozenset(tensor.name for tensor in OUTPUTS)

# What a text model cannot do; taken without a value that matters (no elements, 0, false, empty text).
_REFUSED = {
    "decoder_text_input": "it is for encoder-decoder models, and this one has only a decoder",
    "prompt_embedding_table": "prompt tuning is not served",
    "prompt_vocab_size": "prompt tuning is not served",
    "prompt_table_extra_id": "prompt tuning is not served",
    "num_draft_tokens": "speculative decoding is not served",
    "use_draft_logits": "speculative decoding is not served",
    "lora_task_id": "LoRA adapters are not served",
    "lora_weights": "LoRA adapters are not served",
    "lora_config": "LoRA adapters are not served",
}

Row = Mapping[str, Sequence[Any]]
"""One prompt's elements of each tensor that was given, by its name in the table."""


class Returns(msgspec.Struct, frozen=True):
    """What a prompt's replies carry beside text."""

    log_probs: bool = False
    context_logits: bool = False
    generation_logits: bool = False
    perf_metrics: bool = False


class Prompt(msgspec.Struct, frozen=True):
    """One row of a request."""

    text: str
    sampling: SamplingParams
    is_streamed: bool
    has_input_in_output: bool
    """Whether the output begins with the prompt; never where it is streamed."""
    returns: Returns


class Vocabulary(NamedTuple):
    """What is needed of a tokenizer to read a request."""

    encode: Callable[[str], list[int]]
    """The ids of a text, without special tokens."""
    eos_token_id: int | None


class Defaults(NamedTuple):
    """What the model's configuration and the server's limits say."""

    max_n: int
    has_input_in_output: bool = True


def read_rows(inputs: Iterable[Incoming], max_batch_size: int) -> list[Row]:
    """The rows of a request's tensors, checked against the table.

    ``max_batch_size`` 0: the model has no batches, shapes are ``dims`` alone. Raises :class:`RequestError`.
    """
    found: dict[str, list[Any]] = {}
    widths: dict[str, int] = {}
    num_rows: int | None = None
    for given in inputs:
        tensor = INPUT_OF.get(given.name)
        if tensor is None:
            raise RequestError(f"unexpected inference input '{given.name}'; known are "
                               f"{', '.join(known.name for known in INPUTS)}")
        if tensor.name in found:
            raise RequestError(f"input '{given.name}' is given twice")
        rows = _check_head(given, tensor, max_batch_size)
        num_rows = rows if num_rows is None else num_rows
        if rows != num_rows:
            raise RequestError(f"input '{given.name}' has {rows} rows where the inputs before it have "
                               f"{num_rows}; the first size of all inputs is the batch's")
        if tensor.name in _REFUSED and tensor.dims != _ONE and given.num_elements:
            raise RequestError(f"input '{given.name}' cannot be honoured: {_REFUSED[tensor.name]}")
        found[tensor.name] = given.load()
        widths[tensor.name] = given.num_elements // max(rows, 1)
    for tensor in INPUTS:
        if tensor.is_required and tensor.name not in found:
            raise RequestError(f"input '{tensor.name}' is missing; text_input and max_tokens are needed")
    return [{name: values[row * widths[name] : (row + 1) * widths[name]] for name, values in found.items()}
            for row in range(num_rows or 0)]


def _check_head(given: Incoming, tensor: Input, max_batch_size: int) -> int:
    """The number of rows. Raises :class:`RequestError` for a wrong type or shape."""
    if given.datatype not in tensor.datatypes:
        raise RequestError(f"input '{given.name}' has datatype {given.datatype}; it must be "
                           f"{tensor.datatype}")
    expected = (*((-1,) if max_batch_size else ()), *tensor.dims)
    if len(given.shape) != len(expected) or any(
            size not in (-1, found) for size, found in zip(expected, given.shape, strict=True)):
        raise RequestError(f"unexpected shape for input '{given.name}': expected {list(expected)}, "
                           f"found {list(given.shape)}")
    rows = given.shape[0] if max_batch_size else 1
    if not 1 <= rows <= max(max_batch_size, 1):
        raise RequestError(f"input '{given.name}' has {rows} rows; a batch has 1 to {max(max_batch_size, 1)}")
    return rows


def read_prompt(row: Row, vocabulary: Vocabulary, defaults: Defaults) -> Prompt:
    """One row as what the engine is asked. Raises :class:`RequestError` or ``ConfigError`` for bad values."""
    for name, why in _REFUSED.items():
        if any(row.get(name, ())):
            raise RequestError(f"input '{name}' cannot be honoured: {why}")
    beam_width = _scalar(row, "beam_width", 1)
    if beam_width > 1:
        raise RequestError(f"beam_width is {beam_width}: beam search is not served; leave it out, or ask for "
                           "num_return_sequences")
    is_streamed = _scalar(row, "stream", False)
    return Prompt(
        text=_text(row, "text_input"),
        sampling=_read_sampling(row, vocabulary, defaults),
        is_streamed=is_streamed,
        has_input_in_output=not is_streamed and not _scalar(
            row, "exclude_input_in_output", not defaults.has_input_in_output),
        returns=Returns(
            log_probs=_scalar(row, "return_log_probs", False),
            context_logits=_scalar(row, "return_context_logits", False),
            generation_logits=_scalar(row, "return_generation_logits", False),
            perf_metrics=_scalar(row, "return_perf_metrics", False)))


def _read_sampling(row: Row, vocabulary: Vocabulary, defaults: Defaults) -> SamplingParams:
    n = max(1, _scalar(row, "num_return_sequences", 1))
    if n > defaults.max_n:
        raise RequestError(f"num_return_sequences is {n}; this server gives at most {defaults.max_n}")
    top_k = _scalar(row, "top_k", 0)
    top_p = _scalar(row, "top_p", 0.0)
    fields: dict[str, Any] = {
        "n": n,
        "max_tokens": _scalar(row, "max_tokens", 0),
        "min_tokens": max(0, _scalar(row, "min_tokens", 0)),
        "temperature": _scalar(row, "temperature", 1.0),
        "top_k": top_k,
        "top_p": 1.0 if top_p <= 0 else top_p,
        "repetition_penalty": _scalar(row, "repetition_penalty", 1.0),
        "presence_penalty": _scalar(row, "presence_penalty", 0.0),
        "frequency_penalty": _scalar(row, "frequency_penalty", 0.0),
        "stop": _words(row, "stop_words"),
        "logprobs": 0 if _scalar(row, "return_log_probs", False) else None,
        "return_generation_logits": _scalar(row, "return_generation_logits", False),
        "return_context_logits": _scalar(row, "return_context_logits", False),
        **_ends(row, vocabulary),
    }
    seed = _scalar(row, "seed", None)
    if seed is not None:
        fields["seed"] = seed % 2**63  # the engine's have 63 bits, Triton's 64
    if bad := _words(row, "bad_words"):
        fields["bad"] = bad
    if bias := _read_bias(row, vocabulary):
        fields["logit_bias"] = bias
    if (guide := _read_guide(row)) is not None:
        fields["guided"] = guide
    sampling = SamplingParams(**fields)
    if top_k == 1 or (top_k == 0 and top_p <= 0):
        return msgspec.structs.replace(sampling, temperature=0.0, top_k=0)
    return sampling


def _ends(row: Row, vocabulary: Vocabulary) -> dict[str, Any]:
    """``end_id`` takes the place of the model's own end, and -1 says that there is none."""
    end_id = _scalar(row, "end_id", vocabulary.eos_token_id)
    if end_id == vocabulary.eos_token_id:
        return {}
    return {"ignore_eos": True, "stop_token_ids": () if end_id == -1 else (end_id,)}


def _read_bias(row: Row, vocabulary: Vocabulary) -> dict[int, float]:
    """Token id → what is added to its logit: a word's weight, for each of its tokens."""
    texts = [_decode("embedding_bias_words", item) for item in row.get("embedding_bias_words", ())]
    weights = row.get("embedding_bias_weights", ())
    if len(texts) != len(weights):
        raise RequestError(f"embedding_bias_words has {len(texts)} words and embedding_bias_weights "
                           f"{len(weights)}; there is one weight for each word")
    _check_words("embedding_bias_words", texts)
    bias: dict[int, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        if not math.isfinite(weight):
            raise RequestError(f"embedding_bias_weights has {weight}; weights are numbers")
        for token in vocabulary.encode(text) if text else ():
            bias[token] = bias.get(token, 0.0) + weight
    return bias


def _read_guide(row: Row) -> Guided | None:
    kind = _text(row, "guided_decoding_guide_type")
    guide = _text(row, "guided_decoding_guide")
    if not kind and not guide:
        return None
    if kind == "json":  # any JSON
        return Guided(json="{}")
    if not kind or not guide:
        missing = "guided_decoding_guide_type" if not kind else "guided_decoding_guide"
        raise RequestError(f"input '{missing}' is missing: a guide needs its type, and a type other than "
                           "json its guide")
    if kind == "json_schema":
        return Guided(json=guide)
    if kind == "regex":
        return Guided(regex=guide)
    if kind in ("ebnf_grammar", "grammar"):
        return Guided(grammar=guide)
    if kind == "choice":
        return Guided(choice=_read_choices(guide))
    raise RequestError(f"guided_decoding_guide_type is {kind!r}; known are json, json_schema, regex, "
                       "ebnf_grammar and choice")


def _read_choices(guide: str) -> tuple[str, ...]:
    try:
        choices = json.loads(guide)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(
            isinstance(choice, str) and choice for choice in choices):
        raise RequestError("guided_decoding_guide of type choice is a JSON list of texts, such as "
                           '["yes", "no"]')
    return tuple(choices)


def _words(row: Row, name: str) -> tuple[str, ...]:
    """The texts of a list; clients send an empty one for none."""
    texts = tuple(_decode(name, item) for item in row.get(name, ()) if item)
    _check_words(name, texts)
    return texts


def _check_words(name: str, texts: Sequence[str]) -> None:
    if len(texts) > MAX_WORDS or any(len(text) > MAX_WORD_LENGTH for text in texts):
        raise RequestError(f"{name} has {len(texts)} words; at most {MAX_WORDS} of at most {MAX_WORD_LENGTH} "
                           "characters are taken")


def _scalar(row: Row, name: str, default: Any) -> Any:
    values = row.get(name)
    return values[0] if values else default


def _text(row: Row, name: str) -> str:
    return _decode(name, _scalar(row, name, b""))


def _decode(name: str, item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"input '{name}' is not valid UTF-8: {error.reason} at byte {error.start}") from None
