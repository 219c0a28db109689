"""What scores over seeds say: spread, intervals, and a paired comparison with a plain verdict. Imports no torch.

Intervals and tests are Student's t (1908) over seeds; several tasks are corrected by Holm 1979. The smallest difference
that could have been detected is for 80% power at the 5% level, in one comparison alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Summary:
    """n scores. sd and the bounds of the 95% interval of the mean are NaN for one score."""

    n: int
    median: float
    mean: float
    sd: float
    low: float
    high: float


def summarize(scores: Sequence[float]) -> Summary:
    """Median, mean, sample standard deviation and 95% interval of the mean."""
    from scipy.stats import t

    n, mean = len(scores), statistics.fmean(scores)
    sd = statistics.stdev(scores) if n > 1 else math.nan
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return Summary(n, statistics.median(scores), mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """n paired differences. detectable: the smallest true difference that would be found four times in five.

    p: two-sided, of a mean difference of 0; corrected where several are compared.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """better, worse, no difference shown, or inconclusive and why."""
        if self.n < 2:
            return "inconclusive: one seed has no spread"
        if math.isnan(self.p):
            return "inconclusive: the differences have no spread"
        if self.p < LEVEL:
            return "better" if self.difference > 0 else "worse"
        if self.low > 0 or self.high < 0:
            return "inconclusive: shown alone, but not among so many comparisons"
        if self.detectable == 0:
            return "no difference: the scores are equal"
        return f"no difference shown; {self.detectable:.3f} would have been"


def compare(scores: Sequence[float], base: Sequence[float]) -> Comparison:
    """Paired: the i-th scores share a seed."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    differences = [a - b for a, b in zip(scores, base, strict=True)]
    found = summarize(differences)
    if found.n < 2:
        return Comparison(found.n, found.mean, math.nan, math.nan, math.nan, math.nan)
    error, df = found.sd / math.sqrt(found.n), found.n - 1
    if found.sd <= 1e-9 * max(map(abs, [*scores, *base])):  # rounding: scores on few rows are often equally far apart
        p, detectable = (1.0, 0.0) if found.mean == 0 else (math.nan, math.nan)
    else:
        p = float(2 * t.sf(abs(found.mean) / error, df))
        critical = t.ppf(1 - LEVEL / 2, df)
        detectable = error * brentq(lambda shift: nct.sf(critical, df, shift) - POWER, 0, 100)
    return Comparison(found.n, found.mean, found.low, found.high, p, detectable)


def corrected(comparisons: Mapping[K, Comparison]) -> dict[K, Comparison]:
    """The same with p-values that hold for all of them together (Holm 1979); intervals stay those of one."""
    tested = sorted((name for name, c in comparisons.items() if not math.isnan(c.p)), key=lambda n: comparisons[n].p)
    result, largest = dict(comparisons), 0.0
    for rank, name in enumerate(tested):
        largest = max(largest, min(1.0, comparisons[name].p * (len(tested) - rank)))
        result[name] = Comparison(**{**vars(comparisons[name]), "p": largest})
    return result
