"""What a run of the contract found: one line per check, as a table, as JSON, as an exit code."""

import contextlib
import itertools
import math
import textwrap
from dataclasses import asdict, dataclass, field

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
# Of a model of others: what its class does not offer, and differences that it may show.
DOES_NOT_APPLY, NOT_PROMISED = "does not apply", "not promised"

BUDGET_SPENT = "the budget was spent"


class NotApplicable(Exception):
    """The subject cannot be asked this; the message says why. Recorded as not run."""


class OutOfTime(NotApplicable):
    """The time given is over: what follows is not run."""


@dataclass
class Check:
    """One comparison: a figure, the bound it must keep, and the verdict.

    Attributes:
        point: number of the contract's point.
        name: what was compared.
        measured: the figure, or None if there is none.
        bound: the largest figure that passes, or a description of what was expected.
        verdict: "passed", "failed" or "not run".
        reason: why a check was not run, or what went wrong.
    """

    point: int
    name: str
    measured: float | str | None
    bound: float | str | None
    verdict: str
    reason: str = ""


class Checks:
    """Collects the checks of one point."""

    def __init__(self, point):
        self.point = point
        self.found: list[Check] = []
        self.notes: list[str] = []
        self._case = ""

    def _add(self, name, measured, bound, verdict, reason=""):
        name = ": ".join(part for part in (self._case, name) if part) or "the whole point"
        self.found.append(Check(self.point, name, measured, bound, verdict, reason))

    def below(self, name, measured, bound):
        """The figure is at most the bound; a NaN is not."""
        self._add(name, float(measured), bound, PASSED if measured <= bound else FAILED)

    def holds(self, name, condition, measured="no", expected="yes"):
        """A condition; `measured` is what to print when it does not hold."""
        verdict = PASSED if condition else FAILED
        self._add(name, expected if condition else measured, expected, verdict)

    def not_run(self, name, reason):
        """A check that could not be made here."""
        self._add(name, None, None, NOT_RUN, reason)

    def note(self, text):
        """Something to print under the table, such as a curve."""
        self.notes.append(text)

    @contextlib.contextmanager
    def case(self, name):
        """Prefixes the checks made inside with a name; an exception becomes a failed check."""
        outer, self._case = self._case, ": ".join(part for part in (self._case, name) if part)
        try:
            yield
        except NotApplicable as error:
            self._case, case = outer, name
            self._add(case, None, None, NOT_RUN, str(error))
        except Exception as error:
            # A model of somebody else may raise anything; it must not end the other checks.
            self._case, case = outer, name
            self._add(case, None, None, FAILED, f"{type(error).__name__}: {first_line(error)}")
        finally:
            self._case = outer


def first_line(error):
    """The first line of an exception's message that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else "without a message"


@dataclass
class Report:
    """The checks of a run, point by point.

    Attributes:
        subject: name of the model and variant.
        titles: the points that were asked for, number to title.
        checks: all checks in order.
        notes: text to print under a point, by its number.
        seconds: time each point took.
        versions: of the libraries.
    """

    subject: str
    titles: dict[int, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: dict[int, list[str]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def failed(self, point=None):
        """The checks that failed, of one point or of all."""
        return [
            check
            for check in self.checks
            if check.verdict == FAILED and point in (None, check.point)
        ]

    def verdict(self, point):
        """ "failed" if any check failed, else "passed" if any was made, else "not run".

        A point that the budget cut off is not run, whatever of it passed before.
        """
        checks = [check for check in self.checks if check.point == point]
        verdicts = {check.verdict for check in checks}
        if FAILED not in verdicts and any(check.reason == BUDGET_SPENT for check in checks):
            return NOT_RUN
        return next((verdict for verdict in (FAILED, PASSED) if verdict in verdicts), NOT_RUN)

    def count(self, verdict):
        """How many checks have this verdict."""
        return sum(check.verdict == verdict for check in self.checks)

    def as_dict(self):
        """Everything, for JSON."""
        content = asdict(self) | {"verdicts": {n: self.verdict(n) for n in self.titles}}
        for check in content["checks"]:
            # JSON has no infinity and no NaN.
            if isinstance(check["measured"], float) and not math.isfinite(check["measured"]):
                check["measured"] = str(check["measured"])
        return content

    def summary(self, point):
        """One line about a point, and each of its checks that failed in full.

        The figure is the one that came nearest to its bound, or went furthest beyond.
        """
        checks = [check for check in self.checks if check.point == point]
        worst = nearest(checks)
        figure = f"{show(worst.measured)} of {show(worst.bound)}" if worst else ""
        num_skipped = sum(check.verdict == NOT_RUN for check in checks)
        skipped = f"  ({num_skipped} not run)" * bool(num_skipped)
        title = f"{self.titles[point]}: {self.verdict(point)}"
        lines = [f"{point:>2}  {title:<61}{figure:>18}{self.seconds[point]:>7.1f} s{skipped}"]
        for check in self.failed(point):
            figures = f"{show(check.measured)}, bound {show(check.bound)}"
            reason = f" ({check.reason})" if check.reason else ""
            lines.append(f"    failed: {check.name}: {figures}{reason}")
        return "\n".join(lines)

    def table(self):
        """Everything, for people."""
        rows = [
            (check.name, show(check.measured), show(check.bound), check.verdict, check.reason)
            for check in self.checks
        ]
        header = ("checked", "measured", "bound", "verdict")
        widths = [max(map(len, column)) for column in zip(*(row[:4] for row in rows), header)]

        def line(cells):
            name, measured, bound, verdict = cells
            text = f"    {name:<{widths[0]}}  {measured:>{widths[1]}}  {bound:>{widths[2]}}"
            return f"{text}  {verdict}"

        lines = [self.subject, line(header)]
        numbered = zip(self.checks, rows)
        for point, group in itertools.groupby(numbered, key=lambda pair: pair[0].point):
            lines.append(
                f"{point:>2}  {self.titles[point]}: {self.verdict(point)}"
                f" ({self.seconds[point]:.1f} s)"
            )
            for _, (*cells, reason) in group:
                lines.append(line(cells) + (f" ({reason})" if reason else ""))
            for note in self.notes.get(point, ()):
                lines.extend(f"      {text}" for text in note.splitlines())
        lines.append(self.totals())
        return "\n".join(lines)

    def totals(self):
        """How many checks passed and did not, in one line."""
        return (
            f"{self.count(PASSED)} checks passed, {self.count(FAILED)} failed, "
            f"{self.count(NOT_RUN)} not run, in {sum(self.seconds.values()):.0f} s"
        )


def nearest(checks):
    """The check whose figure came nearest to its bound, or went furthest beyond, if any has one."""
    return max((check for check in checks if _share(check) >= 0), key=_share, default=None)


def _share(check):
    """How much of its bound a figure takes; -1 if there is no such number."""
    numbers = (int, float)
    if not isinstance(check.measured, numbers) or not isinstance(check.bound, numbers):
        return -1.0
    if math.isnan(check.measured):
        return math.inf
    if check.bound == 0:
        return math.inf if check.measured > 0 else 0.0
    return check.measured / check.bound


def show(figure):
    """A figure for the table."""
    if figure is None:
        return "-"
    if isinstance(figure, str):
        return figure
    if math.isfinite(figure) and figure == int(figure):
        return str(int(figure))
    return f"{figure:.3g}" if 0.01 <= abs(figure) < 1e4 else f"{figure:.1e}"
