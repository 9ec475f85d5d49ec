"""Broken on purpose: it brings a decoder with the name of a built-in one."""

from dataclasses import dataclass

from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="standard", target="json:loads", config=Options)]
