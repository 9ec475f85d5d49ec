"""Runs the steps of a plan: what is done is skipped, what fails stays a state with a reason and stops nothing else.

Only `ok` is final. Unsupported, blocked and cancelled steps are decided anew at every run; a crash or a timeout is
retried once; other failures wait for `retry`, or until the step is asked for otherwise. Several runs may share a store:
a step is claimed before it runs, and one that another run has claimed is waited for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from . import environment
from .forkserver import ATTEMPT, CODE, LEASED
from .interfaces import STATES, Handle, Host, Launcher, MambabenchError, Needs, Outcome, StepView, Unsupported
from .keys import digest
from .locks import Lock
from .plugins import LOCAL, HookFailure, Registry
from .progress import Progress, Tail, progress_for
from .store import Status, Store, outcome_of

T = TypeVar("T")

CHILD = f"{__package__}.child"
PRELOADED = (CHILD, "numpy", "pandas", "pyarrow.parquet", "torch")
"""What every step imports (pandas: pyarrow does, when it makes its first array)."""

AGAIN = ("crashed", "timeout")
ATTEMPTS = 2
ANEW = ("absent", "running", "interrupted", "cancelled", "blocked", "unsupported")
"""States in which a step runs without being asked for again."""

POLL_S, POLL_ALONE_S = 0.03, 0.1
REDRAW_S, REDRAW_ALONE_S = 0.25, 2.0


class PlannedStep(Protocol):
    """What the runner uses of a planner's step."""

    key: str
    kind: str
    labels: tuple[str, ...]
    needs: Needs
    lacking: tuple[str, ...]

    @property
    def obstacle(self) -> str: ...

    @property
    def modules(self) -> Iterable[str]: ...

    @property
    def all_inputs(self) -> Iterable[str]: ...

    def to_json(self) -> dict[str, Any]: ...

    def view(self) -> StepView: ...


@dataclass(slots=True)
class Summary:
    """How a run ended."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By key; a step that was not reached before Ctrl-C has none."""
    excused: set[str] = field(default_factory=set)
    """Keys of steps that are blocked by unsupported ones only."""
    ran: list[str] = field(default_factory=list)
    """Keys of attempts that this run started, in order."""
    stopped: bool = False
    """Whether Ctrl-C ended it."""
    unreached: int = 0
    """Steps that were not begun until then."""

    @property
    def counts(self) -> dict[str, int]:
        """Steps per state."""
        found = Counter(outcome.state for outcome in self.outcomes.values())
        return {state: found[state] for state in STATES if found[state]}

    @property
    def fine(self) -> bool:
        """Whether every step is ok or unsupported, or waits for nothing but what is unsupported."""
        return not self.stopped and all(
            outcome.state in ("ok", "unsupported") or key in self.excused for key, outcome in self.outcomes.items()
        )

    def text(self) -> str:
        """One line: steps per state, how many of them this run did, and which it left as it found them."""
        steps = len(self.outcomes) + self.unreached
        counts = {**self.counts, **({"not reached": self.unreached} if self.unreached else {})}
        states = ", ".join(f"{count} {state}" for state, count in counts.items()) or "nothing to do"
        left = {key for key, outcome in self.outcomes.items() if outcome.state not in ("ok", *ANEW)} - set(self.ran)
        end = "; stopped by Ctrl-C" if self.stopped else ""
        return f"{steps} step{'s' * (steps != 1)}: {states}; {len(set(self.ran))} ran now{hint(len(left))}{end}"


def hint(failed: int) -> str:
    """What to do about so many steps that are left as they were found, behind a count of others."""
    return f"; {failed} failed before, --retry runs {'them' if failed > 1 else 'it'} again" if failed else ""


def left_as_found(step: PlannedStep, store: Store) -> bool:
    """Whether a step failed before and a run without `retry` leaves it at that."""
    status = store.status(step.key)
    return status.state not in ("ok", *ANEW) and not _otherwise(step, store) and _spent(status)


def _otherwise(step: PlannedStep, store: Store) -> bool:
    """Whether a step that failed is now asked for with other options, or with more of the machine."""
    wanted = step.to_json()
    try:
        asked = store.step(step.key)
    except MambabenchError:
        # A damaged step.json says nothing of why the step failed.
        return True
    return any(digest(asked.get(part)) != digest(wanted[part]) for part in ("component", "needs"))


