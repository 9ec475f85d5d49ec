"""Whether a faster version of an operation can serve a call, and if not, why: the reason is shown and recorded."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Support:
    """Truthy where the call can be served; else `reason` says why not."""

    reason: str = ""

    @classmethod
    def no(cls, reason: str) -> Support:
        return cls(reason)

    def __bool__(self) -> bool:
        return not self.reason


YES = Support()


@functools.cache
def installed(module: str, distribution: str) -> Support:
    """Whether `module` can be imported, without importing it: transformers changes its own models once it finds
    mamba-ssm imported or importable."""
    return YES if importlib.util.find_spec(module) else Support.no(f"{distribution} is not installed")
