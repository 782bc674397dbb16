"""A folder of models: one sub-folder each, with a ``config.pbtxt`` and folders for versions.

Read once and never written. What lies in version folders is not opened: rank 0 does the work of the Python
models itself, and weights come from where the parameters say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.triton.pbtxt import ConfigFile, read_config

CONFIG_NAME = "config.pbtxt"

EXAMPLE = "examples/model_repository is a complete one"


@dataclass(frozen=True)
class Repository:
    """The models of a folder, by name."""

    folder: Path
    files: dict[str, ConfigFile]
    without_config: tuple[str, ...]
    """Sub-folders that hold no ``config.pbtxt``."""

    def get(self, name: str, wanted_by: str) -> ConfigFile:
        """The model ``name``; ``wanted_by`` says which line names it. Raises :class:`ConfigError`."""
        if name in self.files:
            return self.files[name]
        there = f"{self.folder / name} has no {CONFIG_NAME}" if name in self.without_config else \
            f"{self.folder} has no model of that name"
        raise ConfigError(f"{wanted_by} names the model {name!r}, but {there}; its models are: "
                          + ", ".join(self.files))


def read_repository(folder: Path) -> Repository:
    """All models of ``folder``. Raises :class:`ConfigError` for what Triton would not load either."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise ConfigError(f"--model-repository {folder}: found {found}, needed a folder with one folder for "
                          f"each model ({EXAMPLE})")
    if (folder / CONFIG_NAME).exists():
        raise ConfigError(f"--model-repository {folder}: this is the folder of one model; needed is the one "
                          f"above it: --model-repository {folder.absolute().parent}")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found_in = [path for path in folders if (path / CONFIG_NAME).is_file()]
    if not found_in:
        raise ConfigError(f"--model-repository {folder}: no folder in it has a {CONFIG_NAME}; needed is one "
                          f"for each model ({EXAMPLE})")
    files = {path.name: read_config(path / CONFIG_NAME) for path in found_in}
    for file in files.values():
        _check_name(file)
    return Repository(folder, files, tuple(path.name for path in folders if path.name not in files))


def version_of(file: ConfigFile) -> str:
    """The version that clients are told: the highest of the model's version folders, else 1."""
    numbers = [int(path.name) for path in file.path.parent.iterdir()
               if re.fullmatch("[1-9][0-9]{0,17}", path.name) and path.is_dir()]
    return str(max(numbers, default=1))


def has_code(file: ConfigFile) -> bool:
    """Whether the model brings a Python program of its own."""
    return (file.path.parent / version_of(file) / "model.py").is_file()


def _check_name(file: ConfigFile) -> None:
    """A copied model keeps the name of the one that it was copied from until somebody changes it."""
    said = file.config.name
    if said and said != file.name:
        place = file.place(rf'(?<!\w)name\s*:\s*["\']{re.escape(said)}["\']')
        raise ConfigError(f'{place}: name is "{said}", but the folder is {file.name}; '
                          f'write name: "{file.name}"')
