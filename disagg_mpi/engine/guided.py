"""What a guided output must be (a JSON schema, expression, choice or grammar), as masks over the vocabulary.

A :class:`GrammarCompiler` is made with the leader's executor and owned by it; the grammar library is imported
and the vocabulary read with the first guided request. It compiles each distinct grammar once and keeps the
last few. A :class:`Matcher` belongs to one sequence from enqueue to its end. Its state is a function of the
output tokens alone: a generation instance restores it by replaying the first tokens, and a preempted sequence
keeps its own.

The library is llguidance (MIT). It has no dependencies, takes a ``tokenizers`` tokenizer as its JSON text,
and compiles a schema of a few properties in a millisecond. XGrammar (Apache 2.0) needs torch, transformers,
pydantic and a compiler's runtime to be installed, and takes the tokenizer from transformers. With the default
model's 49,152 tokens a mask takes 0.01 to 0.1 ms, 1 ms right after a schema is compiled; the vocabulary is
read in 0.3 s, once.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from disagg_mpi.errors import RequestError
from disagg_mpi.request import Guided

if TYPE_CHECKING:
    import llguidance

# Where JSON may have whitespace: without a bound small models go on with it to their last token.
_JSON_WHITESPACE = r"[ \n]?"

_MAX_COMPILED = 32


class Vocabulary(Protocol):
    """What is needed of :class:`disagg_mpi.model.tokenizer.Tokenizer`."""

    @property
    def definition(self) -> str:
        """The text of its ``tokenizer.json``."""


class GrammarCompiler:
    """The grammars of one model. Used by one thread."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        """``vocab_size``: the length of a row of logits, which need not be the tokenizer's."""
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()

    def matcher(self, guided: Guided) -> Matcher:
        """One at the start of ``guided``; :class:`RequestError` if that is no grammar."""
        key = msgspec.msgpack.encode(guided)
        compiled = self._compiled.pop(key, None) or self._compile(guided)
        self._compiled[key] = compiled
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, guided: Guided) -> llguidance.LLMatcher:
        try:
            import llguidance
        except ImportError:
            raise RequestError("guided output needs llguidance, which is not installed on this rank; "
                               "pip install 'disagg_mpi[guided]' and start the job again") from None
        if not self._eos:
            raise RequestError("guided output needs a model with an end-of-sequence token; "
                               "this one names none")
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.LLTokenizer(self._vocabulary.definition, eos_token=self._eos)
            except ValueError as error:
                raise RequestError(f"guided output cannot use this model's tokenizer: {error}") from None
        try:
            grammar = _grammar_of(guided)
        except ValueError as error:  # not even its outer form is right
            raise RequestError(f"guided is no valid grammar: {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0,
                                       limits=llguidance.LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise RequestError(f"guided is no valid grammar: {_message(matcher)}")
        return matcher


class Matcher:
    """How far one output is in its grammar."""

    def __init__(self, state: llguidance.LLMatcher, vocab_size: int) -> None:
        self._state = state
        self._vocab_size = vocab_size

    def advance(self, token_ids: Seq[int]) -> None:
        """These are the output's next tokens; one that the grammar does not allow is an :attr:`error`."""
        self._state.consume_tokens(list(token_ids))

    @property
    def error(self) -> str:
        """Why the output cannot go on, in the library's words; empty while it can."""
        return _message(self._state)

    @property
    def is_over(self) -> bool:
        """Whether the grammar is complete and nothing can follow."""
        return self._state.is_stopped() and not self._state.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may be next, ends of sequence where it may end: ``[vocab_size]``."""
        bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(known)] = known
        return allowed


def _message(state: llguidance.LLMatcher) -> str:
    return state.get_error().strip().removesuffix("<non-verbose/>").strip()


def _grammar_of(guided: Guided) -> str:
    """In the library's form. ``ValueError`` for what is not JSON, or not a grammar that can be converted."""
    from llguidance import LLMatcher, grammar_from

    if guided.json is not None:
        return LLMatcher.grammar_from_json_schema(
            guided.json, defaults={"whitespace_pattern": _JSON_WHITESPACE})
    if guided.regex is not None:
        return LLMatcher.grammar_from_regex(guided.regex)
    if guided.choice is not None:
        texts = " | ".join(map(json.dumps, guided.choice))  # Lark writes texts as JSON does
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    assert guided.grammar is not None  # one of them is given
    return grammar_from("grammar", guided.grammar)

