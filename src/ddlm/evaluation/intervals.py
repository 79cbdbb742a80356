"""Numbers with their 95% intervals: over replicates, and over texts or prompts where replicates share them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddlm.evaluation.extras import missing_extra


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower end, or None where no interval can be given.
        high: Upper end.
        over: What the interval is over: ``groups``, ``seeds``, ``folds``, ``prompts``, ``texts`` or ``bootstrap``.
    """

    value: float
    low: float | None = None
    high: float | None = None
    over: str | None = None

    @property
    def width(self) -> float:
        """Width of the interval; 0 where there is none."""
        return 0.0 if self.low is None or self.high is None else self.high - self.low


def spread(value: float, replicas: Sequence[float], over: str) -> Estimate:
    """``value`` with the interval that its replicates tell."""
    finite = [r for r in replicas if math.isfinite(r)]
    if len(finite) < 2 or len(finite) < len(replicas) or not math.isfinite(value):
        return Estimate(value)
    half = t_quantile(len(finite) - 1) * float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    return Estimate(value, value - half, value + half, over)


def mean(values: Sequence[float], over: str) -> Estimate:
    """The mean with the interval that its terms tell."""
    return spread(float(np.mean(values)), values, over)


def jackknife(value: float, left_out: Sequence[float], over: str) -> Estimate:
    """``value`` of all samples with the interval told by the values without one fold of them each.

    For what is no mean of independent terms, because samples count as references of each other (Efron and Stein 1981).
    """
    found = spread(value, left_out, over)
    half = (
        (len(left_out) - 1) * found.width / 2
    )  # they share all but two folds: k - 1 times as close together
    return found if found.low is None else replace(found, low=value - half, high=value + half)


def ratio(
    sums: Sequence[float], counts: Sequence[int], clusters: Sequence[Hashable], over: str
) -> Estimate:
    """Sum over count of all texts, with an interval over clusters of them that are drawn independently.

    A mean per token is a ratio of two sums that both vary with the texts: its standard error is that of the residuals
    ``sum - value * count`` of the clusters (Cochran 1977, section 6.4).

    Args:
        sums: Of each text.
        counts: Of each text, what the ratio is per.
        clusters: Which texts belong together.
        over: What a cluster is.
    """
    value = math.fsum(sums) / sum(counts)
    residuals: dict[Hashable, float] = {}
    for name, total, count in zip(clusters, sums, counts, strict=True):
        residuals[name] = residuals.get(name, 0.0) + total - value * count
    k = len(residuals)
    if k < 2:
        return Estimate(value)
    squares = math.fsum(r * r for r in residuals.values())
    half = t_quantile(k - 1) * math.sqrt(k / (k - 1) * squares) / sum(counts)
    return Estimate(value, value - half, value + half, over)


def wider(first: Estimate, second: Estimate) -> Estimate:
    """The first number with the wider one of the two intervals."""
    if second.width <= first.width:
        return first
    return replace(second, value=first.value)


def t_quantile(degrees: int) -> float:
    """97.5% quantile of the t-distribution."""
    stats = missing_extra("scipy.stats", "eval")
    return float(stats.t.ppf(0.975, degrees))
