"""Finds, loads and checks plug-ins, so that one broken plug-in never stops the rest.

Every plug-in, the built-in ones included, comes in through the entry-point group `mambabench` or as a local file
(`--plugin FILE.py`). Loading is a loop of our own over the entry points: import, register, check hooks, collect and
validate components; whatever fails leaves a `Broken` record and nothing else.

Environment: `MAMBABENCH_PLUGINS` (`off`, or a comma-separated list of the distributions to load),
`MAMBABENCH_PLUGINS_BLOCK` (distributions not to load), `MAMBABENCH_PLUGINS_STRICT=1` (a broken plug-in is an error).
The built-ins are always loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pluggy

from .hooks import PROJECT, Hooks
from .interfaces import (
    API,
    KINDS,
    VERDICTS,
    Choice,
    Comparison,
    Component,
    Decoder,
    Host,
    MambabenchError,
    Outcome,
    Refusal,
    StepView,
    Verdict,
)

BUILTIN = "builtin:"
"""Before the name of a source's part, or of a teacher, that comes with a plug-in."""
MOST = 20
"""Names that an error line has at most."""
LOCAL = "mambabench_local_"
"""How the modules of local files begin; inside of one, a target is `f"{__name__}:factory"`."""

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A plug-in that loaded."""

    distribution: str
    version: str
    entry_point: str
    module: str
    seconds: float
    imported_torch: bool
    components: tuple[Component, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A plug-in that did not load: in which phase, and why."""

    distribution: str
    version: str
    entry_point: str
    phase: str
    """`import`, `register`, `components`, `api`, `validate` or `clash`."""
    error: str
    traceback: str

    def may_bring(self, name: str) -> bool:
        """Whether the plug-in's code names a component so; what did not load cannot be asked."""
        try:
            files = [file for file in importlib.metadata.files(self.distribution) or () if file.suffix == ".py"]
            texts = [file.read_text(encoding="utf-8") for file in files]
        except (importlib.metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
            return True
        return not texts or any(f"{quote}{name}{quote}" in text for text in texts for quote in "\"'")


@dataclass(frozen=True, slots=True)
class HookFailure:
    """An exception in a plug-in's hook; recorded, never raised."""

    hook: str
    plugin: str
    error: str


@dataclass(slots=True)
class Registry:
    """The plug-ins of this process, and one typed method per hook."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    clashes: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    failures: list[HookFailure] = field(default_factory=list)
    files: tuple[Path, ...] = ()
    _components: dict[tuple[str, str], tuple[Component, str]] = field(default_factory=dict)

    def components(self, kind: str) -> dict[str, Component]:
        """The components of a kind by name, in the order of loading."""
        return {name: component for (of, name), (component, _) in self._components.items() if of == kind}

    def owner(self, component: Component) -> str:
        """The distribution that brings a component."""
        return self._components[component.kind, component.name][1]

    def find(self, kind: str, name: str) -> Component:
        """Looks a component up. Raises MambabenchError with a suggestion, or with a broken plug-in's traceback."""
        if (kind, name) in self.clashes:
            one, two = self.clashes[kind, name]
            raise MambabenchError(
                f"two plug-ins bring a {kind} named {name!r}: {one} and {two}; "
                "uninstall one or name it in MAMBABENCH_PLUGINS_BLOCK"
            )
        if (kind, name) in self._components:
            return self._components[kind, name][0]
        known = list(self.components(kind))
        message = f"unknown {kind} {name!r}{suggest(name, known)}"
        suspects = [broken for broken in self.broken if broken.may_bring(name)]
        if suspects:
            message += "; it may belong to a broken plug-in:\n" + "\n".join(
                f"{b.distribution} {b.version}, {b.entry_point}, failed to load ({b.phase}):\n{b.traceback.rstrip()}"
                for b in suspects
            )
        raise MambabenchError(message)

    def refusals(self, step: StepView, host: Host) -> list[Refusal]:
        return self._call("mambabench_refuse", _check_refusal, step=step, host=host)

    def started(self, step: StepView) -> None:
        self._call("mambabench_step_started", step=step)

    def finished(self, step: StepView, outcome: Outcome) -> None:
        self._call("mambabench_step_finished", step=step, outcome=outcome)

    def environment(self) -> dict[str, str]:
        facts: dict[str, str] = {}
        for answer in self._call("mambabench_environment"):
            facts.update({str(key): str(value) for key, value in dict(answer or {}).items()})
        return facts

    def verdicts(self, comparison: Comparison) -> list[Verdict]:
        """What plug-ins say of a comparison. A hook that fails leaves it undecided: it may have meant to object."""
        known = len(self.failures)
        answers = self._call("mambabench_verdict", _check_verdict, comparison=comparison)
        failed = [
            Verdict("inconclusive", f"{failure.hook} of plug-in {failure.plugin} failed: {failure.error}")
            for failure in self.failures[known:]
        ]
        return [*answers, *failed]

    def _call(self, hook: str, check: Callable[[Any], None] | None = None, **arguments: Any) -> list[Any]:
        """Calls each implementation by itself: an exception in one is recorded and the others still answer.

        `check` raises for an answer that is none, which counts as an exception of the hook.
        """
        answers = []
        plugins = self.manager.get_plugins()
        for plugin in plugins:
            caller = self.manager.subset_hook_caller(hook, remove_plugins=plugins - {plugin})
            try:
                given = caller(**arguments)
                if check is not None:
                    for answer in given:
                        check(answer)
                answers += given
            except (Exception, SystemExit) as error:
                self.failures.append(
                    HookFailure(hook, self.manager.get_name(plugin) or "?", f"{type(error).__name__}: {error}")
                )
        return answers


def _check_refusal(answer: Any) -> None:
    if not isinstance(answer, Refusal):
        raise TypeError(f"the answer must be a Refusal or None, is {answer!r}")


def _check_verdict(answer: Any) -> None:
    if not isinstance(answer, Verdict):
        raise TypeError(f"the answer must be a Verdict or None, is {answer!r}")
    if answer.verdict not in VERDICTS:
        raise ValueError(f"unknown verdict {answer.verdict!r}{suggest(str(answer.verdict), VERDICTS)}")
    if not isinstance(answer.reason, str):
        raise TypeError(f"the reason must be text, is {answer.reason!r}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known name, or those that hold what was said, or all, up to `MOST`.

    >>> suggest("half", ["half/plain/speed", "teacher/plain/speed"])
    '; known: half/plain/speed'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    known = [each for each in known if name in each] or known
    more = f" and {len(known) - MOST} more" if len(known) > MOST else ""
    return f"; known: {', '.join(known[:MOST])}{more}" if known else ""


_registries: dict[tuple[Path, ...], Registry] = {}
_current: list[Registry] = []


def registry(files: Sequence[Path] | None = None) -> Registry:
    """The registry of this process. `files` are local plug-ins; without it, the registry that was loaded last.

    Raises MambabenchError for a local file that is absent, and for any broken plug-in in strict mode.
    """
    if files is None:
        if _current:
            return _current[0]
        files = ()
    wanted = tuple(Path(file).resolve() for file in files)
    if wanted not in _registries:
        _registries[wanted] = load(wanted)
    _current[:] = [_registries[wanted]]
    return _registries[wanted]


def load(files: Sequence[Path] = ()) -> Registry:
    """Loads all plug-ins anew."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    loaded = Registry(manager, files=tuple(files))
    for entry_point in sorted(
        importlib.metadata.entry_points(group=PROJECT), key=lambda e: (_distribution(e)[0] != PROJECT, e.value)
    ):
        distribution, version = _distribution(entry_point)
        if distribution == PROJECT or _allowed(distribution):
            _load_one(loaded, distribution, version, entry_point.name, lambda e=entry_point: e.load())
    for file in files:
        if not file.is_file():
            raise MambabenchError(f"--plugin {file}: no such file")
        _load_one(loaded, file.name, "local file", file.stem, lambda f=file: _import_file(f))
    if loaded.broken and os.environ.get("MAMBABENCH_PLUGINS_STRICT") == "1":
        first = loaded.broken[0]
        raise MambabenchError(
            f"plug-in {first.distribution} {first.version} ({first.entry_point}) is broken ({first.phase}): "
            f"{first.error}\n{first.traceback.rstrip()}"
        )
    return loaded


def make(component: Component, config: Any = None) -> Any:
    """Imports a component's target and calls it with a config (default: the config's defaults)."""
    module, _, name = component.target.partition(":")
    factory = getattr(importlib.import_module(module), name)
    return factory(component.config() if config is None else config)


def shipped_teacher(name: str, registry: Registry) -> Path:
    """The folder of a teacher that comes with a plug-in. Raises `MambabenchError` where there is none."""
    teacher = registry.find("teacher", name)
    try:
        return Path(make(teacher))
    except Exception as error:  # A plug-in's code may raise anything.
        why = f"gives no folder of the teacher {name!r}: {type(error).__name__}: {error}"
        raise MambabenchError(f"the plug-in {registry.owner(teacher)} {why}") from None


def build(choice: Choice) -> Any:
    """Makes the object that a plan chose, through this process's registry."""
    return make(registry().find(choice.kind, choice.name), choice.config)


LOOK = 8
"""Rounds that the host reads at once where only the whole text counts."""


def decoder_or_plain(decoder: Decoder | None, device: str) -> Decoder:
    """A decoder, or plain decoding where none was chosen; a GPU does not wait for the host after each token then."""
    if decoder is not None:
        return decoder
    standard = registry().find("decoder", "standard")
    plain: Decoder = make(standard, standard.config(look=1 if device == "cpu" else LOOK))
    return plain


def missing(requires: Iterable[str]) -> list[str]:
    """The requirements that the installed packages do not meet, from metadata alone."""
    from packaging.requirements import Requirement

    lacking = []
    for text in requires:
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{text} (not installed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{text} ({version} is installed)")
    return lacking


def _distribution(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    dist = entry_point.dist
    return (dist.metadata["Name"], dist.version) if dist else ("?", "?")


def _allowed(distribution: str) -> bool:
    def names(variable: str) -> set[str]:
        return {_normal(name) for name in os.environ.get(variable, "").split(",") if name.strip()}

    allow, block = names("MAMBABENCH_PLUGINS"), names("MAMBABENCH_PLUGINS_BLOCK")
    if "off" in allow or _normal(distribution) in block:
        return False
    return not allow or _normal(distribution) in allow


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _import_file(file: Path) -> Any:
    name = f"{LOCAL}{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}_{zlib.crc32(str(file).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_one(loaded: Registry, distribution: str, version: str, entry_point: str, importer: Any) -> None:
    began, had_torch = time.perf_counter(), "torch" in sys.modules
    phase, plugin = "import", None
    try:
        plugin = importer()
        phase = "register"
        loaded.manager.register(plugin, name=f"{distribution}:{entry_point}")
        loaded.manager.check_pending()
        phase = "components"
        others = loaded.manager.get_plugins() - {plugin}
        caller = loaded.manager.subset_hook_caller("mambabench_components", remove_plugins=others)
        components = tuple(component for answer in caller() for component in answer)
        phase = "api"
        for component in components:
            if isinstance(component, Component) and component.api != API:
                raise ValueError(f"{component.kind} {component.name!r} speaks API {component.api}, this is API {API}")
        phase = "validate"
        for component in components:
            _validate(component)
        phase = "clash"
        _check_clashes(loaded, distribution, components)
    except (Exception, SystemExit) as error:
        if plugin is not None and loaded.manager.is_registered(plugin):
            loaded.manager.unregister(plugin)
        loaded.broken.append(
            Broken(
                distribution=distribution,
                version=version,
                entry_point=entry_point,
                phase=phase,
                error=f"{type(error).__name__}: {error}".splitlines()[0],
                traceback=traceback.format_exc(),
            )
        )
        return
    for component in components:
        loaded._components[component.kind, component.name] = (component, distribution)
    loaded.plugins.append(
        Plugin(
            distribution=distribution,
            version=version,
            entry_point=entry_point,
            module=getattr(plugin, "__name__", type(plugin).__name__),
            seconds=time.perf_counter() - began,
            imported_torch="torch" in sys.modules and not had_torch,
            components=components,
        )
    )


def _validate(component: Any) -> None:
    if not isinstance(component, Component):
        raise TypeError(f"mambabench_components must give Component objects, got {component!r}")
    if component.kind not in KINDS:
        raise ValueError(
            f"component {component.name!r} has the unknown kind {component.kind!r}; known: {', '.join(KINDS)}"
        )
    if not _TARGET.fullmatch(component.target):
        raise ValueError(
            f'target of {component.kind} {component.name!r} must be "package.module:factory", is {component.target!r}'
        )
    frozen = getattr(getattr(component.config, "__dataclass_params__", None), "frozen", False)
    if not dataclasses.is_dataclass(component.config) or not frozen:
        raise TypeError(
            f"config of {component.kind} {component.name!r} must be a frozen dataclass, is {component.config!r}"
        )
    needs = component.traits & {"score", "generate", "pair"}
    if component.kind == "suite" and len(needs) != 1:
        raise ValueError(
            f"suite {component.name!r} needs exactly one of the traits score, generate, pair; has {sorted(needs)}"
        )


def _check_clashes(loaded: Registry, distribution: str, components: Sequence[Component]) -> None:
    seen: dict[tuple[str, str], str] = {key: owner for key, (_, owner) in loaded._components.items()}
    for component in components:
        key = (component.kind, component.name)
        if key in seen:
            loaded.clashes[key] = (seen[key], distribution)
            raise ValueError(f"{component.kind} {component.name!r} is brought by both {seen[key]} and {distribution}")
        seen[key] = distribution


def describe(loaded: Registry) -> list[Mapping[str, Any]]:
    """The plug-ins that loaded, as they are stored with a run."""
    return [
        {"distribution": p.distribution, "version": p.version, "entry_point": p.entry_point, "module": p.module}
        for p in loaded.plugins
    ]
