"""``python -m disagg_mpi``: the group of commands, and how its errors end a process.

Under mpirun every rank parses the same line, so every rank finds the same mistake; rank 0 says it once and
all leave with the same code (see ``job.guards``).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from disagg_mpi import __version__
from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.errors import ConfigError, DisaggError
from disagg_mpi.job import guards

_COMMANDS = {
    "run": "Answer prompts: one, many, or a file of them.",
    "serve": "Answer HTTP clients: the OpenAI API, metrics, health.",
    "launch": "Start mpirun with what the MPI at hand needs.",
    "layout": "Show which rank does what, and the memory it takes.",
    "doctor": "Say what this MPI and this machine can do.",
    "fetch": "Get the default model once.",
}


class _LazyGroup(click.Group):
    """Imports a command when it is asked for, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"disagg_mpi.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="disagg_mpi")
def cli() -> None:
    """Disaggregated LLM serving as a single mpirun.

    Rank 0 is the orchestrator; the other ranks are context instances (they compute a prompt's KV-cache)
    and generation instances (they decode with it).

    \b
      python -m disagg_mpi launch -n 3 -- run --prompt "Machine learning is"
      mpirun -n 3 python -m disagg_mpi run --prompt "Machine learning is"
      python -m disagg_mpi layout --context 2 --generation 1
      mpirun -n 3 python -m disagg_mpi doctor
    """


def main() -> None:
    """Entry of ``python -m disagg_mpi``."""
    guards.before_mpi()
    rank = launcher_context().rank
    if rank:
        # Help and version are printed once, too.
        if {"-h", "--help", "--version"} & set(sys.argv[1:]) or len(sys.argv) == 1:
            sys.exit(0)
    elif "COLUMNS" not in os.environ and not sys.stdout.isatty():
        os.environ["COLUMNS"] = "100"
    try:
        code = cli.main(prog_name="python -m disagg_mpi", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        _end(ConfigError(error.format_message() + hint))
    except click.Abort:
        sys.exit(guards.EXIT_INTERRUPTED)
    except DisaggError as error:
        _end(error)
    else:
        sys.exit(code or 0)


def _end(error: DisaggError) -> None:
    """With hooks installed they end all ranks together; without, this process is alone."""
    if sys.excepthook is not sys.__excepthook__:
        raise error
    click.echo(f"{type(error).__name__}: {error}", err=True)
    sys.exit(error.exit_code)
