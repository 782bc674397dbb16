"""The real default model, through the real fetch (once per cache; then it costs nothing)."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest

from disagg_mpi.model.fetch import fetch_default_model
from disagg_mpi.model.resolve import read_model_spec, resolve_model
from disagg_mpi.model.tokenizer import Detokenizer, Tokenizer

pytestmark = pytest.mark.model

TEXTS = [
    "Machine learning is",
    "a １２３ ٣٤ x  12 3\n\n 1",
    "naïve 🙂👩‍👩‍👧 日本語, don't  stop\t\tme ½ ²",
    "<|im_start|>user\nHi<|im_end|> <repo_name>",
    "",
]


@pytest.fixture(scope="session")
def default_model() -> Path:
    return fetch_default_model(progress=False)


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    return Tokenizer(default_model)


def test_the_second_call_returns_at_once(default_model: Path) -> None:
    started = time.monotonic()
    assert resolve_model(None) == resolve_model("default") == default_model
    assert time.monotonic() - started < 1.0
    assert [path.name for path in default_model.parent.iterdir()] == [default_model.name]


def test_spec(default_model: Path) -> None:
    spec = read_model_spec(default_model)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.hidden_size, spec.vocab_size, spec.max_position_embeddings) == (576, 49152, 8192)
    assert (spec.dtype, spec.eos_token_ids) == ("float32", (2,))
    assert spec.parameter_bytes == 134_515_008 * 4


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == text


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Machine learning is") == [29968, 1380, 314]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (49152, 2)


def test_transformers_agrees_on_text_and_chat(default_model: Path, tokenizer: Tokenizer) -> None:
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(default_model)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    messages = [
        {"role": "user", "content": "Hi ☃ <b>"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "y"},
    ]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_transformers_loads_it_and_it_speaks(default_model: Path, tokenizer: Tokenizer) -> None:
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(default_model)
    assert model.dtype == torch.float32
    ids = torch.tensor([tokenizer.encode("Machine learning is")])
    output = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :].tolist()).startswith(" a process of")
