"""Text <-> ids for one model, from its tokenizer.json, without torch.

A :class:`Tokenizer` is immutable after it is made and may be used from several threads; one a
process is enough. The incremental way back to text is :class:`Detokenizer`, one an output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_mpi.errors import ModelError
from disagg_mpi.model.chat_template import ChatTemplate
from disagg_mpi.model.checkpoint import read_eos_token_ids, read_json_object
from disagg_mpi.model.detokenizer import Detokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        file = directory / "tokenizer.json"
        backend = _read_file(file) if file.is_file() else _convert_with_transformers(directory)
        # Some files carry the settings of their training (cut at 512, pad to 512).
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_tables = (_ByteTable(self, False), _ByteTable(self, True))
        decoder = backend.decoder
        stages = list(_stages(json.loads(decoder.__getstate__()))) if decoder is not None else []
        self.is_byte_level = stages == ["ByteLevel"]
        self.may_split_characters = "ByteLevel" in stages and not self.is_byte_level
        self._has_byte_tokens = "ByteFallback" in stages

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the model's own BOS or the like unless told otherwise."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; ids that are not in the vocabulary are left out."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat; ``variables`` go to the template (``tools``, ``enable_thinking``)."""
        text = self._chat_template.render(messages, add_generation_prompt, variables or {})
        return self.encode(text, add_special_tokens=False)  # the template writes BOS itself

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id, or None where it has no such id."""
        return self._backend.id_to_token(token_id)

    @property
    def definition(self) -> str:
        """The text of its ``tokenizer.json``, without truncation and padding: for libraries of their own."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """The number of known ids, added tokens included; the model's matrix may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The first id that ends a text (``ModelSpec.eos_token_ids`` has them all)."""
        if ids := read_eos_token_ids(self._directory):
            return ids[0]
        config_path = self._directory / "tokenizer_config.json"
        token = read_json_object(config_path).get("eos_token") if config_path.is_file() else None
        text = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(text) if isinstance(text, str) else None

    # The rest is what a Detokenizer asks (detokenizer.Decoder).

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """The token leaves no trace in the text."""
        if token_id in self._special_ids:
            return skip_special_tokens
        return self.token(token_id) is None

    def is_byte_token(self, token_id: int) -> bool:
        """The token spells one byte, as ``<0xE2>``."""
        if not self._has_byte_tokens:
            return False
        token = self.token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def byte_table(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """Id -> the bytes it adds to the text of a byte-level vocabulary."""
        return self._byte_tables[skip_special_tokens]

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._directory)


class _ByteTable(dict[int, bytes]):
    """Filled as ids are met: all 49,152 at once would cost every start 0.1 s."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or self._tokenizer.is_silent(token_id, self._skip):
            found = b""
        else:
            try:
                found = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token, written as plain text
                found = token.encode()
        self[token_id] = found
        return found


def _read_file(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ModelError(f"{path}: cannot be read ({error}); copy or download it again") from error


def _convert_with_transformers(directory: Path) -> tokenizers.Tokenizer:
    """For models with only a tokenizer.model, vocab.txt or the like: slow, and imports torch."""
    from tokenizers import Tokenizer as Backend

    advice = "needed tokenizer.json: copy it from the model's source"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{directory}: found no tokenizer.json; {advice}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever its many converters raise
        raise ModelError(f"{directory}: found no tokenizer ({error}); {advice}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(
            f"{directory}: found a {type(tokenizer).__name__}, which has no fast form; {advice}"
        )
    return backend


def _stages(state: Mapping[str, Any]) -> Iterator[str]:
    """The names of a decoder's stages, flattened."""
    if state["type"] == "Sequence":
        for stage in state["decoders"]:
            yield from _stages(stage)
    else:
        yield state["type"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own character, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + position): byte for position, byte in enumerate(others)}
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
