"""From a plan to results: `plan`, `run`, `show`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import click

from .. import plugins
from ..config import plain
from ..interfaces import Choice, MambabenchError
from ..keys import Fingerprints
from ..plan import Plan, read_plan
from ..steps import Step, Steps, expand, matches
from ..store import Store
from .inspect import echo_columns

_SYMBOLS = {"ok": "✓", "absent": "·", "running": "…", "skipped": "-"}


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.argument("file", type=click.Path(path_type=Path)),
        click.option("--store", type=click.Path(path_type=Path), help="Where results are kept [runs/NAME]."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the plan."),
        click.option(
            "--only", multiple=True, metavar="GLOB", help="Only steps with a matching label, and what they need."
        ),
        click.option("--gpus", metavar="0,1", help="The GPUs that steps may use [none: CPU]."),
    ):
        command = option(command)
    return command


@click.command("plan")
@_plan_options
@click.option("--needs", "asked", is_flag=True, help="Estimate data, GPU memory and GPU-hours instead.")
def show_plan(
    file: Path, store: Path | None, overrides: tuple[str, ...], only: tuple[str, ...], gpus: str | None, asked: bool
) -> None:
    """Check a plan and show its steps: label, state, reason."""
    plan, steps = _expand(file, overrides, only, _gpus(gpus))
    if asked:
        _echo_needs(plan, steps)
        return
    folder = store or _default_store(plan)
    at = Store.open(folder) if (folder / "run.json").is_file() else None
    _warn_of_broken()
    done = at.done(list(steps)) if at else {}
    echo_columns(("", "step", "component", "state"), _rows(steps, at, done))
    left = [step for step in steps if step.key not in done]
    failed, blocked = _held_up(left, at)
    held = len(failed) + len(blocked)
    hint = f"; {len(failed)} failed before, --retry runs {'them' if len(failed) > 1 else 'it'} again" if failed else ""
    hint += f" and what {'they block' if len(failed) > 1 else 'it blocks'} ({len(blocked)})" if blocked else ""
    click.echo(f"\n{len(steps.steps)} steps, {len(left) - held} to run{hint}; store {folder}")
    missing = Counter(text for step in left for text in ([step.obstacle] if step.obstacle else step.wants))
    for text, count in missing.items():
        click.echo(f"missing: {text} ({count} step{'s' * (count != 1)})")


@click.command("run")
@_plan_options
@click.option("--launcher", default="local", show_default=True, help="The launcher component.")
@click.option("--share", type=click.IntRange(1), default=1, help="Steps that may use one GPU at the same time [1].")
@click.option("--jobs", type=click.IntRange(0), default=0, help="Steps side by side [cores, or one a GPU].")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads a step [1].")
@click.option("--retry", is_flag=True, help="Run steps again that failed.")
def run_plan(
    file: Path,
    store: Path | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    gpus: str | None,
    launcher: str,
    share: int,
    jobs: int,
    threads: int,
    retry: bool,
) -> int:
    """Run what a plan asks for and the store does not have yet."""
    from ..config import Structurer
    from ..environment import capture, code, host
    from ..progress import progress_for
    from ..runner import run

    loaded = plugins.registry()
    indices = _gpus(gpus)
    plan, steps = _expand(file, overrides, only, indices)
    _warn_of_broken()
    component = loaded.find("launcher", launcher)
    if lacking := plugins.missing(component.requires):
        raise MambabenchError(f"launcher {launcher!r}: not installed as required: {', '.join(lacking)}")
    options: dict[str, Any] = {"use": launcher, "gpus": list(indices), "share": share}
    options |= {"jobs": jobs, "threads": threads}
    known = {item.name for item in dataclasses.fields(component.config)}
    choice = Structurer(loaded).choice("launcher", {k: v for k, v in options.items() if k == "use" or k in known})
    at = Store.create(store or _default_store(plan))
    record = run_record(plan, steps, capture(loaded.environment()), code())
    with at.holding_run():
        at.write_run(_with_history(record, steps, at))
    with contextlib.closing(plugins.make(component, choice.config)) as children:
        summary = run(
            list(steps), at, children, loaded, host=host(indices), retry=retry, progress=progress_for(sys.stderr)
        )
    click.echo(f"{summary.text()}; store {at.path}")
    return 130 if summary.stopped else 0 if summary.fine else 1


@click.command("show", short_help="What a store holds, or one step of it.")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("label", required=False)
def show_store(store: Path, label: str | None) -> None:
    """What a store holds; with a LABEL (or a glob), that step's record, facts and log."""
    at = Store.open(store)
    cells = at.run().get("cells", [])
    if label is None:
        echo_columns(("step", "state", "reason"), [_cell_row(cell, at) for cell in cells])
        return
    found = [cell for cell in cells if matches(cell["label"], label)]
    if not found:
        labels = [cell["label"] for cell in cells]
        raise MambabenchError(f"{store}: no step {label!r}{plugins.suggest(label, labels)}")
    for cell in found:
        _echo_step(cell, at)


