"""Model directories: damage is reported by file, and a spec needs no torch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from disagg_mpi.errors import ModelError
from disagg_mpi.model import checkpoint, resolve
from disagg_mpi.model.resolve import read_model_spec, resolve_model
from disagg_mpi.model.safetensors_file import SafetensorsWriter, read_header

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def write_model(directory: Path, num_shards: int = 1, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file({"w0": np.ones((4, 8), np.float32)}, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        save_file({f"w{number}": np.ones((4, 8), np.float32)}, directory / name)
        weight_map[f"w{number}"] = name
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def error_of(model: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(model))
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_complete_directory_resolves_to_itself(tmp_path: Path, num_shards: int) -> None:
    model = write_model(tmp_path / "model", num_shards)
    assert resolve_model(str(model)) == model
    assert len(resolve.weight_files(model)) == num_shards


def test_resolving_and_describing_import_nothing_heavy(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    script = (
        "import sys; from disagg_mpi.model.resolve import resolve_model, read_model_spec\n"
        "read_model_spec(resolve_model(sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf', 'mpi4py'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    root = Path(checkpoint.__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(model)], cwd=root, check=True)


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "found notes.txt; needed config.json" in error_of(tmp_path)


def test_no_weights_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    message = error_of(tmp_path)
    assert "found config.json, pytorch_model.bin; needed model.safetensors" in message
    assert "save the model as safetensors" in message


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 3)
    shard = model / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 5)
    assert f"{shard}: truncated: found {size - 5} bytes, needed {size}" in error_of(model)
    with shard.open("r+b") as file:
        file.truncate(20)
    assert "truncated: found 20 bytes" in error_of(model)
    shard.write_bytes(b"")
    assert "truncated: found 0 bytes, needed 8" in error_of(model)


def test_a_file_too_long_is_damaged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "damaged" in error_of(model)


def test_other_contents_are_not_safetensors(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(b"PK\x03\x04 some zip file, long enough")
    assert "not a safetensors file" in error_of(model)
    weights.write_bytes((7).to_bytes(8, "little") + b"no json")
    assert "not a safetensors file" in error_of(model)
    weights.write_text("version https://git-lfs.example/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in error_of(model)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 3)
    (model / "model-00003-of-00003.safetensors").unlink()
    message = error_of(model)
    assert "found 2 of 3 shards" in message
    assert "missing: model-00003-of-00003.safetensors" in message


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 2)
    save_file({"other": np.ones(1, np.float32)}, model / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors: found no tensor w0" in error_of(model)


def test_an_index_cannot_point_outside(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 2)
    index = {"weight_map": {"w0": "../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "needed a file name" in error_of(model)


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    assert "found no such file or directory" in error_of(tmp_path / "missing")
    assert "found no such file or directory" in error_of("./missing")
    assert "found no such file or directory" in error_of("missing.gguf")
    (tmp_path / "file.txt").write_text("x")
    assert "found a file, needed a directory" in error_of(tmp_path / "file.txt")


def test_a_hub_out_of_reach_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = importlib.import_module("huggingface_hub")

    def fail(*args: Any, **keywords: Any) -> str:
        raise ConnectionError("name or service not known\nand ten more lines")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    message = error_of("some/model")
    assert "ConnectionError: name or service not known" in message
    assert "hf download some/model --local-dir DIR, then --model DIR" in message
    assert "ten more" not in message


def test_a_hub_id_resolves_to_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = importlib.import_module("huggingface_hub")
    model = write_model(tmp_path / "snapshot")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(model))
    assert resolve_model("some/model") == model


def test_spec(tmp_path: Path) -> None:
    spec = read_model_spec(write_model(tmp_path / "model", 3))
    assert spec == checkpoint.ModelSpec(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=2,
        hidden_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        vocab_size=32,
        max_position_embeddings=128,
        dtype="float32",
        eos_token_ids=(2,),
        parameter_bytes=3 * 4 * 8 * 4,
    )


def test_spec_prefers_generation_config_and_explicit_sizes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", head_dim=16, num_key_value_heads=None)
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    spec = read_model_spec(model)
    assert (spec.head_dim, spec.num_kv_heads, spec.eos_token_ids) == (16, 4, (7, 8))
    assert read_model_spec(write_model(tmp_path / "b", eos_token_id=None)).eos_token_ids == ()


def test_spec_of_a_nested_config(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    nested = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": CONFIG | {"model_type": "gemma3_text", "num_hidden_layers": 5},
    }
    (model / "config.json").write_text(json.dumps(nested))
    spec = read_model_spec(model)
    assert (spec.architecture, spec.model_type) == ("Gemma3ForConditionalGeneration", "gemma3")
    assert (spec.num_layers, spec.eos_token_ids) == (5, (2,))


@pytest.mark.parametrize(
    "key", ["architectures", "model_type", "num_hidden_layers", "hidden_size", "vocab_size"]
)
def test_spec_names_a_missing_key(tmp_path: Path, key: str) -> None:
    model = write_model(tmp_path / "model", **{key: None})
    with pytest.raises(ModelError, match=f"config.json: found no {key}"):
        read_model_spec(model)


def test_spec_of_broken_json(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text('{"a":')
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        read_model_spec(model)


def test_the_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", torch_dtype="float32")
    arrays = {"big": np.ones(64, np.float16), "small": np.ones(1, np.float32)}
    save_file(arrays, model / "model.safetensors")
    assert read_model_spec(model).dtype == "float16"


def test_the_writer_agrees_with_the_package(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "é": np.ones(5, np.float32)}
    with SafetensorsWriter(path, {name: array.shape for name, array in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    loaded = load_file(path)
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert read_header(path)["a"].shape == (2, 3)
    with (
        pytest.raises(ValueError, match="b was never written"),
        SafetensorsWriter(path, {"b": (1,)}),
    ):
        pass
