"""Broken on purpose: it speaks an API of the future."""

from dataclasses import dataclass

from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="futuristic", target="json:loads", config=Options, api=99)]