def run_record(plan: Plan, steps: Steps, environment: dict[str, str], code: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of a run; reports need nothing else beside the steps' own files."""
    loaded = plugins.registry()
    return {
        "plan": {"name": plan.name, "sha256": plan.sha256, "toml": plan.text, "seeds": list(plan.seeds)},
        "code": code,
        "environment": environment,
        "plugins": plugins.describe(loaded),
        "models": [
            {"name": "teacher", "backend": plan.teacher.backend.name, "keep": "all", "teacher": True},
            *(
                {
                    "name": model.name,
                    "backend": model.backend.name,
                    "keep": _keep(model.selector) if model.selector else "as it is",
                    "train": list(model.train),
                    "teacher": False,
                }
                for model in plan.models.values()
            ),
        ],
        "decoders": list(plan.decoders),
        "suites": [
            {"name": name, "use": choice.name, "traits": sorted(loaded.find("suite", choice.name).traits)}
            for name, choice in plan.suites.items()
        ],
        "cells": [dataclasses.asdict(cell) for cell in steps.cells],
        "asked": [cell.label for cell in steps.cells if cell.key in steps.steps],
    }


def _with_history(record: dict[str, Any], steps: Steps, at: Store) -> dict[str, Any]:
    """What an earlier run was asked for stays asked for, and a run that has nothing to do leaves the code and the
    environment of the one that had."""
    before = at.run()
    asked = before.get("asked", [cell["label"] for cell in before.get("cells", [])])
    record = {**record, "asked": list(dict.fromkeys([*asked, *record["asked"]]))}
    lost = {cell["label"] for cell in before.get("cells", [])} - {cell["label"] for cell in record["cells"]}
    if lost:
        click.echo(
            f"mambabench: {at.path}: the last run had {len(lost)} other labels, such as {min(lost)}; "
            "their results stay in the store, and reports follow the plan of this run",
            err=True,
        )
    if "code" in before and len(at.done(list(steps))) == len(steps.steps):
        return {**record, "code": before["code"], "environment": before["environment"]}
    return record


def _expand(file: Path, overrides: tuple[str, ...], only: tuple[str, ...], gpus: tuple[int, ...]) -> tuple[Plan, Steps]:
    from ..environment import machine_facts

    loaded = plugins.registry()
    plan = read_plan(file, loaded, overrides)
    fingerprints = Fingerprints()
    steps = expand(plan, loaded, fingerprints, machine_facts(gpus), gpus=1 if gpus else 0)
    fingerprints.save()
    return plan, steps.only(*only) if only else steps


def _gpus(text: str | None) -> tuple[int, ...]:
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",")]
    indices = tuple(int(part) for part in parts if part.isdecimal())
    if len(set(indices)) != len(parts):
        raise click.BadParameter(f"expected numbers of GPUs such as 0,1, got {text!r}", param_hint="--gpus")
    return indices


