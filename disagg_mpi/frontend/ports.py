"""The ports that a server is to have, and where clients find them.

They are bound before the job starts, so that a port that is taken costs nothing, and listen when the server
does. A :class:`Ports` belongs to who bound it until it is handed to a server.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from disagg_mpi.errors import ConfigError

_PORT_ERRORS = {
    errno.EADDRINUSE: "is taken: give another one, or 0 for any that is free",
    errno.EACCES: "may not be used by this user: give one above 1023",
    errno.EADDRNOTAVAIL: "cannot be had: no interface of this host has that address; give another --host",
}


@dataclass(frozen=True)
class Ports:
    """Sockets that are bound and do not listen yet."""

    host: str
    http: socket.socket
    grpc: socket.socket
    """Holds the number until gRPC, which binds by itself, takes the port over."""
    metrics: socket.socket

    @classmethod
    def bind(cls, host: str, http: int, grpc: int, metrics: int) -> Self:
        """All or none; 0 is any free port. Raises :class:`ConfigError`."""
        with contextlib.ExitStack() as bound:
            sockets = []
            for option, port in (("--http-port", http), ("--grpc-port", grpc), ("--metrics-port", metrics)):
                sockets.append(bind(host, port, option))
                bound.callback(sockets[-1].close)
            bound.pop_all()
        return cls(host, *sockets)

    def addresses(self) -> dict[str, str]:
        """Where clients find each."""
        return {"http": f"http://{reachable(self.host, port_of(self.http))}",
                "grpc": reachable(self.host, port_of(self.grpc)),
                "metrics": f"http://{reachable(self.host, port_of(self.metrics))}/metrics"}


def bind(host: str, port: int, option: str) -> socket.socket:
    """A socket for ``port`` (0: any free one) that does not listen yet. Raises :class:`ConfigError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no address of this host: {error}; 127.0.0.1 is for clients on "
                          "this host, 0.0.0.0 for all") from None
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise port_error(error, host, port, option) from None
    return found


def port_error(error: OSError, host: str, port: int, option: str) -> ConfigError:
    """What to tell of a port that cannot be had; ``option`` is the one that names it."""
    reason = _PORT_ERRORS.get(error.errno or 0, f"cannot be used: {error.strerror}")
    return ConfigError(f"{option} {port} on {host} {reason}")


def port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def reachable(host: str, port: int) -> str:
    """An address for clients; where the server listens on all interfaces, by this host's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def written(file: Path | None, addresses: dict[str, str]) -> Iterator[None]:
    """``file`` with the addresses, whole or not there, while the block runs."""
    if file is None:
        yield
        return
    scratch = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text("".join(f"{name}={address}\n" for name, address in addresses.items()))
        os.replace(scratch, file)
    except OSError as error:
        raise ConfigError(f"cannot write --address-file {file}: {error.strerror}") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def check_writable(file: Path | None) -> None:
    """Raise :class:`ConfigError` for an address file that cannot be written."""
    if file is not None and not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write --address-file {file}: give a file in a folder that is there and "
                          "that you may write to")
