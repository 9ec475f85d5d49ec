"""Broken on purpose: its hook for components raises."""

from mambabench import hookimpl


@hookimpl
def mambabench_components():
    raise RuntimeError("the components are out of order")
