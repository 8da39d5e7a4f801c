"""Intervals and tests for a few seeds: Student's t, pairs that share a seed, Holm's correction.

With three seeds a percentile bootstrap of the mean covers the truth in 74% of cases where it claims
95%: it can only draw the three values again. The t-interval covers 95% for any number of seeds from
two on, if the seeds' scores are roughly normal.
"""

import math
from dataclasses import dataclass

LEVEL = 0.95  # of intervals; differences are claimed where Holm's p is below 1 - LEVEL
NORMAL = 1.959964  # standard errors that are half of a normal variable's interval


def t_inside(t, freedom):
    """P(|T| < t) of Student's distribution, for whole degrees of freedom from one on.

    A finite sum then (Abramowitz and Stegun, 26.7.3 and 26.7.4), exact to rounding.
    """
    return _inside(math.atan(abs(t) / math.sqrt(freedom)), freedom)


def _inside(angle, freedom):
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    # Odd: cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 ...; even: 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 ...
    term, total = cosine if odd else 1.0, 0.0
    for n in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (n - 1) / n
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(level, freedom):
    """The t with P(|T| < t) = level: half of a t-interval is so many standard errors."""
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        low, high = (angle, high) if _inside(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


@dataclass
class Interval:
    """A mean over seeds with its interval.

    Attributes:
        mean: of the values; None of none.
        half: the interval is mean - half to mean + half; None with fewer than two values.
        p: two-sided, of the mean being zero by chance; None with fewer than two values.
        values: by seed.
    """

    mean: float | None
    half: float | None
    p: float | None
    values: dict


def interval(values, of_the_test=0.0):
    """The t-interval of a mean.

    Args:
        values: by seed, finite.
        of_the_test: a standard error that all seeds share, and so do not show. It is known, hence
            normal: neither the interval nor p is smaller than it alone would have them.
    """
    count = len(values)
    if not count:
        return Interval(None, None, None, {})
    mean = math.fsum(values.values()) / count
    if count == 1:
        return Interval(mean, None, None, values)
    spread = math.fsum((x - mean) ** 2 for x in values.values()) / (count - 1)
    error = math.sqrt(spread / count)
    half, p = 0.0, 0.0 if mean else 1.0  # all seeds alike, to the last bit
    if error:
        half = t_quantile(LEVEL, count - 1) * error
        p = max(0.0, 1 - t_inside(mean / error, count - 1))
    if of_the_test:
        half = max(half, NORMAL * of_the_test)
        p = max(p, math.erfc(abs(mean) / of_the_test / math.sqrt(2)))
    return Interval(mean, half, p, values)


def paired(values, baseline, answers=0):
    """The interval of the mean difference to a baseline, over the seeds that both have.

    Seeds share the order of data and the targets, so what a seed does to both cancels.

    Args:
        values, baseline: by seed.
        answers: of the test, if the values are shares of right ones. The seeds share the test too,
            and near 0 and 1 they hardly differ: one answer in thousands would separate two models.
            So two shares of so many answers have to differ by more than chance.
    """
    shared = [seed for seed in values if seed in baseline]
    of_the_test = 0.0
    if answers and shared:
        shares = [math.fsum(x[seed] for seed in shared) / len(shared) for x in (values, baseline)]
        of_the_test = math.sqrt(math.fsum(x * (1 - x) for x in shares) / answers)
    return interval({seed: values[seed] - baseline[seed] for seed in shared}, of_the_test)


def holm(p_values):
    """Holm's p-values: below 0.05 for the whole family together.

    Args:
        p_values: by name; None is not tested and stays None.
    """
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted, largest = dict.fromkeys(p_values), 0.0
    for rank, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[name] = largest
    return adjusted
