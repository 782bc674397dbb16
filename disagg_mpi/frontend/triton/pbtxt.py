"""One ``config.pbtxt`` as a message, whether it has been filled in or is still a template.

Triton's own files are templates: a script puts values where ``${name}`` stands. Where nobody did, a field is
left out, which is how protobuf says "not set"; quoted ones are text and stay
(:mod:`~disagg_mpi.frontend.triton.parameters` reads them as "not set" too). A file is read once and keeps its
text, so that every error about it can name a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_mpi.errors import ConfigError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# What some fields must say even where nobody filled them in, because clients read it: what is true of this
# server. Every model streams, and logits are fp32.
_FILLED = {
    "decoupled_mode": "true",
    "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16",
    "prompt_embedding_table_data_type": "TYPE_FP16",
}

# Comments and strings come first, so that nothing inside them is taken for a field. Possessive quantifiers
# keep it linear on any garbage.
_COMMENT = r"\#[^\n]*+"
_STRING = r""" "(?:\\.|[^"\\\n])*+"? | '(?:\\.|[^'\\\n])*+'? """
_OPEN_FIELD = re.compile(rf"""
    (?P<other>{_COMMENT} | {_STRING})
    | (?P<field>(?<!\w)\w++\s*+:\s*+)
      (?: \$\{{(?P<name>\w++)\}} | (?P<list>\[ (?: [^]\[{{}}"'\#$] | \$\{{\w++\}} )*+ \]) )
      (?P<end>\s*+[,;])?
    """, re.VERBOSE)
_COMMENT_OR_STRING = re.compile(rf"(?P<comment>{_COMMENT}) | {_STRING}", re.VERBOSE)

# protobuf quotes the whole line that it could not parse; a binary file may be one line.
_MAX_REASON = 200


@dataclass(frozen=True)
class ConfigFile:
    """A model's configuration and the file that it is from."""

    path: Path
    text: str
    config: ModelConfig

    @property
    def name(self) -> str:
        """The model's name: its folder's."""
        return self.path.parent.name

    @property
    def short(self) -> str:
        """``context/config.pbtxt``: the file as seen from the repository."""
        return f"{self.name}/{self.path.name}"

    def lines_of(self, pattern: str) -> list[int]:
        """The numbers of the lines where ``pattern`` begins, outside of comments."""
        return [self._code.count("\n", 0, match.start()) + 1 for match in re.finditer(pattern, self._code)]

    def place(self, pattern: str) -> str:
        """``…/context/config.pbtxt:12``: where ``pattern`` is last; without a line if it is nowhere."""
        lines = self.lines_of(pattern)
        return f"{self.path}:{lines[-1]}" if lines else str(self.path)

    @cached_property
    def _code(self) -> str:
        """The text with comments blanked, lines kept."""
        return _COMMENT_OR_STRING.sub(
            lambda match: "" if match["comment"] is not None else match[0], self.text)


def read_config(path: Path) -> ConfigFile:
    """Read and parse ``path``. Raises :class:`ConfigError`, with the line where something is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not a model configuration: not UTF-8 text") from None
    return ConfigFile(path, text, parse_config(text, path))


def parse_config(text: str, path: Path) -> ModelConfig:
    """The message that ``text`` describes; fields that are still ``${name}`` are not set."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise ConfigError(f"a Triton model repository is read with tritonclient, and {error.name or error} "
                          "is missing; type: pip install 'disagg_mpi[serve]'") from None
    try:
        return text_format.Parse(close_template(text), ModelConfig())
    except text_format.ParseError as error:
        line = f":{error.GetLine()}" if error.GetLine() is not None else ""
        raise ConfigError(f"{path}{line}: not a model configuration: {_reason(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a model configuration: nested too deeply") from None


def close_template(text: str) -> str:
    """``text`` without the fields that nobody filled in; every line stays where it was."""
    return _OPEN_FIELD.sub(_close, text)


def _close(match: re.Match[str]) -> str:
    whole = match[0]
    if match["other"] is not None or (match["list"] is not None and "${" not in match["list"]):
        return whole
    if match["name"] in _FILLED:
        return f"{match['field']}{_FILLED[match['name']]}{match['end'] or ''}"
    return "\n" * whole.count("\n")


def _reason(message: str) -> str:
    """protobuf's own words, without position and without the line that it quotes."""
    said = message.rpartition("': ")[2] or message
    said = re.sub(r"^\d+:\d+ : ", "", said)
    return said if len(said) <= _MAX_REASON else said[:_MAX_REASON] + " …"
