"""What a comparison of two stores says of one metric, for plug-ins that judge it more strictly. Part of the contract in
`interfaces`, which has these names as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

VERDICTS = ("pass", "fail", "inconclusive", "not comparable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One label and metric of two stores, as `mambabench_verdict` sees it. Differences are head - base."""

    label: str
    metric: str
    base: float
    head: float
    difference: float
    low: float
    high: float
    margin: float
    unit: str
    """Of `base` and `head`."""
    verdict: str
    reason: str = ""
    better: str = "higher"
    """`higher`, `lower`, or `equal` where any difference is for the worse."""
    relative: bool = False
    """The difference, its interval, the margin and the detectable change are fractions of `base`."""
    detectable: float = math.nan
    """The smallest true change for the worse that these data would have called a failure with probability 0.8."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict of a plug-in; only one that is stricter than the harness's own counts."""

    verdict: str
    reason: str
