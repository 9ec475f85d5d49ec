"""The commands `export`, a model of ours in the format of released checkpoints, and `kernels`."""

from __future__ import annotations

from pathlib import Path

import click

from ..harness.interfaces import MambabenchError


@click.command(short_help="Write a model as a MambaInLlama checkpoint.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--teacher", default="", help="The Transformer that the released code loads first: a folder or a name.")
def export(model: Path, out: Path, teacher: str) -> None:
    """Write MODEL, an artifact of a store, as a MambaInLlama or Mamba2InLlama checkpoint into the new folder OUT."""
    from . import released

    if out.exists():
        raise MambabenchError(f"{out}: exists already; name a new folder")
    released.export(model, out, teacher)
    click.echo(f"{out}: written", err=True)


@click.command(short_help="Which kernels there are for this machine's GPUs.")
def kernels() -> None:
    """Say which kernels there are for the GPUs of this machine, and why not."""
    from ..kernels.overview import overview

    for name, support in overview().items():
        click.echo(f"{name:28}{f'in PyTorch: {support.reason}' if support.reason else 'by kernels'}")
