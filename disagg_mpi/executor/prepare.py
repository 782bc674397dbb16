"""What an executor makes of a request for its engine: a sequence, with all that its tokens must meet.

Here texts become token ids and grammars matchers: at the leader, where the tokenizer is, so that rank 0 stays
O(1) a request and a token id means the same to all that look at it. One :class:`Preparer` an executor, made
with it and used by its thread; it keeps no request.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from disagg_mpi.engine.guided import GrammarCompiler
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.errors import RequestError
from disagg_mpi.request import ExecutorRequest


class Preparer:
    """Makes sequences of requests that can be served."""

    def __init__(
        self,
        vocab_size: int,
        encode: Callable[[str], list[int]] | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """``encode``: text → ids, without BOS and the like; both ``None`` for a model without a tokenizer."""
        self._vocab_size = vocab_size
        self._encode = encode
        self._grammars = grammars

    def prepare(self, request: ExecutorRequest) -> Sequence:
        """Raises :class:`RequestError` with what is wrong with the request, for its user."""
        params = request.sampling
        guide = None
        if params.guided is not None:
            if self._grammars is None:
                raise RequestError("guided output needs a tokenizer, and this model has none")
            guide = self._grammars.matcher(params.guided)
        bad = [ids for text in params.bad for ids in self.spellings(text)]
        if params.temperature and params.seed is None:
            request = msgspec.structs.replace(
                request, sampling=msgspec.structs.replace(params, seed=random.getrandbits(62)))
        return Sequence(request, bad, guide)

    def spellings(self, text: str) -> list[list[int]]:
        """The token ids of a text, as the first word of an output and as a later one."""
        if self._encode is None:
            raise RequestError("bad texts need a tokenizer, and this model has none; give bad_token_ids")
        text = text.removeprefix(" ")
        spellings = [self._encode(spelling) for spelling in (text, f" {text}") if spelling]
        # A tokenizer may know tokens that the model cannot make.
        return [ids for at, ids in enumerate(spellings)
                if ids and max(ids) < self._vocab_size and ids not in spellings[:at]]
