"""Greedy tokens of tiny random models: the engine, chunked and batched, against transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import VOCABULARY, Job, executor_request, save_tiny_model, tokens_of

from disagg_mpi.engine.weights import load_model
from disagg_mpi.errors import ModelError
from disagg_mpi.topology import Role

PROMPTS = [[5, 9, 100, 3], list(range(3, 40)), [7], [1, 2, 3] * 6]
NEW_TOKENS = 24

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-bias": ("Llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "yarn-rope": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6,
                                "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "mistral-sliding": ("Mistral", {"sliding_window": 5}),
    "gemma": ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
}


def reference(path: Path) -> list[tuple[list[int], list[float]]]:
    """transformers' tokens for each prompt, and by how much each was the best."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        tops = [row[0].float().topk(2).values for row in out.logits]
        found.append((out.sequences[0, len(prompt) :].tolist(),
                      [float(top[0] - top[1]) for top in tops]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_transformers_own(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    path = save_tiny_model(tmp_path / name, kind, **changes)
    expected = reference(path)
    assert len({token for tokens, _ in expected for token in tokens}) > 10, "no trivial model"
    job = Job(path, (Role.CONTEXT, Role.GENERATION), shared=True, num_blocks=80, max_num_tokens=11)
    found = job.run([executor_request(i, prompt, max_tokens=NEW_TOKENS)
                     for i, prompt in enumerate(PROMPTS)])
    for i, (tokens, gaps) in enumerate(expected):
        mine = tokens_of(found[i])
        for position, (a, b) in enumerate(zip(mine, tokens, strict=True)):
            if a != b:
                print(f"{name}, prompt {i}, token {position}: {a} for {b}, gap {gaps[position]:.2e}")
                assert gaps[position] < 1e-3, (mine, tokens)
                break  # what follows was computed from another token
    assert job.problems() == []
    job.close()


def test_a_type_of_model_that_attention_cannot_serve_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "gemma2", "Gemma2", attn_logit_softcapping=30.0)
    with pytest.raises(ModelError, match="softcapped attention logits"):
        load_model(path, "fp32")


@pytest.mark.parametrize(("kind", "rope"), [
    ("Llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    ("Phi3", {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
              "long_factor": [2.0] * 4, "original_max_position_embeddings": 4096})])
def test_positions_that_depend_on_the_batch_are_refused(
        tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    path = save_tiny_model(tmp_path / "m", kind, rope_parameters=rope)
    with pytest.raises(ModelError, match=f"{rope['rope_type']} rotary positions"):
        load_model(path, "fp32")


def test_weights_of_another_type_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"torch\.float32, torch\.bfloat16 is needed"):
        load_model(tiny_llama, "bf16")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="does not know this architecture"):
        load_model(tmp_path, "fp32")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny_model(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack 1 tensors .*model\.norm\.weight"):
        load_model(path, "fp32")
    save_file({**load_file(path / "model.safetensors"), "extra.weight": torch.zeros(1)},
              path / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not have: extra\.weight"):
        load_model(path, "fp32")


def test_the_vocabulary_is_the_fixtures(tiny_llama: Path) -> None:
    assert load_model(tiny_llama, "fp32").module.config.vocab_size == VOCABULARY


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny_model(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"found model\.norm\.weight with shape \(31,\), .* needs \(32,\)"):
        load_model(path, "fp32")


def test_weights_are_the_files_own_pages(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "m")
    module = load_model(path, "fp32").module
    owners = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert len(owners) == 1
    assert not any(p.requires_grad for p in module.parameters())


def test_weights_at_odd_places_of_a_file_are_read(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "m")
    module = load_model(path, "fp32").module
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    file = path / "model.safetensors"
    raw = file.read_bytes()  # whose bytes the module maps, and sees change
    length = int.from_bytes(raw[:8], "little")
    pad = 1 + -length % 4  # the tensors begin one byte after a multiple of four
    file.write_bytes(
        (length + pad).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * pad + raw[8 + length :])
    found = load_model(path, "fp32").module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
