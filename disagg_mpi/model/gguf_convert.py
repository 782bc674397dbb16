"""A Llama GGUF -> the directory that transformers (and everything else here) reads.

Converting once makes every later load a memory map: transformers' own ``gguf_file=`` takes 24 s for
the default model at every start, and gets its tokenizer wrong. Weights become fp32, the compute
type on CPU; one tensor is in memory at a time.

:func:`convert_gguf` writes into a directory that its caller owns; :func:`ensure_converted` is that
caller for a user's file and keeps the result in the cache for as long as the file does not change.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from disagg_mpi.errors import ModelError
from disagg_mpi.model.cache import (
    build_directory,
    cache_dir,
    check_free_space,
    readable_disk_errors,
)
from disagg_mpi.model.checkpoint import SINGLE_FILE, check_model_directory
from disagg_mpi.model.gguf_file import GgufFile
from disagg_mpi.model.gguf_tokenizer import write_tokenizer
from disagg_mpi.model.safetensors_file import SafetensorsWriter

# Part of the name of every cached conversion: raise it when the output changes.
CONVERTER_VERSION = 1

_HEAD_BYTES = 1 << 20  # holds the metadata and the first strings: enough to tell two files apart

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def ensure_converted(gguf_path: Path, progress: bool = True) -> Path:
    """The converted directory of a GGUF file, converting it if it is new or has changed."""
    try:
        stat = gguf_path.stat()
        with gguf_path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ModelError(f"cannot read {gguf_path}: {error.strerror or error}") from error
    key = hashlib.sha256(f"{CONVERTER_VERSION} {stat.st_size} {stat.st_mtime_ns} ".encode() + head)
    target = cache_dir() / "converted" / f"{gguf_path.stem}-{key.hexdigest()[:16]}"
    build_directory(target, lambda directory: convert_gguf(gguf_path, directory, progress))
    return check_cached(target)


def check_cached(directory: Path) -> Path:
    """Return a directory of the cache after checking that nobody has damaged it since."""
    try:
        check_model_directory(directory)
    except ModelError as error:
        advice = f"it is a cached copy, to make it anew: rm -r {directory}"
        raise ModelError(f"{error}; {advice}") from error
    return directory


def convert_gguf(path: Path, out_dir: Path, progress: bool = True) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into ``out_dir``."""
    with GgufFile(path) as gguf:
        config = _config(gguf)
        names = _tensor_names(gguf, config)
        shapes = {hf_name: gguf.tensors[name].shape for hf_name, name in names.items()}
        needed = 4 * sum(math.prod(shape) for shape in shapes.values()) + 4 * _HEAD_BYTES
        out_dir.mkdir(parents=True, exist_ok=True)
        # Messages name the parent: out_dir may be a temporary directory that is gone by then.
        check_free_space(out_dir.parent, needed)
        with readable_disk_errors(out_dir.parent, needed):
            # The tokenizer first: where it is unsupported, that is known before minutes of work.
            context_length = config["max_position_embeddings"]
            write_tokenizer(gguf.fields, out_dir, path, context_length)
            _write_json(out_dir / "config.json", config)
            _write_json(out_dir / "generation_config.json", _generation_config(gguf, config))
            _write_weights(gguf, names, shapes, config, out_dir / SINGLE_FILE, progress)


def undo_rope_permutation(
    weight: npt.NDArray[np.float32], num_heads: int
) -> npt.NDArray[np.float32]:
    """Rows of Q or K from llama.cpp's order (pairs side by side) to transformers' (halves)."""
    rows, columns = weight.shape
    split = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(
    gguf: GgufFile,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    path: Path,
    progress: bool,
) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar = tqdm(
        names.items(),
        desc=f"converting {gguf.path.name}",
        unit="tensor",
        file=sys.stderr,
        disable=not progress,
        # A bar redraws its line on a terminal; in a log every redraw is a line more.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    with SafetensorsWriter(path, shapes) as writer:
        for hf_name, name in bar:
            array = gguf.load(name)
            if hf_name.endswith("q_proj.weight"):
                array = undo_rope_permutation(array, config["num_attention_heads"])
            elif hf_name.endswith("k_proj.weight"):
                array = undo_rope_permutation(array, config["num_key_value_heads"])
            writer.write(hf_name, array)


def _config(gguf: GgufFile) -> dict[str, Any]:
    fields = gguf.fields
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{gguf.path}: found architecture {architecture!r}, supported is 'llama'; for other "
            "models use their safetensors directory: --model DIR"
        )
    if fields.get("split.count", 1) > 1:
        raise ModelError(
            f"{gguf.path}: found one part of {fields['split.count']}, needed a single file; "
            f"type: llama-gguf-split --merge {gguf.path} MERGED.gguf"
        )
    if fields.get("llama.expert_count", 0):
        raise ModelError(f"{gguf.path}: found a mixture of experts, supported are dense models")

    def number(key: str, default: int | None = None) -> int:
        value = fields.get(f"llama.{key}", default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{gguf.path}: found llama.{key} = {value!r}, needed a number above 0")
        return value

    hidden_size, num_heads = number("embedding_length"), number("attention.head_count")
    num_kv_heads = number("attention.head_count_kv", num_heads)
    head_dim = number("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ModelError(
                f"{gguf.path}: found llama.{key} = {fields[f'llama.{key}']}, supported is the "
                f"head size {head_dim}"
            )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{gguf.path}: found no token_embd.weight, which is needed")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _as_written(fields.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _as_written(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(gguf, head_dim),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": embedding.shape[0],
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": _pad_token_id(fields),
        "torch_dtype": "float32",
    }


