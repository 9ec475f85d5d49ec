"""The command line. Sub-commands are imported when they are used, so that `plugins` or `plan` answer at once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from .. import plugins
from ..interfaces import MambabenchError
from ..store import disk_errors

PIPE_CLOSED = 141
"""Exit code of a command whose reader is gone, as that of a program which SIGPIPE ends: neither done nor a verdict."""
_VERBS = {
    "plugins": "inspect:show_plugins",
    "list": "inspect:list_components",
    "env": "inspect:show_environment",
    "plan": "run:show_plan",
    "run": "run:run_plan",
    "show": "run:show_store",
    "compare": "compare:compare_stores",
    "generate": "generate:generate",
}


class Verbs(click.Group):
    """The built-in verbs, and the commands that plug-ins bring."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _pipes():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _pipes():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_VERBS, *(name for name in plugins.registry().components("command") if name not in _VERBS)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _VERBS:
            module, _, attribute = _VERBS[name].partition(":")
            return getattr(importlib.import_module(f".{module}", __name__), attribute)
        loaded = plugins.registry()
        component = loaded.components("command").get(name)
        if component is None:
            return None
        module, _, attribute = component.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            return _broken(
                name, f"{loaded.owner(component)}: {component.target} fails: {type(error).__name__}: {error}"
            )


@contextmanager
def _pipes() -> Iterator[None]:
    """Ends a command whose reader is gone; left to themselves, click and rich would do so with 1."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop(sys.stdout, sys.stderr)
        raise click.exceptions.Exit(PIPE_CLOSED) from None


def _drop(*streams: TextIO) -> None:
    """Loses what is left of outputs that cannot be written: it would fail again when Python ends."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _broken(name: str, why: str) -> click.Command:
    """Stands for a plug-in's command that cannot be imported, so that the others still work."""

    def fail(**_: Any) -> None:
        raise MambabenchError(f"the command {name!r} of {why}")

    return click.Command(name, callback=fail, help=f"(broken) {why}", add_help_option=False)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--plugin",
    multiple=True,
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=lambda _, __, files: plugins.registry(files) if files else None,
    help="Load a local plug-in file.",
)
@click.version_option(package_name="mambabench")
def cli() -> None:
    """Turn Transformers into Mamba hybrids, measure them, and read tables of quality and speed."""


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line. What the user got wrong ends in one line and exit code 1 (2 for wrong usage)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(cli(arguments, standalone_mode=False) or 0)
    except MambabenchError as error:
        click.echo(f"mambabench: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("mambabench: interrupted", err=True)
        sys.exit(130)
    except OSError as error:
        # A write that finds the disk full does not know of what file.
        if error.filename is None and error.errno not in disk_errors.FULL:
            raise
        if error.filename is None:
            # It may have been the output.
            _drop(sys.stdout)
        where = "" if error.filename is None else f"{error.filename}: "
        click.echo(f"mambabench: {where}{error.strerror}", err=True)
        sys.exit(1)
