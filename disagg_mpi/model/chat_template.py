"""Chat messages -> the prompt text that a model was trained on, by the template it brings along.

This is transformers' ``apply_chat_template(tokenize=False)`` without transformers: importing that
imports torch (2.4 s and hundreds of megabytes) into rank 0, which holds no tensors. The environment
is the same (Jinja's immutable sandbox, the same filters and globals), and a test compares the two.
A template is untrusted code from the model's author: it runs in the sandbox and sees only messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_mpi.errors import ModelError
from disagg_mpi.model.checkpoint import read_json_object

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser

_TOKEN_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class ChatTemplate:
    """The compiled template of one model directory; immutable, to be used from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        config_path = directory / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        source = _find_template(directory, config)
        if source is None:
            raise ModelError(
                f"{directory}: found no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), needed for chat messages; send a plain prompt, or use an "
                "instruction-tuned model"
            )
        self._special_tokens = _special_tokens(directory, config)
        self._template = _compile(source, directory)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt; ``variables`` are the template's own (``tools``, ``enable_thinking``, …)."""
        _check_messages(messages)
        values: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        values.update(variables)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **values
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ModelError(
                f"the chat template of {self._directory.name} does not take these messages: {error}"
            ) from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    needed = 'needed a list such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ModelError(f"malformed messages: found {str(messages)[:80]!r}, {needed}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ModelError(f"malformed message {position}: found {str(message)[:80]!r}, {needed}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ModelError(f"malformed message {position}: found role {role!r}, {needed}")
        # No content is right where an assistant only calls tools.
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise ModelError(f"malformed message {position}: found content {content!r}, {needed}")


def _find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if found is None and (directory / "chat_template.json").is_file():
        found = read_json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several named ones
        found = {item.get("name"): item.get("template") for item in found}.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    map_path = directory / "special_tokens_map.json"
    sources = [read_json_object(map_path) if map_path.is_file() else {}, config]
    tokens: dict[str, str] = {}
    for source in sources:
        for key in (f"{name}_token" for name in _TOKEN_NAMES):
            value = source.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
    return tokens


def _compile(source: str, directory: Path) -> Template:
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ModelError("chat messages need Jinja; type: pip install jinja2") from error

    class Generation(Extension):
        """``{% generation %}`` marks what to train on; here its body is all that counts."""

        tags: set[str] = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"{directory}: its chat template is not valid: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
