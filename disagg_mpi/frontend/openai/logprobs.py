"""Log-probabilities in the two forms that the API has, and how a single token is spelt. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_mpi.frontend.openai.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from disagg_mpi.model.tokenizer import Tokenizer
from disagg_mpi.request import TokenLogprobs


class Spelling:
    """The text and the bytes of single tokens; immutable, one a server."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token_id: int) -> bytes:
        if self._tokenizer.is_byte_level:
            return self._tokenizer.byte_table(False)[token_id]
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def text_of(self, token_id: int) -> str:
        """A token that is a part of a character is written as OpenAI does, ``bytes:\\xe2\\x82``."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def for_chat(
        self, token_ids: Sequence[int], found: Sequence[TokenLogprobs], num_top: int
    ) -> ChatLogprobs:
        return ChatLogprobs([
            ChatTokenLogprob(
                self.text_of(token_id), logprobs.logprob, list(self.bytes_of(token_id)),
                [TopLogprob(self.text_of(other), value, list(self.bytes_of(other)))
                 for other, value in logprobs.top[:num_top]])
            for token_id, logprobs in zip(token_ids, found, strict=False)])

    def for_completion(
        self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None], offset: int = 0
    ) -> CompletionLogprobs:
        """``offset``: characters of the choice's text before the first of these tokens."""
        reply = CompletionLogprobs([], [], [], [])
        for token_id, logprobs in zip(token_ids, found, strict=False):
            text = self.text_of(token_id)
            reply.tokens.append(text)
            reply.text_offset.append(offset)
            offset += len(text)
            if logprobs is None:
                reply.token_logprobs.append(None)
                reply.top_logprobs.append(None)
                continue
            reply.token_logprobs.append(logprobs.logprob)
            # The chosen one is always there, whether or not it is among the likeliest.
            top = {self.text_of(other): value for other, value in logprobs.top}
            reply.top_logprobs.append({text: logprobs.logprob} | top)
        return reply


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Lists of consecutive tokens as one."""
    return CompletionLogprobs(
        [token for part in parts for token in part.tokens],
        [value for part in parts for value in part.token_logprobs],
        [top for part in parts for top in part.top_logprobs],
        [offset for part in parts for offset in part.text_offset])