def _as_written(value: float) -> float:
    """The shortest decimal of an fp32 number: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _pad_token_id(fields: dict[str, Any]) -> int | None:
    eos: int | None = fields.get("tokenizer.ggml.eos_token_id")
    pad: int | None = fields.get("tokenizer.ggml.padding_token_id", eos)
    return pad


def _generation_config(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    eos = config["eos_token_id"]
    end_of_turn = gguf.fields.get("tokenizer.ggml.eot_token_id")
    # Llama 3 ends a text with one token and a turn with another.
    if end_of_turn is not None and end_of_turn != eos:
        eos = end_of_turn if eos is None else [eos, end_of_turn]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": config["pad_token_id"],
    }


def _rope_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any] | None:
    kind = gguf.fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        factor = gguf.fields.get("llama.rope.scaling.factor", 1.0)
        return {"rope_type": "linear", "factor": _as_written(factor)}
    if kind != "none":
        raise ModelError(
            f"{gguf.path}: found rope scaling {kind!r}, supported are none, linear and Llama 3's"
        )
    if _ROPE_FACTORS not in gguf.tensors:
        return None
    # Llama 3.1 and later: the file holds the factors, config.json the rule that gives them. All
    # these models use one rule but for its largest factor; so guess it, and check the guess.
    found = gguf.load(_ROPE_FACTORS)
    scaling = {
        "rope_type": "llama3",
        "factor": _as_written(found.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = gguf.fields.get("llama.rope.freq_base", 10000.0)
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise ModelError(
            f"{gguf.path}: found rope factors ({_ROPE_FACTORS}) that are not Llama 3's; "
            "use the model's safetensors directory: --model DIR"
        )
    return scaling


def _tensor_names(gguf: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """transformers' name -> the GGUF's, for exactly the tensors that the model has."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    vocabulary = (config["vocab_size"], hidden)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    wanted["model.embed_tokens.weight"] = ("token_embd.weight", vocabulary)
    num_layers = config["num_hidden_layers"]
    if num_layers > len(gguf.tensors):  # a damaged number must not fill the memory with names
        raise ModelError(f"{gguf.path}: found {len(gguf.tensors)} tensors for {num_layers} layers")
    for layer in range(num_layers):
        for part, hf_part in _LAYER.items():
            name = f"blk.{layer}.{part}.weight"
            wanted[f"model.layers.{layer}.{hf_part}.weight"] = (name, shapes[part])
    wanted["model.norm.weight"] = ("output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = ("output.weight", vocabulary)

    for name, shape in wanted.values():
        if name not in gguf.tensors:
            raise ModelError(f"{gguf.path}: found no tensor {name}, which its metadata calls for")
        if gguf.tensors[name].shape != shape:
            raise ModelError(
                f"{gguf.path}: found {name} of shape {gguf.tensors[name].shape}, needed {shape}"
            )
    # A tensor left out would change what the model says, and nothing else would tell.
    known = {name for name, _ in wanted.values()} | {_ROPE_FACTORS}
    if unknown := sorted(gguf.tensors.keys() - known):
        raise ModelError(
            f"{gguf.path}: found {len(unknown)} tensors that a plain Llama does not have "
            f"(the first is {unknown[0]}); use the model's safetensors directory: --model DIR"
        )
    return {hf_name: name for hf_name, (name, _) in wanted.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    present = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(present, indent=2) + "\n", encoding="utf-8")
