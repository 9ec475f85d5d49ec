"""Whether a run is worse than another: `compare`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from .. import plugins


@click.command("compare")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("head", type=click.Path(path_type=Path))
@click.option("--gates", type=click.Path(path_type=Path), help="TOML file with margins [1 point, 3 %].")
def compare_stores(base: Path, head: Path, gates: Path | None) -> int:
    """Compare two stores, label by label and item by item.

    Exit codes: 0 pass, 10 fail, 11 inconclusive, 12 not comparable. The same store twice measures a machine's noise.
    """
    from rich.console import Console

    from ..compare import STRICTNESS, compare, exit_code, render_comparisons, unasked
    from ..gates import Gates, read_gates
    from ..results import Results

    registry = plugins.registry()
    declared = read_gates(gates) if gates else Gates()
    sides = Results.read([base]), Results.read([head])
    comparisons = compare(*sides, declared, registry.verdicts)
    console = Console()
    # A log has no width to fit in, and a wrapped table cannot be searched.
    wide = console if console.is_terminal else Console(width=240)
    wide.print(render_comparisons(comparisons))
    if left_out := len(unasked(*sides)):
        console.print(f"left out: {left_out} label{'s' * (left_out != 1)} that neither run was asked for")
    counts = Counter(comparison.verdict for comparison in comparisons)
    strictest = [f"{counts[verdict]} {verdict}" for verdict in reversed(STRICTNESS) if counts[verdict]]
    console.print(", ".join(strictest) or "nothing to compare")
    for index in declared.idle:
        click.echo(f"mambabench: warning: {gates}: gate.{index} fits nothing that was compared", err=True)
    _tell_of_plugins(registry)
    return exit_code(comparisons)


def _tell_of_plugins(registry: plugins.Registry) -> None:
    """Names the plug-ins that could not have their say: a gate that is silently absent is none."""
    for broken in registry.broken:
        click.echo(
            f"mambabench: warning: plug-in {broken.distribution} {broken.version} is broken ({broken.phase}) "
            f"and gave no verdict: {broken.error}",
            err=True,
        )
    for failure, times in Counter(registry.failures).items():
        often = f" {times} times" if times > 1 else ""
        click.echo(
            f"mambabench: warning: plug-in {failure.plugin}: {failure.hook} failed{often}: {failure.error}", err=True
        )
