"""What options of this room must be, in the words in which plans are told so. All raise ValueError."""

from __future__ import annotations

from typing import Any


def positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be above 0")


def counts(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def below_one(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")


def share_of_steps(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name} is {getattr(config, name)}; it is a share of all steps, at least 0 and below 1")


def not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must not be below 0")
