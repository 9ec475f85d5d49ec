"""Broken on purpose: the target of its component does not exist."""

from dataclasses import dataclass

from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="absent", target="mambabench_missing_target:Absent", config=Options)]
