"""The cache folder, and directories that appear in it whole or not at all.

Life cycle of a cached directory: :func:`build_directory` makes a temporary sibling, the caller's
``fill`` writes into it, everything is flushed, and one ``rename`` gives it its name. So whoever
sees the name sees a complete directory, and nobody ever writes into it again.

Who owns what: a temporary sibling belongs to the process whose id is in its name. Several ranks, or
several hosts on one NFS export, may build the same directory at once: there are no locks (they are
not to be trusted on NFS), the first rename wins and the losers throw their own work away. What a
killed process left behind is removed by the next process that comes by: at once if the owner ran
here and is dead, after a day if that cannot be known.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from disagg_mpi.errors import ModelError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "DISAGG_MPI_CACHE"

# An owner on another host cannot be asked whether it lives. A build writes all the time (conversion
# takes seconds, a download minutes), so a day without a write means nobody is there.
ABANDONED_AFTER_S = 24 * 3600.0

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_ELSEWHERE = f"set {CACHE_VARIABLE}=DIR to a folder you may write to"


def cache_dir() -> Path:
    """The cache folder; it need not exist yet."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "disagg_mpi"
    try:
        return Path.home() / ".cache" / "disagg_mpi"
    except RuntimeError as error:  # no HOME and no passwd entry, as in some containers
        raise ModelError(
            f"no cache folder: this user has no home directory; set {CACHE_VARIABLE}=DIR"
        ) from error


def build_directory(
    target: Path, fill: Callable[[Path], object], *, bytes_needed: int | None = None
) -> Path:
    """Return ``target``, which ``fill(temporary_directory)`` writes first if it is not there yet.

    ``bytes_needed`` (an upper bound of what ``fill`` writes) is checked before it starts, so that a
    disk that is too small is reported at once and not after minutes.
    """
    parent = target.parent
    with readable_disk_errors(parent, bytes_needed):
        _remove_leftovers(target)
        if _is_complete(target):
            return target
        _make_folder(parent)
        if bytes_needed is not None:
            check_free_space(parent, bytes_needed)
        temporary = parent / _temporary_name(target.name)
        temporary.mkdir()
        try:
            fill(temporary)
            _flush_tree(temporary)
            _rename_or_discard(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


@contextmanager
def readable_disk_errors(folder: Path, bytes_needed: int | None = None) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a :class:`ModelError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise disk_full_error(folder, bytes_needed) from error
        if error.errno in _NOT_WRITABLE:
            raise ModelError(
                f"cannot write to {folder}: {error.strerror} ({error.filename}); {_ELSEWHERE}"
            ) from error
        raise


def check_free_space(folder: Path, bytes_needed: int) -> None:
    """Raise a :class:`ModelError` if the disk that holds ``folder`` has not that much free."""
    if shutil.disk_usage(folder).free < bytes_needed:
        raise disk_full_error(folder, bytes_needed)


def disk_full_error(folder: Path, bytes_needed: int | None) -> ModelError:
    """What to raise when the disk that holds ``folder`` is too small."""
    needed = "more room than that" if bytes_needed is None else format_bytes(bytes_needed)
    try:
        free = format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        free = "an unknown number of bytes"
    return ModelError(
        f"no space left on the disk of {folder}: found {free} free, this needs {needed}; "
        f"free some space, or set {CACHE_VARIABLE}=DIR to a folder on a larger disk "
        "(where quotas apply, the quota counts)"
    )


def format_bytes(count: int) -> str:
    """``538_060_800`` -> ``"538.1 MB"``."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        # A file is in the way, or the place takes no folders: what the variable names is wrong.
        reason = f"{error.strerror} ({error.filename})"
        raise ModelError(f"cannot make the folder {folder}: {reason}; {_ELSEWHERE}") from error


def _is_complete(target: Path) -> bool:
    # An empty directory (someone's mkdir) is not a build, and rename replaces it.
    try:
        with os.scandir(target) as entries:
            return next(entries, None) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


def _temporary_prefix(name: str) -> str:
    return f".{name}.tmp-"


def _owner_host() -> str:
    """This host and process-id namespace: two containers may share a host name, not process ids."""
    try:
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        namespace = "0"
    return f"{namespace}-{socket.gethostname().replace('/', '_')}"


def _temporary_name(name: str) -> str:
    return f"{_temporary_prefix(name)}{os.getpid()}-{secrets.token_hex(4)}-{_owner_host()}"


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary siblings of ``target`` whose owner is surely gone."""
    prefix = _temporary_prefix(target.name)
    try:
        names = [name for name in os.listdir(target.parent) if name.startswith(prefix)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        leftover = target.parent / name
        if _is_abandoned(leftover, name.removeprefix(prefix)):
            log.info("removing %s, left by a run that was killed", leftover)
            shutil.rmtree(leftover, ignore_errors=True)  # several ranks may do this at once


def _is_abandoned(leftover: Path, owner: str) -> bool:
    pid, _, rest = owner.partition("-")
    _, _, host = rest.partition("-")
    if host == _owner_host() and pid.isdigit():
        return not _is_alive(int(pid))
    try:
        last_write = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
    except OSError:  # it is being written or removed under our eyes: somebody owns it
        return False
    return time.time() - last_write > ABANDONED_AFTER_S


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush_tree(directory: Path) -> None:
    """fsync every file, then the directories: rename must not overtake the bytes it names."""
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            _flush(path)


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse fsync of a directory; there is nothing more to be done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _rename_or_discard(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        # Somebody else was first (EEXIST or ENOTEMPTY), or NFS sent our rename twice and reports
        # the second (ENOENT). Either way a complete target is there, and that is all we want.
        if not _is_complete(target):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        _flush(target.parent)
