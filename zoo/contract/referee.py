"""A verdict on a model of others: what its users rely on, point by point, within a time budget."""

import functools
import linecache
import math
import platform
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from . import precision as precisions
from .finding import smallest
from .probes import distance, inner_lengths, probes_for
from .report import (
    BUDGET_SPENT,
    DOES_NOT_APPLY,
    FAILED,
    NOT_PROMISED,
    NOT_RUN,
    PASSED,
    Check,
    NotApplicable,
    OutOfTime,
    Report,
    first_line,
)

DEFAULT_BUDGET = 120.0
# A difference is looked at on this many inputs before it counts.
NUM_INPUTS = 3


@dataclass
class Judged(Check):
    """A check of the referee's.

    Attributes:
        promise: who relies on what was compared.
        smallest: the smallest input that shows a difference: its sizes, ids, figure and, where
            there is one, the error; None if there is no difference.
    """

    promise: str = ""
    smallest: dict | None = None


@dataclass
class Verdicts(Report):
    """What the referee found.

    Attributes:
        model_class: of the model, with its module.
        precision: what it computes in, as `Precision.as_dict` tells it.
        precision_text: the same in a line.
        budget: seconds given; None: no limit.
        remarks: what else is to be known, a line each.
    """

    model_class: str = ""
    precision: dict = field(default_factory=dict)
    precision_text: str = ""
    budget: float | None = None
    remarks: list[str] = field(default_factory=list)

    def of(self, verdict, point=None):
        """The checks with a verdict, of one point or of all."""
        return [
            check
            for check in self.checks
            if check.verdict == verdict and point in (None, check.point)
        ]

    def verdict(self, point):
        """failed, or not run if the budget cut it off, or passed, or does not apply.

        A point is passed only if all that was to be asked about it was.
        """
        for verdict in (FAILED, NOT_RUN, PASSED):
            if self.of(verdict, point):
                return verdict
        return DOES_NOT_APPLY


@dataclass
class _Setting:
    """A model in one type, and its bounds."""

    dtype: torch.dtype
    model: torch.nn.Module
    bounds: precisions.Bounds


@dataclass
class _Measured:
    """A figure, its bound and why it is that, or what was raised instead."""

    figure: float
    bound: float
    reason: str = ""
    error: str = ""
    is_refused: bool = False


