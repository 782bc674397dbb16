"""The tokenizer inside a GGUF -> tokenizer.json and tokenizer_config.json.

A GGUF holds vocabulary and merges, but only the *name* of its pre-tokenizer
(``tokenizer.ggml.pre``), which stands for code inside llama.cpp. So each supported name has its
equal here, and an unknown name is an error: a near miss gives a model that is a little worse, and
nobody sees why.

For the default model ("smollm") this gives llama.cpp's ids on 169 of 169 texts; transformers' own
GGUF import misses 12 of them (non-ASCII digits, whitespace before digits).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_mpi.errors import ModelError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's llama_token_type

# The split of Llama 3, as its authors publish it.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> PreTokenizer:
    from tokenizers import pre_tokenizers as pre

    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    from tokenizers import pre_tokenizers as pre

    # Each digit (of any script) stands alone, and keeps no space; only then GPT-2's split.
    return pre.Sequence([pre.Digits(individual_digits=True), _gpt2()])


def _llama3() -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    split = pre.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
}


def write_tokenizer(
    fields: Mapping[str, Any], out_dir: Path, source: Path, context_length: int
) -> None:
    """Write both tokenizer files; ``fields`` is the metadata of the GGUF ``source``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(
            f"{source}: found a tokenizer of type {kind!r}, supported is 'gpt2' (byte-level BPE); "
            "use the model's safetensors directory: --model DIR"
        )
    pre_name = fields.get("tokenizer.ggml.pre", "default")
    if pre_name not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{source}: found pre-tokenizer {pre_name!r}, supported are "
            f"{', '.join(_PRE_TOKENIZERS)}; use the model's safetensors directory: --model DIR"
        )
    try:
        tokens: list[str] = fields["tokenizer.ggml.tokens"]
        merges: list[str] = fields["tokenizer.ggml.merges"]
    except KeyError as error:
        raise ModelError(f"{source}: found no {error.args[0]}, needed for its tokenizer") from error
    kinds: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ModelError(f"{source}: found {len(kinds)} token types for {len(tokens)} tokens")

    pairs: list[tuple[str, str]] = []
    for merge in merges:
        # As llama.cpp cuts it: byte-level tokens contain no space, but a merge may start with one.
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ModelError(f"{source}: found the merge {merge!r}, needed two parts")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    llama3 = pre_name == "llama-bpe"
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=llama3)
    except Exception as error:  # the package raises bare Exception
        raise ModelError(f"{source}: its vocabulary and merges do not fit: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre_name]()
    tokenizer.decoder = decoders.ByteLevel()

    def added(wanted: int, special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted
        ]

    tokenizer.add_special_tokens(added(_CONTROL, special=True))
    tokenizer.add_tokens(added(_USER_DEFINED, special=False))

    def named(key: str) -> str | None:
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if token_id is None or token_id >= len(tokens) else tokens[token_id]

    bos = named("bos")
    # llama.cpp's default for BPE is no BOS, but for Llama 3.
    if fields.get("tokenizer.ggml.add_bos_token", llama3) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, vocabulary[bos])],
        )
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)

    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; Llama's own would rebuild it in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "bos_token": bos,
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding") or named("eos"),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2)
    (out_dir / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
