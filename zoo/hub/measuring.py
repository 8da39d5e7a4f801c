"""What the contract measures on an exported model, for its card: `zoo export --contract`."""

import json
from pathlib import Path
from typing import NamedTuple

from .files import MEASURED

# What takes seconds where the model is small; compiling (8) alone takes as long as all of these.
POINTS = (1, 2, 3, 4, 5, 7, 9)
TOKENS = 4096  # of the long prefill


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        rows: of each point: its title, verdict, what came nearest to its bound, that figure, the
            bound, and how many checks were made.
        others: titles of the points that were not asked for.
        failed: names of the checks that failed.
        versions: of the libraries.
    """

    rows: list[tuple[str, str, str, str, str, int]]
    others: list[str]
    failed: list[str]
    versions: dict[str, str]


def measure(folder, name):
    """Runs the contract on the model in a folder, and leaves every figure there.

    Args:
        folder: an exported one, for our own classes.
        name: what the model is called.

    Returns:
        A `Measured`.
    """
    # What compiles is imported where it is needed alone.
    from ..contract import NOT_RUN, find_subject, run
    from ..contract import POINTS as ALL
    from ..contract.report import nearest, show

    report = run(find_subject(str(folder)), list(POINTS), TOKENS)
    report.subject = name
    text = json.dumps(report.as_dict(), indent=1) + "\n"
    (Path(folder) / MEASURED).write_text(text, encoding="utf-8")
    rows = []
    for point in POINTS:
        made = [c for c in report.checks if c.point == point and c.verdict != NOT_RUN]
        worst = nearest(made)
        what = ("every condition held", "yes", "yes")
        if worst is not None:
            what = (worst.name, show(worst.measured), show(worst.bound))
        elif not made:
            reasons = {c.reason for c in report.checks if c.point == point}
            what = ("; ".join(sorted(reasons)), "not run", "not run")
        elif report.failed(point):
            what = (report.failed(point)[0].name, "no", "yes")
        rows.append((report.titles[point], report.verdict(point), *what, len(made)))
    others = [ALL[point][0] for point in ALL if point not in POINTS]
    return Measured(rows, others, [check.name for check in report.failed()], report.versions)
