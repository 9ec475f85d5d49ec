"""The hooks of the plug-in core, for pluggy. The project name and the entry-point group are both `mambabench`.

No hook is `firstresult`: behaviour must not depend on the order of installation. An exception in a hook is recorded and
never stops a run. All hooks run in the parent process, which imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pluggy

from .interfaces import Comparison, Component, Host, Outcome, Refusal, StepView, Verdict

PROJECT = "mambabench"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Specifications only."""

    @hookspec
    def mambabench_components(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """The components that a plug-in brings. Must be cheap: descriptions, no imports of what they describe."""

    @hookspec
    def mambabench_refuse(self, step: StepView, host: Host) -> Refusal | None:
        """Any refusal makes the step *unsupported*, with its reason."""

    @hookspec
    def mambabench_step_started(self, step: StepView) -> None:
        """Called when a step's child starts."""

    @hookspec
    def mambabench_step_finished(self, step: StepView, outcome: Outcome) -> None:
        """Called when an attempt at a step ended, in whatever state."""

    @hookspec
    def mambabench_environment(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """More facts for the environment of a run; they cannot overwrite the harness's own."""

    @hookspec
    def mambabench_verdict(self, comparison: Comparison) -> Verdict | None:
        """May make the verdict of a comparison stricter, never milder."""
