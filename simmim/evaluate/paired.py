"""Means of a few values, their intervals and tests: of draws of labels and of seeds, which are compared in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

SIGNIFICANCE_LEVEL = 0.05  # the usual one; a difference above it is called possible chance
CONFIDENCE = 1 - SIGNIFICANCE_LEVEL
# Percentage points. Accuracies are logged in float32, whose steps make equal differences differ by up to 1e-5; one image of
# a million is 1e-4.
ROUNDING = 5e-5


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is nan for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t, which is nan for a single value."""
    mean, error = mean_and_error(values)
    return mean, error * t_quantile(len(values))


def t_quantile(count: int) -> float:
    """Half the width of the 95 % interval of the mean of `count` values, in standard errors; nan for a single value."""
    if count < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1))


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that the mean of the differences is 0; nan for a single or for equal differences.

    Args:
        differences: of accuracies in percent. Those that rounding alone tells apart are equal: any gain is large beside its
            noise, and one image more with each seed would have the smallest p of all.
    """
    if len(differences) < 2 or max(differences) - min(differences) < ROUNDING:
        return math.nan
    from scipy.stats import t

    mean, error = mean_and_error(differences)
    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))


def p_text(p: float) -> str:
    """Relation and number, in two digits; very small numbers only as such."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
