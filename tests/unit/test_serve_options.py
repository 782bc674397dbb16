"""The options of ``serve``: where they come from, what they may be, what is checked before a job starts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from disagg_mpi.cli import serve as module
from disagg_mpi.cli.main import cli
from disagg_mpi.cli.options import settings_of
from disagg_mpi.cli.serve import (
    ServeOptions,
    _bind,
    _limits_of,
    _model_name,
)
from disagg_mpi.config import convert
from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.ports import Ports, is_loopback, reachable, written
from disagg_mpi.frontend.served import ServerLimits


def options(**given: Any) -> ServeOptions:
    return convert(given, ServeOptions, "[serve]")


def test_a_file_serves_several_commands(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('context = 2\n[sampling]\nmax_tokens = 9\n[run]\nprompt = "a"\n'
                    '[serve]\nhttp_port = 9000\nmax_n = 3\n')
    found = settings_of({"config_file": file, "metrics_port": 9001, "api_key": None}, "serve")
    assert found.command == {"http_port": 9000, "max_n": 3, "metrics_port": 9001}
    assert found.job.context == 2
    assert settings_of({"config_file": file}).command == {"prompt": "a"}
    serving = convert(found.command, ServeOptions, "[serve]")
    assert _limits_of(serving) == ServerLimits(max_n=3)


@pytest.mark.parametrize(("given", "text"), [
    ({"http_port": 65536}, "http_port is 65536"), ({"metrics_port": -1}, "metrics_port is -1"),
    ({"http_port": 8002}, "are the same port"), ({"grace": -1.0}, "grace is -1"),
    ({"grace": float("nan")}, "grace is nan"), ({"api_key": ""}, "api_key must be"),
    ({"api_key": " a"}, "api_key must be"), ({"api_key": "ü"}, "api_key must be"),
    ({"htp_port": 1}, "htp_port"), ({"http_port": "8000"}, "http_port")])
def test_what_options_may_not_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        options(**given)


@pytest.mark.parametrize("name", ["max_n", "max_open_requests", "max_body_bytes", "max_connections",
                                  "max_prompt_tokens", "header_seconds"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        _limits_of(options(**{name: 0}))


def test_free_ports_are_not_the_same_port() -> None:
    assert options(http_port=0, metrics_port=0).http_port == 0


def test_ports_are_bound_all_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free = probe.getsockname()[1]
        with pytest.raises(ConfigError, match="--metrics-port"):
            Ports.bind("127.0.0.1", free, 0, taken.getsockname()[1])
        ports = Ports.bind("127.0.0.1", free, 0, 0)
        assert ports.http.getsockname() == ("127.0.0.1", free)
        assert ports.addresses()["http"] == f"http://127.0.0.1:{free}"
        for bound in (ports.http, ports.grpc, ports.metrics):
            bound.close()


def test_an_address_file_that_cannot_bewritten_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--address-file .*no/file"):
        _bind(options(address_file=tmp_path / "no" / "file", http_port=0, metrics_port=0))


def test_the_address_file_is_there_while_the_server_is(tmp_path: Path) -> None:
    file = tmp_path / "address"
    with written(file, {"http": "http://h:1", "metrics": "http://h:2/metrics"}):
        assert file.read_text() == "http=http://h:1\nmetrics=http://h:2/metrics\n"
    assert list(tmp_path.iterdir()) == []


def test_addresses_are_those_that_clients_can_use() -> None:
    assert reachable("127.0.0.1", 1) == "127.0.0.1:1"
    assert reachable("0.0.0.0", 1) == f"{socket.gethostname()}:1"
    assert reachable("::1", 1) == "[::1]:1"
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4


def test_the_models_name_is_the_directorys(tmp_path: Path) -> None:
    (tmp_path / "Llama-7B").mkdir()
    (tmp_path / "small.gguf").touch()
    assert _model_name(None) == _model_name("default") == "SmolLM2-135M-Instruct"
    assert _model_name(str(tmp_path / "Llama-7B")) == "Llama-7B"
    assert _model_name(str(tmp_path / "small.gguf")) == "small"
    assert _model_name("some/model") == "some/model"


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop_here(given: Any, command: str) -> Any:
        seen.append(given["api_key"])
        raise ConfigError("enough")

    monkeypatch.setattr(module, "settings_of", stop_here)
    monkeypatch.setenv("DISAGG_MPI_API_KEY", "secret")
    CliRunner().invoke(cli, ["serve"])
    CliRunner().invoke(cli, ["serve", "--api-key", "other"])
    assert seen == ["secret", "other"]
