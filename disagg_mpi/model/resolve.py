"""What the user typed after --model -> a checked directory with safetensors.

One process resolves (rank 0, or one a host where hosts share no file system) and sends the path to
the others: the model is fetched once, and a mistake is reported once. For a local directory this
costs a few small reads; nothing heavy is imported unless it is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from disagg_mpi.errors import ModelError
from disagg_mpi.model.checkpoint import (
    ModelSpec,
    check_model_directory,
    read_model_spec,
    weight_files,
)
from disagg_mpi.model.fetch import fetch_default_model
from disagg_mpi.model.gguf_convert import ensure_converted

__all__ = ["DEFAULT", "ModelSpec", "read_model_spec", "resolve_model", "weight_files"]

DEFAULT = "default"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
# Weights of other formats and second copies in other layouts live in subfolders or under this name.
_HUB_IGNORE = ["*/*", "consolidated*"]


def resolve_model(model: str | None, progress: bool = True) -> Path:
    """The directory of a model: the default one, a directory, a .gguf file or a hub id."""
    if model is None or model == DEFAULT:
        return fetch_default_model(progress)
    path = Path(model).expanduser()
    if path.is_dir():
        check_model_directory(path)
        return path.absolute()
    if path.is_file():
        if path.suffix == ".gguf":
            return ensure_converted(path.absolute(), progress)
        raise ModelError(
            f"--model {model}: found a file, needed a directory with config.json and safetensors, "
            "or a .gguf file"
        )
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"--model {model}: found no such file or directory; needed a directory with "
            f"config.json and safetensors, a .gguf file, a hub id or '{DEFAULT}'"
        )
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"--model {model}: found no such directory, and a hub id needs huggingface_hub; "
            "type: pip install huggingface_hub, or --model DIR"
        ) from error
    try:
        directory = snapshot_download(
            model, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORE
        )
    except Exception as error:  # its HTTP library's, its own and OSError: too many to list
        reason = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"--model {model}: found no such directory here, and the hub did not give it "
            f"({type(error).__name__}: {reason[0][:200]}); where the hub can be reached, type: "
            f"hf download {model} --local-dir DIR, then --model DIR; or --model {DEFAULT}"
        ) from error
    check_model_directory(Path(directory))
    return Path(directory)
