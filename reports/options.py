"""The options of this room's components, apart from what needs pandas, so that plug-ins are listed quickly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """The tables, renderers and the command of this room have no options."""
