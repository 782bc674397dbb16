"""Tokenizers and detokenizers: text in pieces equals text at once, for every cut."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from disagg_mpi.errors import ModelError
from disagg_mpi.model.tokenizer import Detokenizer, Tokenizer

TEXT = "Hi 🙂👩‍👩‍👧 naïve 日本語 ٣ \ufffd \n end"


def byte_level() -> tokenizers.Tokenizer:
    """All bytes, and merges that cut characters in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = {  # UTF-8 bytes in the alphabet's own characters
        text: pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0]
        for text in ("🙂", "日本", " Hi")
    }
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    merges = []
    for cut in ((0, 1, 2), (1, 2, 3), (2, 3, 4)):
        for word in spell.values():
            if len(word) < cut[2]:
                continue
            left, right = word[cut[0] : cut[1]], word[cut[1] : cut[2]]
            merges.append((left, right))
            vocabulary.setdefault(left + right, len(vocabulary))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<plain 日 token>", special=False), AddedToken("ÿé")])
    return backend


def sentencepiece_like(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Words with ▁, and bytes as <0x..> for all else."""
    words = ["<unk>", "▁", *"Hiend", "é", "\ufffd", "▁▁", "▁n", "▁H", "▁Hi", "▁日"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    merges = [("▁", "▁"), ("▁", "n"), ("▁", "H"), ("▁H", "i")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


def llama2_decoder() -> decoders.Decoder:
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*stages, decoders.Strip(" ", 1, 0)])


def gemma_decoder() -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


KINDS = {
    "byte-level": byte_level,
    "llama2": lambda: sentencepiece_like(llama2_decoder()),
    "gemma": lambda: sentencepiece_like(gemma_decoder()),
    "metaspace": lambda: sentencepiece_like(decoders.Metaspace()),
}


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        KINDS[kind]().save(f"{folder}/tokenizer.json")
        return Tokenizer(Path(folder))


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, also such that no text gives (broken UTF-8, specials anywhere, unknown ids)."""
    size = tokenizer(kind).vocab_size
    # Words, special and unknown ids are at the end: draw them as often as the bytes before them.
    one = st.integers(0, size + 2) | st.integers(size - 16, size + 2)
    anything = st.lists(one, max_size=40)
    from_text = st.text(max_size=20).map(tokenizer(kind).encode)
    emoji = st.lists(st.sampled_from([*TEXT]), max_size=12).map("".join).map(tokenizer(kind).encode)
    return st.lists(anything | from_text | emoji, max_size=4).map(lambda parts: [*chain(*parts)])


def pieces(detokenizer: Detokenizer, ids: list[int], chunk: int) -> str:
    return "".join(detokenizer.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 7), skip=st.booleans())
def test_pieces_equal_the_whole(kind: str, data: st.DataObject, chunk: int, skip: bool) -> None:
    model = tokenizer(kind)
    ids = data.draw(ids_of(kind))
    whole = model.decode(ids, skip)
    detokenizer = Detokenizer(model, skip)
    text = pieces(detokenizer, ids, chunk)
    assert whole.startswith(text)
    assert text + detokenizer.flush() == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_second_process_continues_at_every_cut(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    model = tokenizer(kind)
    ids = data.draw(ids_of(kind))
    whole = model.decode(ids, skip)
    for cut in range(len(ids) + 1):
        first = Detokenizer(model, skip).push(ids[:cut])
        second = Detokenizer.resume(model, ids[:cut], skip)
        assert first + pieces(second, ids[cut:], 1) + second.flush() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_as_soon_as_it_is_final(kind: str) -> None:
    model = tokenizer(kind)
    detokenizer = Detokenizer(model)
    ids = model.encode("Hi Hi Hi Hi")
    pushed = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pushed) == model.decode(ids)
    assert all(pushed[1:])
    assert detokenizer.flush() == ""


def test_a_split_character_is_held_back() -> None:
    model = tokenizer("byte-level")
    detokenizer = Detokenizer(model)
    ids = model.encode("🙂")
    assert len(ids) > 1
    assert [detokenizer.push([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["🙂"]
    unfinished = Detokenizer(model)
    assert unfinished.push(ids[:-1]) == ""
    assert unfinished.flush() == "\ufffd"
    assert unfinished.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_stays_small(kind: str) -> None:
    model = tokenizer(kind)
    detokenizer = Detokenizer(model)
    for token_id in model.encode("Hi end " * 500):
        detokenizer.push([token_id])
        assert len(getattr(detokenizer._pieces, "_ids", [])) < 10


def test_truncation_and_padding_of_the_training_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    model = Tokenizer(tmp_path)
    assert model.decode(model.encode(TEXT)) == TEXT


def test_eos_from_the_tokenizer_where_the_model_names_none(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).eos_token_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    model = Tokenizer(tmp_path)
    assert model.eos_token_id == model.encode("</s>")[0]
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer(tmp_path).eos_token_id == 5


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path)


def with_template(tmp_path: Path, template: str) -> Tokenizer:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": template, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_chat_template_sees_what_transformers_gives_it(tmp_path: Path) -> None:
    model = with_template(
        tmp_path,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}A{{ tools is none }}{{ mood }}{% endif %}",
    )
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "<é>"}]
    ids = model.apply_chat_template(messages, variables={"mood": "!"})
    expected = '<s>{"role": "user", "content": "<é>"}ATrue!'
    assert model.decode(ids, skip_special_tokens=False).replace("\n", "") == expected
    assert ids[0] == model.encode("<s>")[0]


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    model = with_template(tmp_path, "old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert model.decode(model.apply_chat_template([{"role": "user", "content": ""}])) == "new"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        ["Hello"],
        [{"content": "Hello"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
    ],
)
def test_malformed_messages(tmp_path: Path, messages: object) -> None:
    model = with_template(tmp_path, "{{ messages }}")
    with pytest.raises(ModelError, match=r"malformed message.*needed a list such as"):
        model.apply_chat_template(messages)  # type: ignore[arg-type]


def test_a_template_that_refuses(tmp_path: Path) -> None:
    model = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ModelError, match="roles must alternate"):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    model = with_template(tmp_path, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(ModelError, match="does not take these messages"):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_no_chat_template(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="found no chat template"):
        Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])