def _is_refusal(error):
    """Whether a library says in words that it does not do this, rather than failing at it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno).strip()
    ours, torchs = str(Path(__file__).parent), str(Path(torch.__file__).parent)
    return line.startswith("raise") and not frame.filename.startswith((ours, torchs))


class Referee:
    """Judges one subject.

    Args:
        subject: a `Subject`.
        points: numbers of the contract's points; None: all.
        titles: number -> title of each point.
        budget: seconds; None: no limit.
    """

    def __init__(self, subject, titles, points=None, budget=DEFAULT_BUDGET):
        self.subject, self.budget = subject, budget
        self.started = time.perf_counter()
        subject.deadline = None if budget is None else self.started + budget
        cls = subject.model_class
        self.report = Verdicts(
            subject.name,
            titles={number: titles[number] for number in points or titles},
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            model_class=f"{cls.__module__}.{cls.__qualname__}",
            budget=budget,
        )
        self.report.seconds = dict.fromkeys(self.report.titles, 0.0)

    def judge(self):
        """Asks all there is time for, the most telling first.

        Returns:
            `Verdicts`.
        """
        report = self.report
        probes = [x for x in probes_for(self.subject) if x.point in report.titles]
        try:
            self.precision = precisions.measure(self.subject)
        except NotApplicable as error:
            verdict = NOT_RUN if isinstance(error, OutOfTime) else FAILED
            for probe in probes:
                self._add(probe, None, None, verdict, str(error))
                if verdict == FAILED:
                    # That it does not run is one failure, not thirty.
                    verdict = NOT_RUN
            return report
        report.precision = self.precision.as_dict()
        report.precision_text = self.precision.describe()
        for name, length in inner_lengths(self.subject).items():
            if length >= 300:
                report.remarks.append(f"texts shorter than its {name}, {length}, were tried only")
        self._main = self._in(self.precision.dtype)
        for probe in probes:
            began = time.perf_counter()
            self._ask(probe)
            report.seconds[probe.point] += time.perf_counter() - began
        return report

    def _in(self, dtype):
        coarsest = max(dtype, self.precision.computes_in, key=precisions.LAST_BIT.get)
        bounds = precisions.Bounds(self.subject, dtype, coarsest)
        return _Setting(dtype, self.subject.model(dtype), bounds)

    @functools.cached_property
    def _single(self):
        """In float32, as nearly everybody runs it."""
        return self._in(torch.float32)

    def _ask(self, probe):
        try:
            self.subject.check_time()
            reason = probe.applies(self.subject)
            if reason:
                self._add(probe, None, None, DOES_NOT_APPLY, reason)
                return
            promised = probe.promised(self.subject, self._main.model)
            first = self._measure(probe, probe.sizes)
            if first.figure <= first.bound:
                self._add(probe, first.figure, first.bound, PASSED, first.reason)
                return
            if first.is_refused and probe.may_be_refused:
                self._add(probe, None, None, DOES_NOT_APPLY, f"it refuses: {first.error}")
                return
            verdict, reason = self._confirmed(probe) if promised else (NOT_PROMISED, "")
        except OutOfTime:
            self._add(probe, None, None, NOT_RUN, BUDGET_SPENT)
            return
        except NotApplicable as error:
            self._add(probe, None, None, DOES_NOT_APPLY, str(error))
            return
        except Exception as error:
            # In asking what the class offers, not in what it does: no verdict on that.
            reason = f"it could not be asked: {type(error).__name__}: {first_line(error)}"
            self._add(probe, None, None, NOT_RUN, reason)
            return
        reason = "; ".join(x for x in (first.error, reason) if x)
        figure = None if first.error else first.figure
        found = self._smallest(probe, first)
        self._add(probe, figure, first.bound, verdict, reason, found)

    def _measure(self, probe, sizes, seed=0, setting=None):
        """Runs a probe once."""
        setting = setting or self._main

        def results(model):
            with torch.set_grad_enabled(probe.needs_grad):
                return probe.pair(self.subject, model, self._ids(seed), sizes)

        try:
            figure = distance(*results(setting.model))
            if figure != figure:
                figure = math.inf
            if probe.bound is not None:
                return _Measured(figure, probe.bound)
            return _Measured(figure, *setting.bounds.of(figure, distance, results, setting.model))
        except NotApplicable:
            raise
        except Exception as error:
            # A model of somebody else may raise anything; where it should have run, that counts.
            text = f"{type(error).__name__}: {first_line(error)}"
            return _Measured(math.inf, probe.bound or 0.0, "", text, _is_refusal(error))

    def _confirmed(self, probe):
        """The verdict on a difference seen once: where users run it, and on other input, too?"""
        try:
            if self.precision.dtype == torch.float64:
                single = self._measure(probe, probe.sizes, setting=self._single)
                if single.figure <= single.bound:
                    figure = f"in fp32 {single.figure:.1e} of {single.bound:.1e}"
                    return NOT_PROMISED, f"in fp64 alone, which nobody runs; {figure}"
            if not (probe.is_choice or self._is_routed):
                return FAILED, ""
            seen = 1
            for seed in range(1, NUM_INPUTS):
                other = self._measure(probe, probe.sizes, seed)
                seen += other.figure > other.bound
        except OutOfTime:
            return FAILED, "there was no time to look at it again"
        if seen > 1:
            return FAILED, ""
        what = "a choice of tokens" if probe.is_choice else "a router's choice of experts"
        return NOT_PROMISED, f"on one of {NUM_INPUTS} inputs only, as where {what} is nearly a tie"

    @property
    def _is_routed(self):
        config = self.subject.config.get_text_config()
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return any((getattr(config, name, None) or 0) > 1 for name in names)

    def _smallest(self, probe, first):
        """The smallest input that shows what the first one did."""
        last = first

        def fails(sizes):
            nonlocal last
            found = self._measure(probe, sizes)
            # An error explains no difference, and a difference no error.
            if found.figure > found.bound and bool(found.error) == bool(first.error):
                last = found
                return True
            return False

        sizes, is_least = smallest(fails, probe.sizes, probe.least)
        return {
            "sizes": sizes,
            "ids": self._shown_ids(probe, sizes),
            "figure": last.figure if math.isfinite(last.figure) else None,
            "bound": last.bound,
            "error": last.error,
            "is_smallest": is_least,
        }

    def _ids(self, seed):
        """Gives ids of a shape; those of a smaller one are the beginning of those of a larger."""

        def ids(*shape):
            columns = [self.subject.ids(16, seed=1000 * seed + i) for i in range(shape[-1])]
            table = torch.stack(columns, dim=-1)
            return table[: shape[0]] if len(shape) == 2 else table[0]

        return ids

    def _shown_ids(self, probe, sizes):
        """The ids a probe asks for at these sizes, as lists."""
        asked, plain = [], self._ids(0)

        def ids(*shape):
            asked.append(plain(*shape))
            return asked[-1]

        try:
            with torch.no_grad():
                probe.pair(self.subject, self._main.model, ids, sizes)
        except Exception:
            # As when it was found; the ids were asked for before.
            pass
        return asked[0].tolist() if asked else []

    def _add(self, probe, measured, bound, verdict, reason="", found=None):
        self.report.checks.append(
            Judged(probe.point, probe.name, measured, bound, verdict, reason, probe.promise, found)
        )


def judge(subject, titles, points=None, budget=DEFAULT_BUDGET):
    """The referee's verdict on a subject; see `Referee`."""
    return Referee(subject, titles, points, budget).judge()


__all__ = ["DEFAULT_BUDGET", "Judged", "Referee", "Verdicts", "judge"]
