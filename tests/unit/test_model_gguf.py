"""GGUF files: a tiny one goes through the converter and comes back bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from disagg_mpi.errors import ModelError
from disagg_mpi.model.gguf_convert import convert_gguf, ensure_converted, undo_rope_permutation
from disagg_mpi.model.resolve import read_model_spec, resolve_model
from disagg_mpi.model.tokenizer import Tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
CONTROL = ["<|end|>", "<|start|>", "<|pad|>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"

Arrays = dict[str, npt.NDArray[np.float32]]


def byte_characters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = CONTROL + byte_characters() + ["Ġa", "Ġb", "ab"]
MERGES = ["Ġ a", "Ġ b", "a b"]


def permute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """What llama.cpp's converter does to Q and K."""
    rows, columns = weight.shape
    split = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def weights(tied: bool = True) -> Arrays:
    """Named and laid out as transformers does."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    arrays = {"model.embed_tokens.weight": matrix(len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        arrays[prefix + "input_layernorm.weight"] = matrix(HIDDEN)
        arrays[prefix + "self_attn.q_proj.weight"] = matrix(HIDDEN, HIDDEN)
        arrays[prefix + "self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        arrays[prefix + "self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        arrays[prefix + "self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN)
        arrays[prefix + "post_attention_layernorm.weight"] = matrix(HIDDEN)
        arrays[prefix + "mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
        arrays[prefix + "mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        arrays[prefix + "mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
    arrays["model.norm.weight"] = matrix(HIDDEN)
    if not tied:
        arrays["lm_head.weight"] = matrix(len(TOKENS), HIDDEN)
    return arrays


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    arrays: Arrays,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    quantised: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for hf_name, array in arrays.items():
        name = hf_name
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "attn_q" in name:
            array = permute(array, HEADS)
        elif "attn_k" in name:
            array = permute(array, KV_HEADS)
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(path: Path, out_dir: Path) -> Path:
    convert_gguf(path, out_dir, progress=False)
    return out_dir


def error_of(path: Path, tmp_path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        convert(path, tmp_path / "out")
    return str(caught.value)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_permutation_is_undone(num_heads: int) -> None:
    weight = np.arange(num_heads * 8 * 5, dtype=np.float32).reshape(num_heads * 8, 5)
    assert np.array_equal(undo_rope_permutation(permute(weight, num_heads), num_heads), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    arrays = weights(tied)
    out = convert(write_gguf(tmp_path / "m.gguf", arrays), tmp_path / "out")
    loaded = load_file(out / "model.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name], array), name
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 50000.0)
    spec = read_model_spec(out)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads) == (LAYERS, HEADS, KV_HEADS)
    assert (spec.head_dim, spec.vocab_size, spec.eos_token_ids) == (HEAD_DIM, len(TOKENS), (0,))
    assert spec.dtype == "float32"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_stored_types_are_dequantised(tmp_path: Path, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    arrays = weights()
    path = write_gguf(tmp_path / "m.gguf", arrays, quantised=quantised)
    loaded = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    stored = gguf.quantize(permute(arrays[name], KV_HEADS), quantised)
    expected = undo_rope_permutation(gguf.dequantize(stored, quantised), KV_HEADS)
    assert np.array_equal(loaded[name], expected)


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    out = convert(write_gguf(tmp_path / "m.gguf", weights()), tmp_path / "out")
    tokenizer = Tokenizer(out)
    text = " ab a12 ٣\n\n 4 naïve 🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == TOKENS.index("Ġa")  # no automatic BOS; merges apply
    assert tokenizer.encode("<|start|>") == [1]
    assert tokenizer.decode([1, *ids, 0]) == text
    assert tokenizer.eos_token_id == 0
    assert tokenizer.vocab_size == len(TOKENS)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    assert chat == [1, TOKENS.index("ab"), 0]


def test_llama3_adds_its_bos(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights(), pre="llama-bpe")
    tokenizer = Tokenizer(convert(path, tmp_path / "out"))
    assert tokenizer.encode("ab") == [1, TOKENS.index("ab")]
    assert tokenizer.encode("ab", add_special_tokens=False) == [TOKENS.index("ab")]


def test_llama3_rope_factors_become_its_rule(tmp_path: Path) -> None:
    wavelength = 2 * np.pi * 50000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    extra = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", weights(), extra=extra)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == pytest.approx(32.0)
    other = {"rope_freqs.weight": np.linspace(1, 9, HEAD_DIM // 2, dtype=np.float32)}
    path = write_gguf(tmp_path / "other.gguf", weights(), extra=other)
    assert "rope factors" in error_of(path, tmp_path)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    def message(name: str, **options: Any) -> str:
        return error_of(write_gguf(tmp_path / name, weights(), **options), tmp_path)

    assert "architecture 'qwen2', supported is 'llama'" in message("a", architecture="qwen2")
    assert "tokenizer of type 'llama', supported is 'gpt2'" in message("b", tokenizer="llama")
    assert "pre-tokenizer 'qwen2', supported are smollm" in message("c", pre="qwen2")
    bias = {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
    assert "blk.0.attn_q.bias" in message("d", extra=bias)
    yarn = {"llama.rope.scaling.type": "yarn"}
    assert "rope scaling 'yarn'" in message("e", metadata=yarn)
    assert "mixture of experts" in message("f", metadata={"llama.expert_count": 8})
    assert "one part of 3" in message("g", metadata={"split.count": 3})


def test_a_storage_type_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: object, kind: gguf.GGMLQuantizationType) -> None:
        raise NotImplementedError

    path = write_gguf(tmp_path / "m.gguf", weights())
    monkeypatch.setattr("gguf.quants.dequantize", refuse)
    assert "tensor token_embd.weight is stored as F32, which cannot" in error_of(path, tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    arrays = weights()
    del arrays["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "a.gguf", arrays)
    assert "no tensor blk.1.ffn_up.weight" in error_of(path, tmp_path)
    arrays = weights()
    arrays["model.norm.weight"] = np.ones(HIDDEN + 1, np.float32)
    path = write_gguf(tmp_path / "b.gguf", arrays)
    assert "needed (64,)" in error_of(path, tmp_path)


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    assert "not a GGUF file: found b'PK\\x03\\x04'" in error_of(path, tmp_path)
    path.write_bytes(b"")
    assert "not a GGUF file: found b'' at its start (0 bytes" in error_of(path, tmp_path)


def test_truncated_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", weights()).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 7, 8, 20, 100, 1000, 5000, len(whole) // 2]:
        path.write_bytes(whole[:size])
        assert f"found {size} bytes, needed" in error_of(path, tmp_path)
    size = len(whole) // 2
    path.write_bytes(whole[:size])
    assert f"truncated: found {size} bytes, needed {len(whole)}" in error_of(path, tmp_path)


def test_damaged_bytes_never_crash_otherwise(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "whole.gguf", weights()).read_bytes())
    random = np.random.default_rng(1)
    path = tmp_path / "damaged.gguf"
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[random.integers(4, 600)] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(ModelError):
            convert(path, tmp_path / "out")


def test_conversions_are_cached_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", weights())
    first = resolve_model(str(path), progress=False)
    assert first.parent == tmp_path / "cache" / "converted"
    assert first.name.startswith("tiny-")
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure_converted(path, progress=False) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    os.utime(path, ns=(0, 0))
    assert ensure_converted(path, progress=False) != first


def test_a_damaged_cache_says_how_to_make_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", weights())
    made = ensure_converted(path, progress=False)
    (made / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"rm -r {made}"):
        ensure_converted(path, progress=False)


def test_a_small_disk_is_reported_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", weights())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    message = error_of(path, tmp_path)
    assert "found 1.0 kB free, this needs" in message and "DISAGG_MPI_CACHE" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_goes_to_stderr_only_when_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", weights())
    convert_gguf(path, tmp_path / "a", progress=False)
    assert capsys.readouterr() == ("", "")
    convert_gguf(path, tmp_path / "b", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "converting tiny.gguf" in err
