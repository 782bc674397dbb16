"""A model directory: is it complete, and what kind of model does it hold?

Both answers come from config.json and the safetensors headers alone: milliseconds, no torch, no
transformers. They are asked by rank 0 before any rank loads anything, so that a missing shard is
one clear line and not a traceback a rank. Nothing is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from disagg_mpi.errors import ModelError
from disagg_mpi.model.safetensors_file import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class ModelSpec(msgspec.Struct, frozen=True):
    """What the layout and the memory plan must know of a model; small enough for a message."""

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    """Of the weights in the files (the type that holds the most bytes), in torch's spelling."""
    eos_token_ids: tuple[int, ...]
    """Empty if the model names none: such a model stops only at ``max_tokens``."""
    parameter_bytes: int


def check_model_directory(directory: Path) -> dict[str, TensorInfo]:
    """Raise a :class:`ModelError` unless the directory is complete; return its tensors."""
    if not (directory / "config.json").is_file():
        raise _incomplete(directory, "config.json")
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(directory):
        tensors.update(read_header(path))
    for name, file in _read_index(directory).items():
        if name not in tensors:
            raise ModelError(
                f"{directory / file}: found no tensor {name}, which {INDEX_FILE} says is there; "
                "copy or download the model again"
            )
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would load from the directory, all existing."""
    single = directory / SINGLE_FILE
    if single.is_file():
        return [single]
    if not (directory / INDEX_FILE).is_file():
        raise _incomplete(directory, f"{SINGLE_FILE} (or {INDEX_FILE} and its shards)")
    shards = sorted(set(_read_index(directory).values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ModelError(
            f"{directory}: found {len(shards) - len(missing)} of {len(shards)} shards that "
            f"{INDEX_FILE} names, needed all; missing: {_some(missing)}; "
            "copy or download the model again"
        )
    return [directory / shard for shard in shards]


def read_model_spec(path: Path, *, has_files: bool = True) -> ModelSpec:
    """Describe the model in a directory, which is checked on the way.

    Without ``has_files`` it needs to hold no weights: their type is what config.json says, else bfloat16, and
    their bytes are reckoned from it.
    """
    tensors = check_model_directory(path) if has_files else {}
    config = read_json_object(path / "config.json")
    # Multimodal models keep the language model's numbers in a part of their own.
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    where = f"{path / 'config.json'}" + (" (text_config)" if text is not config else "")

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = text.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            if value is not None:
                raise ModelError(f"{where}: found {key} = {value!r}, needed a positive number")
        if default is not None:
            return default
        raise ModelError(
            f"{where}: found no {keys[0]}, which is needed; to write the model's defaults out, "
            f'type: python -c "from transformers import AutoConfig as C; '
            f"C.from_pretrained('{path}').save_pretrained('{path}')\""
        )

    hidden_size = number("hidden_size")
    num_heads = number("num_attention_heads")
    bytes_by_dtype: dict[str, int] = {}
    for info in tensors.values():
        bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.nbytes
    if has_files and not bytes_by_dtype:
        raise ModelError(f"{path}: found no tensors in its safetensors files")
    if not has_files:
        widths = number("hidden_size") * number("intermediate_size")
        heads = number("head_dim", default=hidden_size // num_heads)
        kv_heads = number("num_key_value_heads", default=num_heads)
        attention = 2 * hidden_size * heads * (num_heads + kv_heads)
        embeddings = number("vocab_size") * hidden_size * (1 if text.get("tie_word_embeddings") else 2)
        name = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
        size = 4 if name == "float32" else 2
        bytes_by_dtype[str(name)] = size * (
            embeddings + number("num_hidden_layers") * (attention + 3 * widths))
    dtype = max(bytes_by_dtype, key=lambda name: bytes_by_dtype[name])
    return ModelSpec(
        architecture=_architecture(path, config),
        model_type=_text(path, config, "model_type"),
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", default=num_heads),
        head_dim=number("head_dim", default=hidden_size // num_heads),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings"),
        dtype=_DTYPES.get(dtype, dtype.lower()),
        eos_token_ids=read_eos_token_ids(path),
        parameter_bytes=sum(bytes_by_dtype.values()),
    )


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else config.json's, else none."""
    sources = [read_json_object(directory / name) for name in ("generation_config.json", "config.json")
               if (directory / name).is_file()]
    nested = sources[-1].get("text_config") if sources else None
    if isinstance(nested, dict):
        sources.append(nested)
    for source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) for token_id in ids):
            raise ModelError(f"{directory}: found eos_token_id = {value!r}, needed ids")
        return tuple(ids)
    return ()


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file whose top is an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # of the JSON or of its UTF-8
        raise ModelError(f"{path}: not JSON: {error}; copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found a JSON {type(value).__name__}, needed an object")
    return value


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name; empty for a model in one file."""
    path = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file() or not path.is_file():
        return {}
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: found no weight_map, which names the shards")
    for name, shard in weight_map.items():
        # A shard lies beside its index; "../" would read anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{path}: found {shard!r} as the file of {name}, needed a file name")
    return weight_map


def _incomplete(directory: Path, needed: str) -> ModelError:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return ModelError(f"cannot read {directory}: {error.strerror or error}")
    message = f"{directory} is not a model: found {_some(names)}; needed {needed}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        message += "; pickled weights are not read: save the model as safetensors"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        message += f"; for the GGUF file, type: --model {directory / ggufs[0]}"
    return ModelError(message)


def _some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _architecture(path: Path, config: dict[str, Any]) -> str:
    value = config.get("architectures")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return value[0]
    raise ModelError(f"{path / 'config.json'}: found no architectures, needed the model's class")


def _text(path: Path, config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    if isinstance(value, str) and value:
        return value
    raise ModelError(f"{path / 'config.json'}: found no {key}, which is needed")
