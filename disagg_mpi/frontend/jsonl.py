"""Files of prompts and of results, one JSON object a line. Pure but for reading and writing the files.

An input line is ``{"id", "prompt" | "prompt_token_ids" | "messages", …}`` with sampling fields and a
``deadline`` of its own; an output line ``{"id", "text", "token_ids", "finish_reason", "usage", "timing"}``
or ``{"id", "error"}``. A line that is no request gives an error result with its number, never silence.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec

from disagg_mpi.config import convert
from disagg_mpi.errors import ConfigError, InputError
from disagg_mpi.request import Request, Result, SamplingParams

_REQUEST_KEYS = ("prompt", "prompt_token_ids", "messages", "deadline")
_SAMPLING_KEYS = {field.name for field in msgspec.structs.fields(SamplingParams)}


class InputLine(msgspec.Struct, frozen=True):
    """One line of input: a request, or what is wrong with it."""

    number: int
    id: str
    request: Request | None
    error: str | None = None


def read_requests(
    path: Path, defaults: SamplingParams, deadline: float | None = None
) -> Iterator[InputLine]:
    """The lines of ``path`` that are not blank. Raises :class:`InputError` if it cannot be read."""
    seen: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _unique(parse_line(raw, number, defaults, deadline), seen)
    except OSError as error:
        raise InputError(f"cannot read the input {path}: {error.strerror}") from None


def count_lines(path: Path) -> int:
    """Lines of ``path`` that are not blank. Raises :class:`InputError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sum(1 for raw in file if raw.strip())
    except OSError as error:
        raise InputError(f"cannot read the input {path}: {error.strerror}; --input needs a file of "
                         'lines such as {"id": "1", "prompt": "Machine learning is"}') from None


def parse_line(
    raw: bytes, number: int, defaults: SamplingParams, deadline: float | None = None
) -> InputLine:
    """One line; what it lacks is taken from the defaults, and its number where it has no id."""
    try:
        data = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(data, ensure_ascii=False).encode()  # no lone surrogates: no file can hold them
    except (ValueError, RecursionError) as error:
        return InputLine(number, str(number), None, f"not valid JSON: {error}")
    if not isinstance(data, dict):
        return InputLine(number, str(number), None, f"a JSON object is needed, found {_kind(data)}")
    name = data.pop("id", None)
    name = str(number) if name is None else str(name)
    try:
        return InputLine(number, name, _request_of({"deadline": deadline, **data}, name, defaults))
    except ConfigError as error:
        return InputLine(number, name, None, str(error))


def _request_of(data: dict[str, Any], name: str, defaults: SamplingParams) -> Request:
    unknown = [key for key in data if key not in _REQUEST_KEYS and key not in _SAMPLING_KEYS]
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r}; known: id, {', '.join(_REQUEST_KEYS)}, "
                          f"{', '.join(sorted(_SAMPLING_KEYS))}")
    own = {key: value for key, value in data.items() if key in _SAMPLING_KEYS}
    merged = {**msgspec.structs.asdict(defaults), **own}
    sampling = convert(merged, SamplingParams, "sampling")
    if sampling.return_generation_logits or sampling.return_context_logits:
        raise ConfigError("logits are not written to files; ask for logprobs and prompt_logprobs")
    rest = {key: value for key, value in data.items() if key in _REQUEST_KEYS}
    return convert({**rest, "sampling": sampling, "id": name}, Request, "request")


def _unique(line: InputLine, seen: dict[str, int]) -> InputLine:
    first = seen.setdefault(line.id, line.number)
    if first == line.number:
        return line
    # Its result needs a name that no other has, or a resumed run would take it for done.
    return InputLine(line.number, f"{line.id} (line {line.number})", None,
                     f"the id {line.id!r} was used on line {first} already")


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", type(None): "null",
            bool: "a boolean"}.get(type(value), "a number")


def result_data(result: Result) -> dict[str, Any]:
    """A result as an output line's object; ``choices`` where there are several."""
    if result.error is not None:
        data: dict[str, Any] = {"id": result.id, "error": result.error,
                                "finish_reason": result.finish_reason}
        if result.token_ids:
            data["text"] = result.text
            data["token_ids"] = result.token_ids
        return data
    usage = result.usage
    data = {
        "id": result.id,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
                  "total_tokens": usage.total_tokens},
        "timing": msgspec.to_builtins(result.timing),
    }
    if result.choices[0].logprobs is not None:
        data["logprobs"] = msgspec.to_builtins(result.choices[0].logprobs)
    if result.prompt_logprobs is not None:
        data["prompt_logprobs"] = msgspec.to_builtins(result.prompt_logprobs)
    if len(result.choices) > 1:
        data["choices"] = [
            {"index": choice.index, "text": choice.text, "token_ids": choice.token_ids,
             "finish_reason": choice.finish_reason} for choice in result.choices]
    return data


class ResultFile:
    """The output: appended to as requests finish, each line whole or, after a kill, dropped.

    Opening it keeps the results that an earlier run has finished (``done``), and drops its errors, which
    are tried again, and a line that was cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        try:
            self._keep_finished()
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write the output {path}: {error.strerror}; give --output a "
                             "file in a folder that you may write to") from None

    def write(self, data: dict[str, Any]) -> None:
        """Append a line; it is in the file when this returns. Raises :class:`InputError`."""
        try:
            self._file.write(json.dumps(data, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it would try to write the rest
                self._file.close()
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; the results before this one are in "
                "it, and the same command goes on from there") from None

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from None

    def _keep_finished(self) -> None:
        if not self.path.is_file():  # a device or a pipe holds nothing of an earlier run
            return
        kept = []
        with open(self.path, "rb") as file:
            lines = file.readlines()
        for number, raw in enumerate(lines, start=1):
            try:
                data = json.loads(raw)
            except ValueError:
                data = None
            if not raw.endswith(b"\n") and raw.startswith(b"{"):
                continue  # cut off
            if not isinstance(data, dict) or "id" not in data:
                raise InputError(
                    f"{self.path}, line {number}, is no result of an earlier run, and would be "
                    "lost; give --output another file")
            if "error" not in data:
                self.done.add(str(data["id"]))
                kept.append(raw)
        if len(kept) != len(lines):
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.path)
