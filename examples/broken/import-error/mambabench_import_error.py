"""Broken on purpose: its import fails."""

from dataclasses import dataclass

import a_module_that_nobody_has  # noqa: F401
from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="unreachable", target="json:loads", config=Options)]
