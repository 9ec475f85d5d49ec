"""Texts of plans and files that have places for others, such as `{question}`: checked before anything is put there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from string import Formatter


def check_template(template: str, known: Iterable[str], needed: Collection[str] = ()) -> None:
    """Raises ValueError for a template of `str.format` that has a place for something unknown or none for what it
    needs; places are names alone.

    >>> check_template("{a} and {{b}}", known="ab", needed="a")
    >>> check_template("{a} and {c}", known="ab")
    Traceback (most recent call last):
    ValueError: it has {c}; what it may have is {a}, {b} (braces that are none are doubled)
    """
    try:
        found = [
            name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            for _, name, form, conversion in Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise ValueError(f"its braces do not match ({error}); those that are none are doubled") from None
    known = list(known)
    if wrong := [name for name in found if name not in known]:
        may = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"it has {{{wrong[0]}}}; what it may have is {may} (braces that are none are doubled)")
    if left := [name for name in needed if name not in found]:
        raise ValueError(f"it must have {{{left[0]}}}")
