"""From a plan to results: `plan`, `run`, `show`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import click

from .. import plugins
from ..config import plain
from ..interfaces import Choice, MambabenchError
from ..keys import Fingerprints
from ..plan import Plan, read_plan
from ..steps import Cell, Step, Steps, expand, matches
from ..store import Status, Store
from .output import echo_columns, echo_json, json_option

DONE, TO_RUN, FAILED, BLOCKED, SKIPPED = "done", "to run", "failed", "blocked", "skipped"
_SYMBOLS = {"ok": "✓", "absent": "·", "running": "…", SKIPPED: "-"}


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
@json_option
def show_plan(
    file: Path,
    store: Path | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    gpus: str | None,
    asked: bool,
    as_json: bool,
) -> None:
    """Check a plan and show its steps: label, state, reason."""
    from ..runner import hint

    plan, steps = _expand(file, overrides, only, _gpus(gpus))
    if asked:
        _echo_needs(plan, steps, as_json)
        return
    folder = store or _default_store(plan)
    at = Store.open(folder) if (folder / "run.json").is_file() else None
    _warn_of_broken()
    done = at.done(list(steps)) if at else {}
    follows = _follows(steps, at, done)
    found = [_planned(cell, steps, at, follows) for cell in steps.cells if cell.why or cell.key in steps.steps]
    counts = Counter(follows.values())
    missing = Counter(text for step in steps if step.key not in done for text in _missing(step))
    if as_json:
        told = {state: counts[state] for state in (DONE, TO_RUN, FAILED, BLOCKED)}
        echo_json({"plan": plan.name, "store": str(folder), "counts": told, "missing": missing, "steps": found})
        return
    echo_columns(("", "step", "component", "state"), [_row(each) for each in found])
    failed, blocked = counts[FAILED], counts[BLOCKED]
    more = f" and what {'they block' if failed > 1 else 'it blocks'} ({blocked})" if blocked else ""
    click.echo(f"\n{len(steps.steps)} steps, {counts[TO_RUN]} to run{hint(failed)}{more}; store {folder}")
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
@json_option
def show_store(store: Path, label: str | None, as_json: bool) -> None:
    """What a store holds; with a LABEL (or a glob), that step's record, facts and log."""
    at = Store.open(store)
    cells = at.run().get("cells", [])
    named = [cell for cell in cells if label is None or matches(cell["label"], label)]
    if label is not None and not named:
        labels = [cell["label"] for cell in cells]
        raise MambabenchError(f"{store}: no step {label!r}{plugins.suggest(label, labels)}")
    found = [_held(cell, at, whole=label is not None) for cell in named]
    if as_json:
        echo_json({"store": str(store), "steps": found})
    elif label is None:
        echo_columns(("step", "state", "reason"), [(each["label"], each["state"], each["reason"]) for each in found])
    else:
        for each in found:
            _echo_step(each)


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


def _follows(steps: Steps, at: Store | None, done: Container[str]) -> dict[str, str]:
    """What a run without --retry would make of each step, by key."""
    from ..runner import left_as_found

    found: dict[str, str] = {}
    for step in steps:
        if step.key in done:
            found[step.key] = DONE
        elif at is not None and left_as_found(step, at):
            found[step.key] = FAILED
        else:
            held = any(found.get(key) in (FAILED, BLOCKED) for key in step.all_inputs)
            found[step.key] = BLOCKED if held else TO_RUN
    return found


def _missing(step: Step) -> list[str]:
    return [step.obstacle] if step.obstacle else list(step.wants)


def _planned(cell: Cell, steps: Steps, at: Store | None, follows: Mapping[str, str]) -> dict[str, Any]:
    """A label of the plan: how its step stands, and what follows."""
    told: dict[str, Any] = {"label": cell.label, "component": None, "key": None, "missing": [], "same_as": None}
    if cell.why:
        return {**told, "state": SKIPPED, "reason": cell.why, "follows": SKIPPED}
    step = steps.steps[cell.key]
    told |= {"component": step.view().component, "key": step.key, "follows": follows[step.key]}
    if step.labels[0] != cell.label:
        told["same_as"] = step.labels[0]
    if follows[step.key] == DONE:
        return {**told, "state": "ok", "reason": ""}
    told["missing"] = _missing(step)
    if step.obstacle:
        return {**told, "state": "unsupported", "reason": step.obstacle}
    status = at.status(step.key) if at else Status("absent")
    return {**told, "state": status.state, "reason": status.reason}


def _row(planned: Mapping[str, Any]) -> tuple[str, ...]:
    state, reason = planned["state"], planned["reason"]
    text = (planned["follows"] if state == "absent" else state) + (f": {reason}" if reason else "")
    text += "".join(f"; {each}" for each in planned["missing"] if each != reason)
    text += f" (same as {planned['same_as']})" if planned["same_as"] else ""
    return _SYMBOLS.get(state, "✗"), planned["label"], planned["component"] or "", text


def _held(cell: Mapping[str, Any], at: Store, *, whole: bool) -> dict[str, Any]:
    """A label of a store's last run; `whole` with what its step told and the end of the log of one that failed."""
    told = {name: cell[name] or None for name in ("label", "key", "kind", "model", "decoder", "suite", "stage")}
    told["seed"] = cell["seed"]
    if not cell["key"]:
        return {**told, "state": SKIPPED, "reason": cell["why"], "wall_s": None}
    status = at.status(cell["key"])
    records = status if status.state == "ok" else at.status(cell["key"], artifacts=False)
    lost = "; made anew where a run needs it" if status.state != records.state else ""
    record = records.record or {}
    told |= {"state": records.state, "reason": status.reason + lost, "wall_s": record.get("wall_s")}
    if whole:
        folder = at.folder(cell["key"])
        log = folder / "log.txt"
        failed = records.state != "ok" and log.is_file()
        told |= {"folder": str(folder), "detail": record.get("detail", {}), "facts": record.get("facts", [])}
        told["log"] = log.read_text(errors="replace").splitlines()[-20:] if failed else []
    return told


def _echo_needs(plan: Plan, steps: Steps, as_json: bool) -> None:
    from ..needs import BASIS, hours_told, needs

    found = needs(plan, steps)
    hours = sum(need.hours or 0.0 for need in found)
    if as_json:
        told = [
            {"label": of.label, "tokens": of.tokens, "memory_bytes": of.memory, "gpu_hours": of.hours, "data": of.data}
            for of in found
        ]
        echo_json({"plan": plan.name, "gpu_hours": hours, "basis": BASIS, "steps": told})
        return
    echo_columns(("step", "tokens", "GiB a GPU", "GPU-hours", "data"), [need.row() for need in found])
    click.echo(f"\n{hours_told(hours)} GPU-hours in all. {BASIS}")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _echo_step(held: Mapping[str, Any]) -> None:
    click.echo(f"{held['label']}: {held['state']}{': ' * bool(held['reason'])}{held['reason']}")
    if not held["key"]:
        return
    click.echo(f"  folder  {held['folder']}")
    if held["wall_s"] is not None:
        click.echo(f"  wall    {held['wall_s']:.2f} s")
    rows = [(name, _short(value)) for name, value in sorted(held["detail"].items())]
    for fact in held["facts"]:
        arm = f" ({fact['arm']})" if fact.get("arm") else ""
        rows.append((fact["name"], f"{_short(fact['value'])} {fact.get('unit', '')}{arm}".rstrip()))
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        click.echo(f"  {name:<{width}}  {text}")
    if held["log"]:
        click.echo("  log     " + "\n          ".join(held["log"]))
