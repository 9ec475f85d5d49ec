"""Expands a plan into steps and cells.

A step is one thing that runs: it makes data, selects layers, converts, trains, measures, has a model answer questions,
or judges stored answers. Its key is a hash of all that decides its result; equal steps of several models are one step
with several labels. A cell is one label with its key, as reports and comparisons see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import ConfigError, filled, nested, plain, references, unfit
from .interfaces import DTYPES, Choice, MambabenchError, Needs, StepView
from .keys import PACKAGE, Fingerprints, digest
from .plan import Model, Plan
from .plugins import Registry, missing, suggest
from .store import inputs_of

SCHEMA = 1
TEACHER = "teacher"
NO_DECODER = "-"
SCORING = tuple(f"{PACKAGE}.harness.{name}" for name in ("documents", "metrics"))
RUNNING, ANSWERING = (*SCORING, f"{PACKAGE}.kernels"), f"{PACKAGE}.harness.answering"
CODE = {"measure": RUNNING, "answer": (*RUNNING, ANSWERING), "judge": (*SCORING, ANSWERING)}
"""Kinds of steps whose keys know the code, and what of it they may go through beside the rooms of their components."""


@dataclass(slots=True, kw_only=True)
class Step:
    """One thing that runs. `record` is what the child reads from step.json, key and labels apart."""

    key: str
    kind: str
    labels: tuple[str, ...]
    needs: Needs
    record: Mapping[str, Any]
    modules: frozenset[str]
    """Modules of the components that the child will use, to be imported once before it is forked."""
    lacking: tuple[str, ...] = ()
    """Requirements of its components that the installed packages do not meet."""
    absent: tuple[str, ...] = ()
    """What is missing of its files."""
    wants: tuple[str, ...] = ()
    """What its components lack on this machine and may need."""

    @property
    def obstacle(self) -> str:
        """Why it cannot run here; empty where it can."""
        needs = [f"needs {', '.join(self.lacking)}"] if self.lacking else []
        return "; ".join([*needs, *self.absent])

    @property
    def inputs(self) -> dict[str, str]:
        """Role -> key of the step whose artifact plays it."""
        return dict(self.record["inputs"])

    @property
    def all_inputs(self) -> frozenset[str]:
        """Keys of all steps that must be done before."""
        return inputs_of(self.record)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "key": self.key,
            "kind": self.kind,
            "labels": list(self.labels),
            **self.record,
            "needs": asdict(self.needs),
        }

    def view(self) -> StepView:
        """What hooks see."""
        component = self.record["component"]
        return StepView(
            key=self.key,
            kind=self.kind,
            labels=self.labels,
            component=f"{component['kind']}:{component['name']}",
            needs=self.needs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One label of a plan; `why` is the reason where the plan skips it."""

    label: str
    key: str
    kind: str
    model: str = ""
    decoder: str = ""
    suite: str = ""
    stage: str = ""
    seed: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A model at some point of its chain."""

    key: str
    backend: Choice


@dataclass(slots=True)
class Steps:
    """The steps of a plan, inputs before what needs them."""

    steps: dict[str, Step] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps.values())

    def only(self, *patterns: str) -> Steps:
        """The steps with a label that one of the patterns matches, and all that they need."""
        wanted: set[str] = set()
        queue: list[str] = []
        for pattern in patterns:
            found = [step.key for step in self if any(matches(label, pattern) for label in step.labels)]
            if not found:
                raise MambabenchError(f"--only {pattern}: no step has such a label; `mambabench plan` lists them")
            queue += found
        while queue:
            key = queue.pop()
            if key not in wanted:
                wanted.add(key)
                queue += self.steps[key].all_inputs
        return Steps({key: step for key, step in self.steps.items() if key in wanted}, self.cells)


def matches(label: str, pattern: str) -> bool:
    """Whether a glob fits a label, with or without its seed."""
    return fnmatchcase(label, pattern) or fnmatchcase(label.partition("@")[0], pattern)


def expand(
    plan: Plan, registry: Registry, fingerprints: Fingerprints, machine: Mapping[str, str], gpus: int = 0
) -> Steps:
    """All steps of a plan. `machine` holds the facts that speed depends on; `gpus` is what a step may take.

    Raises MambabenchError, in one line with file and key, where names do not fit together.
    """
    try:
        return _Expander(plan, registry, fingerprints, machine, gpus).run()
    except ConfigError as error:
        raise MambabenchError(f"{plan.file}: {error}") from None


class _Expander:
    def __init__(
        self, plan: Plan, registry: Registry, fingerprints: Fingerprints, machine: Mapping[str, str], gpus: int
    ) -> None:
        self.plan, self.registry, self.fingerprints = plan, registry, fingerprints
        self.machine, self.gpus = dict(machine), gpus
        self.out = Steps()
        self.teacher: Made | None = None
        self.chains: dict[tuple[str, int], Made] = {}
        self.open_data: list[str] = []
        self.open_models: list[str] = []
        self.skipped: set[int] = set()

    def run(self) -> Steps:
        self.teacher = self._teacher()
        for name in self.plan.models:
            for seed in self.plan.seeds:
                self._chain(name, seed)
        for name, seeds in [(TEACHER, self.plan.seeds[:1]), *((m, self.plan.seeds) for m in self.plan.models)]:
            for seed in seeds:
                for suite in self.plan.suites:
                    self._measures(name, seed, suite)
        for index, skip in enumerate(self.plan.skip):
            if index not in self.skipped:
                raise ConfigError(f"skip.{index}.steps", f"{skip.steps!r} fits no label of a measuring step")
        return self.out

    def _teacher(self) -> Made:
        spec, seed = self.plan.teacher, self.plan.seeds[0]
        made: Made | None = None
        if spec.path is not None:
            cell = Cell(label=f"{TEACHER}/convert", key="", kind="convert", model=TEACHER)
            made = self._folder(spec.path, spec.backend, cell)
        for stage in spec.train:
            made = self._train(TEACHER, stage, seed, made, spec.backend)
        assert made is not None, "the plan reader asks for a path or stages"
        return made

    def _chain(self, name: str, seed: int) -> Made:
        if (name, seed) in self.chains:
            return self.chains[name, seed]
        if name in self.open_models:
            raise ConfigError(f"models.{name}", f"a circle of models: {' -> '.join([*self.open_models, name])}")
        self.open_models.append(name)
        model: Model = self.plan.models[name]
        made: Made | None = None
        if model.path:
            cell = Cell(label=f"{name}/convert@seed{seed}", key="", kind="convert", model=name, seed=seed)
            made = self._folder(model.path, model.backend, cell)
        elif model.selector:
            made = self._converted(name, seed, model)
        for stage in model.train:
            made = self._train(name, stage, seed, made, model.backend)
        self.open_models.pop()
        assert made is not None, "the plan reader asks for what a model is made of"
        self.chains[name, seed] = made
        return made

    def _folder(self, path: str, backend: Choice, cell: Cell) -> Made:
        """A model that is a folder of weights: the same for every seed."""
        salt = {"folder": self.fingerprints.path(Path(path))}
        return Made(self._add("convert", backend, cell, backend=backend, extra={"path": path}, salt=salt), backend)

    def _converted(self, name: str, seed: int, model: Model) -> Made:
        """A model made of another one, by a selection of its layers."""
        assert self.teacher is not None
        assert model.selector is not None
        parent = self._chain(model.start, seed) if model.start else self.teacher
        where = f"models.{name}"
        selection = self._add(
            "select",
            model.selector,
            Cell(label=f"{name}/select@seed{seed}", key="", kind="select", model=name, seed=seed),
            backend=parent.backend,
            inputs={"parent": parent.key, "teacher": self.teacher.key},
            where=f"{where}.keep",
        )
        key = self._add(
            "convert",
            model.backend,
            Cell(label=f"{name}/convert@seed{seed}", key="", kind="convert", model=name, seed=seed),
            backend=model.backend,
            inputs={"parent": parent.key, "selection": selection},
            seed=seed,
        )
        return Made(key, model.backend)

    def _train(self, name: str, stage: str, seed: int, parent: Made | None, backend: Choice) -> Made:
        start = None if name == TEACHER else self.plan.models[name].start
        choice = filled(self.plan.stages[stage], {"model": name, "start": start or TEACHER})
        if parent is None and "from-scratch" not in self.registry.find("distiller", choice.name).traits:
            raise ConfigError(f"stages.{stage}.use", f"{choice.name!r} trains a given model; the teacher has no `path`")
        inputs = {"parent": parent.key} if parent else {}
        if self.teacher and parent:
            inputs["teacher"] = self.teacher.key
        key = self._add(
            "train",
            choice,
            Cell(label=f"{name}/{stage}@seed{seed}", key="", kind="train", model=name, stage=stage, seed=seed),
            backend=backend,
            inputs=inputs,
            seed=seed,
            where=f"stages.{stage}",
        )
        return Made(key, backend)

    def _data(self, name: str, where: str) -> dict[str, Any]:
        """What a DataRef resolves to, for step.json: a step's key, or a file with its fingerprint."""
        if name not in self.plan.data:
            raise ConfigError(where, f"unknown data {name!r}{suggest(name, self.plan.data)}")
        entry = self.plan.data[name]
        if entry.file is not None:
            return {"file": str(entry.file), "fingerprint": self.fingerprints.path(entry.file)}
        assert entry.source is not None
        if name in self.open_data:
            raise ConfigError(where, f"a circle of data: {' -> '.join([*self.open_data, name])}")
        self.open_data.append(name)
        inputs, backend = {}, None
        if "teacher" in self.registry.find("source", entry.source.name).traits:
            if self.teacher is None:
                raise ConfigError(
                    f"data.{name}", f"{entry.source.name!r} needs the teacher, which is made from this data"
                )
            inputs, backend = {"teacher": self.teacher.key}, self.teacher.backend
        key = self._add(
            "data",
            entry.source,
            Cell(label=f"data/{name}", key="", kind="data"),
            backend=backend,
            inputs=inputs,
            where=f"data.{name}",
        )
        self.open_data.pop()
        return {"step": key}

    def _file(self, name: str, where: str, kind: str) -> dict[str, Any]:
        """A FileRef, for step.json: an entry of `[data]` or what is inside its folder, or else a file or folder. What a
        suite needs may be missing: the rest of the plan runs without it."""
        head, _, inside = name.partition("/")
        entry = self.plan.data.get(head)
        if entry and entry.source:
            found = self._data(head, where)
            return {**found, "inside": inside.lstrip("/")} if inside else found
        file = (self.plan.file.parent / Path(name).expanduser()).resolve()
        if entry and entry.file:
            file = entry.file / inside.lstrip("/")
        if file.exists():
            return {"file": str(file), "fingerprint": self.fingerprints.path(file)}
        why = f"there is no file {file}" + ("" if "/" in name or file.suffix else f", and no data {name!r}")
        if kind not in CODE:
            raise ConfigError(where, why)
        return {"file": str(file), "fingerprint": "", "absent": f"{where}: {why}"}

    def _model(self, name: str, where: str, seed: int) -> Made:
        if self.teacher is None:
            raise ConfigError(
                where, f"{name!r} is not there yet: this makes the teacher, from which all models are made"
            )
        if name != TEACHER and name not in self.plan.models:
            raise ConfigError(where, f"unknown model {name!r}{suggest(name, [TEACHER, *self.plan.models])}")
        return self.teacher if name == TEACHER else self._chain(name, seed)

    def _measures(self, model: str, seed: int, suite: str) -> None:
        choice = self.plan.suites[suite]
        traits = self.registry.find("suite", choice.name).traits
        decoders = list(self.plan.decoders)
        if "score" in traits:
            self._measure(model, seed, suite, NO_DECODER, None)
            return
        if not decoders:
            raise ConfigError("decoders", f"the suite {suite!r} needs a decoder and the plan has none")
        first = decoders[0]
        if "generate" in traits:
            for name, of in self.plan.decoders.items():
                if name == first or "lossless" not in self.registry.find("decoder", of.name).traits:
                    self._measure(model, seed, suite, name, None)
            return
        made = self.teacher if model == TEACHER else self.chains[model, seed]
        own = made is not None and "generate" in self.registry.find("backend", made.backend.name).traits
        # A model with a loop of its own cannot be the reference of decoders that it does not run.
        for name in ([first] if own or len(decoders) == 1 else []) + decoders[1:]:
            self._measure(model, seed, suite, name, first if name != first else None)

    def _measure(self, model: str, seed: int, suite: str, decoder: str, reference: str | None) -> None:
        assert self.teacher is not None
        choice = filled(self.plan.suites[suite], {"model": model})
        traits = self.registry.find("suite", choice.name).traits
        made = self.teacher if model == TEACHER else self.chains[model, seed]
        cell = Cell(
            label=f"{model}/{decoder}/{suite}@seed{seed}",
            key="",
            kind="measure",
            model=model,
            decoder="" if decoder == NO_DECODER else decoder,
            suite=suite,
            seed=seed,
        )
        for index, skip in enumerate(self.plan.skip):
            if matches(cell.label, skip.steps):
                self.skipped.add(index)
                self.out.cells.append(replace(cell, why=skip.why))
                return
        used: dict[str, tuple[str, Choice]] = {}
        extra: dict[str, Any] = {"decoder": None, "reference": None}
        for role, name in (("decoder", decoder), ("reference", reference)):
            if name is not None and name != NO_DECODER:
                of = filled(self.plan.decoders[name], {"model": model})
                used[role] = (f"decoders.{name}", of)
                extra[role] = {"plan_name": name, **self._record(of)}
        device = "cuda" if self.gpus else "cpu"
        salt: dict[str, Any] = {"device": device, "dtype": DTYPES[device]}
        ran: dict[str, Any] = {"backend": made.backend, "inputs": {"subject": made.key}, "used": used, "extra": extra}
        if callable(questions := getattr(choice.config, "questions", None)):
            asked = questions()
            where, inputs = f"suites.{suite}", {}
            if asked is not None:
                answering = replace(cell, label=f"{model}/{decoder}/{suite}/answer@seed{seed}", kind="answer")
                inputs["answers"] = self._add("answer", asked, answering, where=where, salt=salt, **ran)
                extra = {**extra, "subject": made.key}
            # Recorded answers are chosen by the model's name, and are not those of this plan's weights.
            salt, cell = {} if asked else {"model": model}, replace(cell, kind="judge")
            self._add("judge", choice, cell, inputs=inputs, where=where, extra=extra, salt=salt)
            return
        if "alone" in traits:
            salt["machine"] = self.machine
        self._add("measure", choice, cell, where=f"suites.{suite}", salt=salt, alone="alone" in traits, **ran)

    def _add(
        self,
        kind: str,
        choice: Choice,
        cell: Cell,
        *,
        backend: Choice | None = None,
        inputs: Mapping[str, str] | None = None,
        seed: int = 0,
        where: str = "",
        used: Mapping[str, tuple[str, Choice]] | None = None,
        extra: Mapping[str, Any] | None = None,
        salt: Mapping[str, Any] | None = None,
        alone: bool = False,
    ) -> str:
        """Adds a step and its cell; returns the key.

        `where` is the component's place in the plan; `used` are further components, by role, with their places;
        `extra` goes into the record only, `salt` into the key only.
        """
        roles = {"component": (where, choice), **(used or {})}
        data: dict[str, Any] = {}
        models: dict[str, Any] = {}
        chosen = [component for _, component in roles.values()]
        parts = [*chosen, *nested(chosen), *([backend] if backend else [])]
        decides: dict[str, Any] = {"kind": kind, "seed": seed, "inputs": dict(inputs or {}), **(salt or {})}
        for role, (place, component) in roles.items():
            marks: dict[str, list[str]] = {}
            for path, section, name in references(component.config):
                at = f"{place}.{path}" if place else path
                if section == "data":
                    found = data[name] = self._data(name, at)
                elif section == "files":
                    found = data[name] = self._file(name, at, kind)
                else:
                    made = self._model(name, at, cell.seed or 0)
                    found = models[name] = {"step": made.key, "backend": self._record(made.backend)}
                    parts.append(made.backend)
                mark = "/".join(found[part] for part in ("step", "inside") if part in found)
                marks.setdefault(path, []).append(mark or found["fingerprint"] or found["absent"])
            resolved = {path: found[0] if len(found) == 1 else found for path, found in marks.items()}
            decides[role] = self._decides(component, resolved)
        if backend is not None:
            decides["backend"] = self._decides(backend, {})
        modules = frozenset(self._module(part) for part in parts)
        traits = self.registry.find(choice.kind, choice.name).traits
        if kind in CODE:
            decides["code"] = self.fingerprints.code([*modules, *CODE[kind]])
        if kind == "answer":
            # The same question has the same answer, whoever asks it.
            others = [self._module(part) for part in parts if part is not choice]
            code = self.fingerprints.code([*others, *CODE[kind]])
            extra = {**(extra or {}), "answers": digest({**decides, "component": "", "code": code})}
        key = digest(decides)
        if all(known.label != cell.label for known in self.out.cells):
            self.out.cells.append(replace(cell, key=key))
        if key in self.out.steps:
            step = self.out.steps[key]
            step.labels = (*step.labels, cell.label) if cell.label not in step.labels else step.labels
            return key
        record = {
            "seed": seed,
            "model": cell.model,
            "component": self._record(choice),
            "backend": self._record(backend) if backend else None,
            "inputs": dict(inputs or {}),
            "data": data,
            "models": models,
            **(extra or {}),
        }
        lacking = [text for part in parts for text in missing(self.registry.find(part.kind, part.name).requires)]
        lacks = [getattr(part.config, "lacks", None) for part in parts]
        # Not part of the key: a stage gives the same result, up to rounding, however many train it.
        ranks = self.plan.limits.train_gpus if kind == "train" and "ranks" in traits else 1
        self.out.steps[key] = Step(
            key=key,
            kind=kind,
            labels=(cell.label,),
            needs=Needs(
                gpus=0 if kind == "judge" or (kind == "select" and "gpu" not in traits) else self.gpus * ranks,
                alone=alone,
                timeout_s=self.plan.limits.timeout,
                ranks=ranks,
                checkpoint_s=self.plan.limits.checkpoint,
                light=kind == "judge",
            ),
            record=record,
            modules=modules,
            lacking=tuple(dict.fromkeys(lacking)),
            absent=(*(found["absent"] for found in data.values() if "absent" in found), *unfit(roles, data)),
            wants=tuple(text for of in lacks if callable(of) and (text := of())),
        )
        return key

    def _record(self, choice: Choice) -> dict[str, Any]:
        revision = self.registry.find(choice.kind, choice.name).revision
        return {"kind": choice.kind, "name": choice.name, "revision": revision, "config": plain(choice.config)}

    def _decides(self, choice: Choice, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """What of a component goes into a key; revisions of nested components count too."""
        inner = [[part.kind, part.name, self.registry.find(part.kind, part.name).revision] for part in nested([choice])]
        record = {**self._record(choice), "config": plain(choice.config, defaults=False, replace=resolved)}
        outside = getattr(choice.config, "fingerprint", None)
        if outside is not None and (mark := outside()):
            record["fingerprint"] = mark
        return {**record, "nested": inner} if inner else record

    def _module(self, choice: Choice) -> str:
        return self.registry.find(choice.kind, choice.name).target.partition(":")[0]
