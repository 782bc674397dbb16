"""The parameters of one model: texts in ``config.pbtxt``, values here.

Whoever needs one asks for it by name, and is told ``None`` where it is empty or still ``${name}``. What
nobody has asked for at the end, and is set, is what this engine does not use: it is listed for the user.
"""

from __future__ import annotations

import re

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.triton.pbtxt import ConfigFile
from disagg_mpi.shapes import parse_ids

_TEMPLATE = re.compile(r"\$\{\w+\}")
_WORDS = {"true": True, "1": True, "false": False, "0": False}


class Parameters:
    """The parameters of ``file``; remembers which have been asked for."""

    def __init__(self, file: ConfigFile) -> None:
        self.file = file
        parameters = sorted(file.config.parameters.items())  # protobuf's maps have no order
        self._values = {key: value.string_value.strip() for key, value in parameters}
        self._asked: set[str] = set()

    def text(self, name: str) -> str | None:
        """The value as it stands; ``None`` where it is not set."""
        self._asked.add(name)
        value = self._values.get(name, "")
        return None if not value or _TEMPLATE.fullmatch(value) else value

    def positive(self, name: str) -> int | None:
        """The value as a number above 0. Raises :class:`ConfigError`."""
        value = self.text(name)
        if value is not None and not re.fullmatch("0*[1-9][0-9]{0,17}", value):
            raise self.error(name, "needed is a whole number above 0")
        return None if value is None else int(value)

    def flag(self, name: str) -> bool | None:
        """The value as a Boolean, in any of the spellings that Triton takes. Raises :class:`ConfigError`."""
        value = self.text(name)
        if value is not None and value.lower() not in _WORDS:
            raise self.error(name, "needed is true or false")
        return None if value is None else _WORDS[value.lower()]

    def ids(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """The value as a group of ids for each copy. Raises :class:`ConfigError`."""
        value = self.text(name)
        return None if value is None else parse_ids(value, f"{self.place(name)}: {name}")

    def is_default(self, name: str, *values: str) -> None:
        """This engine always does as ``values`` say: where the parameter says so too, it is used."""
        if self._values.get(name, "").lower() in values:
            self._asked.add(name)

    def unused(self) -> dict[str, str]:
        """Those that are set and that nobody has asked for."""
        return {name: value for name, value in self._values.items()
                if name not in self._asked and value and not _TEMPLATE.fullmatch(value)}

    def repeated(self) -> dict[str, list[int]]:
        """Those that the file has more than once, with their lines: the last one holds."""
        lines = {name: self.file.lines_of(_key(name)) for name in self._values}
        return {name: found for name, found in lines.items() if len(found) > 1}

    def place(self, name: str) -> str:
        """The file and the line of a parameter."""
        return self.file.place(_key(name))

    def error(self, name: str, what: str) -> ConfigError:
        """To be raised where the value of ``name`` cannot be; ``what`` says what is needed."""
        return ConfigError(f"{self.place(name)}: {name} is {self._values.get(name, '')!r}; {what}")


def _key(name: str) -> str:
    return rf'(?<!\w)key\s*:\s*["\']{re.escape(name)}["\']'
