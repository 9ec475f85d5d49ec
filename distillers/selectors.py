"""Chooses which layers keep attention."""

from __future__ import annotations

from fractions import Fraction

from ..harness.interfaces import Job, MambabenchError
from .plugin import EndsConfig, ListConfig, UniformConfig


def spread(layers: int, share: float) -> list[int]:
    """Indices of evenly spread layers, a share of them.

    For share 1/n those where (i + 1) % n == 0, the rule of "The Mamba in the Llama": nested, and with the last layer
    wherever n divides the depth. For any other share round(share · layers) layers, always with the last one.

    >>> spread(8, 0.25), spread(5, 0.4), spread(6, 0.75)
    ([3, 7], [2, 4], [1, 2, 4, 5])
    """
    if share == 0:
        return []
    exact = Fraction(str(share))
    if exact.numerator == 1:
        return [layer for layer in range(layers) if (layer + 1) % exact.denominator == 0]
    count = round(exact * layers)
    return [-(-layers * (place + 1) // count) - 1 for place in range(count)]


def spread_some(job: Job, share: float, selector: str) -> list[int]:
    """`spread` over the parent's layers. Raises MambabenchError where a share above 0 comes to no layer."""
    layers = depth(job)
    keep = spread(layers, share)
    if share and not keep:
        raise MambabenchError(
            f"selector {selector}: a share of {share:g} of {layers} layers keeps none; say 0 if that is meant"
        )
    return keep


class Uniform:
    """The selector `uniform`."""

    def __init__(self, config: UniformConfig) -> None:
        self.config = config

    def select(self, job: Job) -> list[int]:
        return spread_some(job, self.config.share, "uniform")


def ends(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers at even distances, the first and the last among them.

    >>> ends(32, 2), ends(32, 4), ends(3, 5)
    ([0, 31], [0, 10, 21, 31], [0, 1, 2])
    """
    count = min(count, layers)
    return [round(place * (layers - 1) / max(count - 1, 1)) for place in range(count)]


class Ends:
    """The selector `ends`."""

    def __init__(self, config: EndsConfig) -> None:
        self.config = config

    def select(self, job: Job) -> list[int]:
        return ends(depth(job), self.config.count)


class Listed:
    """The selector `list`."""

    def __init__(self, config: ListConfig) -> None:
        self.config = config

    def select(self, job: Job) -> list[int]:
        """Raises MambabenchError for a layer that the parent does not have, or that is listed twice."""
        layers = depth(job)
        keep = sorted(self.config.layers)
        if wrong := [layer for layer in keep if not 0 <= layer < layers]:
            raise MambabenchError(f"selector list: there is no layer {wrong[0]}; layers are 0 to {layers - 1}")
        if len(set(keep)) < len(keep):
            raise MambabenchError(f"selector list: a layer is listed twice in {list(self.config.layers)}")
        return keep


def depth(job: Job) -> int:
    """How many layers the parent has."""
    if job.parent is None or job.backend is None:
        raise MambabenchError("a selector needs a parent model")
    return int(job.backend.describe(job.parent.path)["layers"])
