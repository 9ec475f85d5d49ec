"""Broken on purpose: it works, but imports torch where only descriptions are wanted."""

from dataclasses import dataclass

import torch  # noqa: F401
from mambabench import Component, hookimpl


@dataclass(frozen=True)
class Options:
    pass


@hookimpl
def mambabench_components():
    return [Component(kind="decoder", name="heavy", target="torch:tensor", config=Options)]
