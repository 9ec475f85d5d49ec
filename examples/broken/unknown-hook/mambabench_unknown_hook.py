"""Broken on purpose: it implements a hook that does not exist."""

from mambabench import hookimpl


@hookimpl
def mambabench_componets():
    return []
