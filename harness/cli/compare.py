"""Whether a run is worse than another: `compare`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import plugins
from ..interfaces import Comparison
from .output import echo_json, json_option


@click.command("compare")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("head", type=click.Path(path_type=Path))
@click.option("--gates", type=click.Path(path_type=Path), help="TOML file with margins [1 point, 3 %].")
@json_option
def compare_stores(base: Path, head: Path, gates: Path | None, as_json: bool) -> int:
    """Compare two stores, label by label and item by item.

    Exit codes: 0 pass, 10 fail, 11 inconclusive, 12 not comparable. The same store twice measures a machine's noise.
    """
    from ..compare import STRICTNESS, compare, exit_code, strictest, unasked
    from ..gates import Gates, read_gates
    from ..results import Results

    registry = plugins.registry()
    declared = read_gates(gates) if gates else Gates()
    sides = Results.read([base]), Results.read([head])
    comparisons = compare(*sides, declared, registry.verdicts)
    found = Counter(comparison.verdict for comparison in comparisons)
    counts = {verdict: found[verdict] for verdict in reversed(STRICTNESS)}
    left_out = unasked(*sides)
    if as_json:
        echo_json(
            {
                "base": str(base),
                "head": str(head),
                "verdict": strictest(comparisons),
                "exit_code": exit_code(comparisons),
                "counts": counts,
                "unasked": left_out,
                "comparisons": [_told(comparison) for comparison in comparisons],
            }
        )
    else:
        _print(comparisons, counts, len(left_out))
    for index in declared.idle:
        click.echo(f"mambabench: warning: {gates}: gate.{index} fits nothing that was compared", err=True)
    _tell_of_plugins(registry)
    return exit_code(comparisons)


def _told(comparison: Comparison) -> dict[str, Any]:
    """A comparison with the parts of its names. Seeds that are judged together have none, as have scores no decoder."""
    name, _, seed = comparison.label.partition("@seed")
    model, decoder, suite = name.split("/")
    told = dataclasses.asdict(comparison)
    return {
        "label": told.pop("label"),
        "model": model,
        "decoder": None if decoder == "-" else decoder,
        "suite": suite,
        "seed": int(seed) if seed else None,
        # Requests of a latency may name a file.
        "task": None if comparison.relative else comparison.metric.rpartition("/")[0] or None,
        **told,
    }


def _print(comparisons: Sequence[Comparison], counts: Mapping[str, int], left_out: int) -> None:
    from rich.console import Console

    from ..compare import render_comparisons

    console = Console()
    # A log has no width to fit in, and a wrapped table cannot be searched.
    wide = console if console.is_terminal else Console(width=240)
    wide.print(render_comparisons(comparisons))
    if left_out:
        console.print(f"left out: {left_out} label{'s' * (left_out != 1)} that neither run was asked for")
    told = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    console.print(", ".join(told) or "nothing to compare")


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
