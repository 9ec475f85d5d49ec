"""Broken on purpose: the target of its component is no `package.module:factory`."""

from dataclasses import dataclass

from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="malformed", target="a decoder, somewhere", config=Options)]