def _default_store(plan: Plan) -> Path:
    return Path("runs") / plan.name


def _keep(selector: Choice) -> Any:
    layers = getattr(selector.config, "layers", None)
    if layers is not None:
        return list(layers)
    return getattr(selector.config, "share", {"use": selector.name, **plain(selector.config)})


def _warn_of_broken() -> None:
    for broken in plugins.registry().broken:
        click.echo(
            f"mambabench: warning: plug-in {broken.distribution} {broken.version} is broken ({broken.phase}): "
            f"{broken.error}; `mambabench plugins --traceback` shows where",
            err=True,
        )


def _rows(steps: Steps, at: Store | None, done: Container[str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for cell in steps.cells:
        if cell.why:
            rows.append((_SYMBOLS["skipped"], cell.label, "", f"skipped: {cell.why}"))
        elif cell.key in steps.steps:
            step = steps.steps[cell.key]
            state, reason = "ok" if cell.key in done else "absent", ""
            if at is not None and cell.key not in done:
                status = at.status(cell.key)
                state, reason = status.state, status.reason
            if step.obstacle and state != "ok":
                state, reason = "unsupported", step.obstacle
            text = {"absent": "to run"}.get(state, state) + (f": {reason}" if reason else "")
            if step.wants and state != "ok" and not step.obstacle:
                text += f"; {'; '.join(step.wants)}"
            if step.labels[0] != cell.label:
                text += f" (same as {step.labels[0]})"
            rows.append((_SYMBOLS.get(state, "✗"), cell.label, step.view().component, text))
    return rows


def _cell_row(cell: dict[str, Any], at: Store) -> tuple[str, ...]:
    if cell["why"]:
        return cell["label"], "skipped", cell["why"]
    status = at.status(cell["key"])
    if status.state != "ok" and at.status(cell["key"], artifacts=False).state == "ok":
        return cell["label"], "ok", f"{status.reason}; made anew where a run needs it"
    return cell["label"], status.state, status.reason


def _held_up(left: Sequence[Step], at: Store | None) -> tuple[set[str], set[str]]:
    """Keys of the steps that failed and are not run again unasked, and of those that wait for them."""
    from ..runner import left_as_found

    failed = {step.key for step in left if at is not None and left_as_found(step, at)}
    blocked: set[str] = set()
    for step in left:
        if step.key not in failed and step.all_inputs & (failed | blocked):
            blocked.add(step.key)
    return failed, blocked


def _echo_needs(plan: Plan, steps: Steps) -> None:
    from ..needs import BASIS, hours_told, needs

    found = needs(plan, steps)
    echo_columns(("step", "tokens", "GiB a GPU", "GPU-hours", "data"), [need.row() for need in found])
    hours = sum(need.hours or 0.0 for need in found)
    click.echo(f"\n{hours_told(hours)} GPU-hours in all. {BASIS}")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _echo_step(cell: dict[str, Any], at: Store) -> None:
    label, state, reason = _cell_row(cell, at)
    click.echo(f"{label}: {state}{f': {reason}' if reason else ''}")
    if not cell["key"]:
        return
    folder = at.folder(cell["key"])
    click.echo(f"  folder  {folder}")
    if (folder / "outcome.json").is_file():
        record = at.outcome(cell["key"], artifacts=False) or {}
        click.echo(f"  wall    {record.get('wall_s', 0.0):.2f} s")
        rows = [(name, _short(value)) for name, value in sorted(record.get("detail", {}).items())]
        for fact in record.get("facts", []):
            arm = f" ({fact['arm']})" if fact.get("arm") else ""
            rows.append((fact["name"], f"{_short(fact['value'])} {fact.get('unit', '')}{arm}".rstrip()))
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            click.echo(f"  {name:<{width}}  {text}")
    log = folder / "log.txt"
    if log.is_file() and state != "ok":
        click.echo("  log     " + "\n          ".join(log.read_text(errors="replace").splitlines()[-20:]))