def _spent(status: Status) -> bool:
    """Whether a step that failed has no attempt left."""
    return status.state not in AGAIN or (status.record or {}).get("attempt", 1) >= ATTEMPTS


@dataclass(slots=True)
class Running:
    step: PlannedStep
    handle: Handle
    claim: Lock
    attempt: int
    leased: float
    """Unix time; marks the outcome of this attempt."""
    began: float
    """Monotonic time, for the timeout."""
    tail: Tail
    over: bool = False
    """Whether it was killed for its time, though it may take long to die."""


def run(
    steps: Iterable[PlannedStep],
    store: Store,
    launcher: Launcher,
    plugins: Registry,
    *,
    host: Host,
    retry: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Runs steps, given inputs first, and shows them on standard error unless `progress` says otherwise.

    The launcher is left open for further runs; Ctrl-C cancels what runs and returns.
    """
    return _Run(list(steps), store, launcher, plugins, host, retry, progress or progress_for(sys.stderr)).run()


class _Run:
    def __init__(
        self,
        steps: Sequence[PlannedStep],
        store: Store,
        launcher: Launcher,
        plugins: Registry,
        host: Host,
        retry: bool,
        progress: Progress,
    ) -> None:
        self.store, self.launcher, self.plugins = store, launcher, plugins
        self.host, self.retry, self.progress = host, retry, progress
        self.labels = {step.key: step.labels[0] for step in steps}
        self.waiting = {step.key: step for step in steps}
        self.total = len(steps)
        self.running: dict[str, Running] = {}
        self.attempts: dict[str, int] = {}
        """Attempts that are already used up, of steps that this run tried or will try."""
        self.told: set[str] = set()
        """What was noted already of waiting for other runs."""
        self.refused: dict[str, str] = {}
        """What hooks, requirements and the launcher said; empty where nothing speaks against a step."""
        self.written: set[str] = set()
        self.summary = Summary()
        self.prepared = False
        self.code = ""
        """`environment.code()` as JSON, from when the first step was to start."""
        self.drawn = 0.0

    def run(self) -> Summary:
        for key, status in self.store.done(list(self.waiting.values())).items():
            assert status.record is not None
            self._settle(key, outcome_of(status.record, self.store.finished(key)))
        self.progress.begin(self.total, len(self.summary.outcomes))
        try:
            # Those of the runner's own hooks are shown as they come.
            self._show_failures([each for each in self.plugins.failures if each.hook == "mambabench_environment"])
            while self.waiting or self.running:
                alone = any(running.step.needs.alone for running in self.running.values())
                moved = self._collect()
                if not alone:
                    moved |= self._launch()
                self._show(alone)
                if not moved:
                    time.sleep(POLL_ALONE_S if alone else POLL_S)
        except KeyboardInterrupt:
            self._cancel("Ctrl-C")
        except BaseException as error:
            self._cancel(f"the run stopped: {error}")
            raise
        finally:
            for running in self.running.values():
                running.claim.release()
            self.progress.close()
        return self.summary

    def _launch(self) -> bool:
        """Decides and starts what can be; returns whether anything changed."""
        moved = False
        taken: set[Needs] = set()
        for key, step in list(self.waiting.items()):
            inputs = [each for each in step.all_inputs if self._state(each) != "ok"]
            if any(each in self.waiting or each in self.running for each in inputs):
                continue
            kind = Needs(step.needs.gpus, step.needs.alone, light=step.needs.light)
            if kind in taken:
                continue
            claim = self.store.claim(key)
            if claim is None:
                self._tell("claims", f"{step.labels[0]} is done by another run of this store, which is waited for")
                continue
            try:
                if self._decided(step, inputs) or self._start(step, claim):
                    moved = True
                else:
                    taken.add(kind)
            finally:
                if key not in self.running:
                    claim.release()
        return moved

    def _decided(self, step: PlannedStep, failed_inputs: Sequence[str]) -> bool:
        """Settles a claimed step that need not or cannot run."""
        key = step.key
        self.store.complete(key)
        status = self.store.status(key)
        if status.state == "ok":
            assert status.record is not None
            self._end(step, outcome_of(status.record, self.store.finished(key)), final=True)
            return True
        # What it lacks itself says more than that something before it lacks the same.
        if failed_inputs and not step.obstacle:
            if all(self._state(each) == "unsupported" or each in self.summary.excused for each in failed_inputs):
                self.summary.excused.add(key)
            by = ", ".join(self.labels.get(each, each) for each in failed_inputs)
            self._write(step, Outcome(state="blocked", reason=f"needs {by}, which is {self._state(failed_inputs[0])}"))
            return True
        if reason := self._refusal(step):
            self._write(step, Outcome(state="unsupported", reason=reason))
            return True
        tried = status.record.get("attempt", 1) if status.record else 0
        if key in self.attempts and tried <= self.attempts[key]:
            return False
        used = 0
        if status.state not in ANEW and not self.retry and _otherwise(step, self.store):
            # How it is asked for now is written before there is a place for it, and for good if this run is stopped.
            self.store.forget(key)
            self.written.discard(key)
        elif status.state not in ANEW and not self.retry:
            assert status.record is not None
            outcome = outcome_of(status.record, self.store.partial(key))
            used = outcome.attempt
            if _spent(status):
                self._end(step, outcome, final=True)
                return True
        self.attempts[key] = used
        return False

    def _refusal(self, step: PlannedStep) -> str:
        if step.key not in self.refused:
            refusals = self._hook(lambda: self.plugins.refusals(step.view(), self.host))
            reasons = [refusal.reason for refusal in refusals]
            reasons += [step.obstacle] if step.obstacle else []
            self.refused[step.key] = "; ".join(reasons)
        return self.refused[step.key]

    def _start(self, step: PlannedStep, claim: Lock) -> bool:
        """Starts a child; False while the launcher has no place for it, or if it never will."""
        key = step.key
        if not self.prepared:
            self.prepared = True
            self.code = json.dumps(environment.code())
            modules = {plugin.module for plugin in self.plugins.plugins}
            modules |= {module for each in self.waiting.values() if not each.lacking for module in each.modules}
            # Local files are no importable modules; the child loads them itself.
            modules = {module for module in modules if not module.startswith(LOCAL)}
            self.progress.note("importing what the steps share, once")
            self.launcher.prepare([*PRELOADED, *modules])
        if key not in self.written:
            self.written.add(key)
            self.store.prepare(key, step.to_json())
        partial, leased, attempt = self.store.partial(key), time.time(), self.attempts[key] + 1
        env = {LEASED: repr(leased), ATTEMPT: str(attempt), CODE: self.code}
        command = child_command(self.store, key, self.plugins.files)
        try:
            handle = self.launcher.start(command, step.needs, env, partial / "log.txt")
        except Unsupported as error:
            self.refused[key] = str(error)
            return False
        if handle is None:
            if why := getattr(self.launcher, "waiting", ""):
                self._tell(key, f"{step.labels[0]} waits: {why}")
            return False
        self.attempts[key] = attempt
        self.running[key] = Running(
            step, handle, claim, attempt, leased, began=time.monotonic(), tail=Tail(partial / "events.jsonl")
        )
        del self.waiting[key]
        self.summary.ran.append(key)
        self.progress.started(key, step.labels[0], attempt)
        self._hook(lambda: self.plugins.started(step.view()))
        return True

    def _collect(self) -> bool:
        """Takes in the ends of children; ends those that are over their time."""
        moved = False
        for running in list(self.running.values()):
            limit = running.step.needs.timeout_s
            code = running.handle.poll()
            if code is None and not running.over and time.monotonic() - running.began > limit:
                running.over = True
                try:
                    running.handle.kill()
                except MambabenchError as error:
                    self.progress.note(f"{running.step.labels[0]} is over its time, but {error}")
                code = running.handle.poll()
            if code is not None and running.over:
                self._ended(running, self._outcome(running, "timeout", f"not done after {limit:g} s"))
            elif code is not None:
                why = getattr(running.handle, "why", "") or _crash(code)
                self._ended(running, self._outcome(running, "crashed", why))
            else:
                continue
            moved = True
        return moved

    def _outcome(self, running: Running, state: str, reason: str) -> Outcome:
        """What the child wrote at the end of this attempt, else the state that its end means; on disk either way."""
        key = running.step.key
        self.store.complete(key)
        status = self.store.status(key)
        if status.record is not None and (status.state == "ok" or status.record.get("started") == running.leased):
            return outcome_of(status.record, self.store.folder(key))
        if state == "crashed":
            reason += _last_line(self.store.partial(key) / "log.txt")
        wall = time.monotonic() - running.began
        outcome = Outcome(state=state, reason=reason, attempt=running.attempt, wall_s=round(wall, 4))
        self.store.fail(key, record_of(outcome, running.leased))
        return outcome

    def _ended(self, running: Running, outcome: Outcome) -> None:
        key = running.step.key
        del self.running[key]
        running.claim.release()
        again = outcome.state in AGAIN and outcome.attempt < ATTEMPTS
        if again:
            self.waiting[key] = running.step
        self._end(running.step, outcome, final=not again)

    def _write(self, step: PlannedStep, outcome: Outcome) -> None:
        """Records the outcome of a step that did not run."""
        self.store.prepare(step.key, step.to_json())
        self.store.fail(step.key, record_of(outcome, time.time()))
        self._end(step, outcome, final=True)

    def _end(self, step: PlannedStep, outcome: Outcome, *, final: bool) -> None:
        if final:
            self._settle(step.key, outcome)
        self.progress.finished(step.key, step.labels[0], outcome, final)
        self._hook(lambda: self.plugins.finished(step.view(), outcome))

    def _settle(self, key: str, outcome: Outcome) -> None:
        self.summary.outcomes[key] = outcome
        self.waiting.pop(key, None)

    def _state(self, key: str) -> str:
        if key in self.summary.outcomes:
            return self.summary.outcomes[key].state
        return "waiting" if key in self.waiting or key in self.running else self.store.state(key)

    def _cancel(self, why: str) -> None:
        self.summary.stopped = True
        for running in self.running.values():
            running.handle.kill()
        for running in list(self.running.values()):
            outcome = self._outcome(running, "cancelled", why)
            del self.running[running.step.key]
            running.claim.release()
            self._end(running.step, outcome, final=True)
        self.summary.unreached = len(self.waiting)

    def _hook(self, call: Callable[[], T]) -> T:
        """Calls plug-ins; what fails there is kept in the registry and shown, and stops nothing."""
        known = len(self.plugins.failures)
        answer = call()
        self._show_failures(self.plugins.failures[known:])
        return answer

    def _show_failures(self, failures: Iterable[HookFailure]) -> None:
        for failure in failures:
            self.progress.note(f"plug-in {failure.plugin}: {failure.hook} failed: {failure.error}")

    def _tell(self, what: str, text: str) -> None:
        """Notes something once."""
        if what not in self.told:
            self.told.add(what)
            self.progress.note(text)

    def _show(self, alone: bool) -> None:
        pause = REDRAW_ALONE_S if alone else REDRAW_S
        if not self.progress.live or time.monotonic() - self.drawn < pause:
            return
        self.drawn = time.monotonic()
        for key, running in self.running.items():
            if latest := running.tail.latest():
                self.progress.moved(key, *latest)
        self.progress.tick()


def child_command(store: Store, key: str, plugins: Sequence[Path]) -> list[str]:
    """The command that runs one step, for a launcher or by hand."""
    files = [word for file in plugins for word in ("--plugin", str(file.resolve()))]
    return [sys.executable, "-P", "-m", CHILD, str(store.path.resolve()), key, *files]


def record_of(outcome: Outcome, started: float) -> Mapping[str, Any]:
    """An outcome.json for an attempt that could not write its own."""
    return {
        "state": outcome.state,
        "reason": outcome.reason,
        "attempt": outcome.attempt,
        "started": started,
        "wall_s": outcome.wall_s,
        "detail": dict(outcome.detail),
        "facts": [],
        "environment": {},
    }


def _crash(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without an outcome"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (", perhaps for lack of memory" if -code == signal.SIGKILL else "")


def _last_line(log: Path, most: int = 4096) -> str:
    """The end of a log, as a part of a reason."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f"; the log ends with: {lines[-1].strip()[:300]}" if lines else ""
