"""The referee's verdicts for people: a summary for a shell, and Markdown."""

import textwrap

from .report import DOES_NOT_APPLY, FAILED, NOT_PROMISED, NOT_RUN, PASSED, show

WIDTH = 100
MANY_IDS = 24
TITLES = {
    FAILED: "failed",
    NOT_PROMISED: "different, but promised to nobody",
    DOES_NOT_APPLY: "does not apply",
    NOT_RUN: "not run",
}


def shown_input(smallest):
    """The smallest input of a finding, in words."""
    sizes = ", ".join(f"{name} {number}" for name, number in smallest["sizes"].items())
    ids = smallest["ids"]
    flat = [x for row in ids for x in (row if isinstance(row, list) else [row])]
    text = f"{sizes}; ids {ids}" if len(flat) <= MANY_IDS else f"{sizes}; {len(flat)} ids"
    if smallest["error"]:
        text += f": {smallest['error']}"
    elif smallest["figure"] is not None:
        text += f": off by {show(smallest['figure'])}"
    return text if smallest["is_smallest"] else f"{text} (smaller ones were not all tried)"


def _figures(check):
    if check.measured is None:
        return check.reason
    text = f"{show(check.measured)}, bound {show(check.bound)}"
    return f"{text} ({check.reason})" if check.reason else text


def summary(report):
    """A report in lines: what it is, each point, then all that did not pass, by verdict."""
    lines = [f"{report.subject}: {report.precision_text}" if report.precision_text else ""]
    lines[0] = lines[0] or report.subject
    lines += report.remarks
    for point, title in report.titles.items():
        counts = _counts(report, point)
        lines.append(
            f"{point:>2}  {title + ': ' + report.verdict(point):<70}"
            f"{report.seconds[point]:>6.1f} s  {counts}"
        )
    for verdict, title in TITLES.items():
        checks = report.of(verdict)
        if not checks:
            continue
        lines.append(f"{title}:")
        for text, group in _grouped(checks):
            points = ", ".join(str(x) for x in dict.fromkeys(check.point for check in group))
            names = "; ".join(check.name for check in group)
            lines += _wrapped(f"{points}: {names}: {text}", "  ")
            if group[0].smallest:
                lines += _wrapped(f"smallest: {shown_input(group[0].smallest)}", "      ")
    lines.append(report.totals())
    return "\n".join(lines)


def _counts(report, point):
    counts = {
        verdict: len(report.of(verdict, point))
        for verdict in (PASSED, FAILED, NOT_PROMISED, DOES_NOT_APPLY, NOT_RUN)
    }
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)


def _grouped(checks):
    """Checks with one reason, or shown by one input, are told together.

    Returns:
        (text of the first, the checks) of each group.
    """
    groups = {}
    for check in checks:
        key = _figures(check) if check.smallest is None else shown_input(check.smallest)
        groups.setdefault(key, []).append(check)
    return [(_figures(group[0]), group) for group in groups.values()]


def _wrapped(text, indent):
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown(report):
    """A report as a Markdown document."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    budget = "no limit" if report.budget is None else f"{report.budget:g} s"
    lines = [
        f"# {_plain(report.subject)}",
        "",
        f"`{report.model_class}`; {versions}; budget {budget}, spent "
        f"{sum(report.seconds.values()):.1f} s.",
        "",
    ]
    if report.precision_text:
        lines += [f"Precision: {_plain(report.precision_text)}.", ""]
    lines += [f"- {_plain(x)}" for x in report.remarks] + [""] * bool(report.remarks)
    lines += ["| point | | verdict | checks |", "| --- | --- | --- | --- |"]
    for point, title in report.titles.items():
        row = (str(point), _plain(title), report.verdict(point), _counts(report, point))
        lines.append(f"| {' | '.join(row)} |")
    for verdict, title in TITLES.items():
        checks = report.of(verdict)
        if not checks:
            continue
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        for check in checks:
            text = _figures(check)
            if check.smallest:
                text = f"{text}. Smallest input: {shown_input(check.smallest)}"
            promised = f" (relied on by: {check.promise})" if verdict == FAILED else ""
            lines.append(f"- point {check.point}, {_plain(check.name)}{promised}: {_plain(text)}")
    return "\n".join(lines) + "\n"


def _plain(text):
    """Text in which nothing is markup."""
    for mark in "\\`*_|<>#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
