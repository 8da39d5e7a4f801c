"""The loss of a training run, as numbers and as a figure, beside the weights that it led to."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

from .files import CURVE_FIGURE, CURVE_NUMBERS, read_fields

MAX_POINTS = 1000  # of each of the two curves
# What a line of metrics.jsonl may hold, the first that it does.
FIGURES = {"train": ("bits_per_byte", "loss"), "held_out": ("bits_per_byte", "loss", "accuracy")}
TITLES = {"bits_per_byte": "bits per byte", "loss": "loss", "accuracy": "accuracy"}


def curve_of(lines):
    """The curves in the lines of a run's metrics.jsonl, thinned out if there are many points.

    Args:
        lines: dicts with kind, step, and figures.

    Returns:
        {"train": curve, "held_out": curve}, as far as there are such lines; a curve is
        {"columns": [step, tokens where they are known, what it is], "every": one of so many
        points is here, "rows": [[numbers]]}.
    """
    curves = {}
    for kind, names in FIGURES.items():
        found = [line for line in lines if line.get("kind") == kind and is_number(line.get("step"))]
        name = next((n for n in names if any(is_number(line.get(n)) for line in found)), None)
        found = [line for line in found if is_number(line.get(name))]
        if not found:
            continue
        has_tokens = all(is_number(line.get("tokens")) for line in found)
        columns = ["step", *(["tokens"] if has_tokens else []), name]
        every = math.ceil(len(found) / MAX_POINTS)
        # Counted from the end: how it ended is what one looks for.
        rows = [[line[column] for column in columns] for line in found[::-1][::every][::-1]]
        curves[kind] = {"columns": columns, "every": every, "rows": rows}
    return curves


def read_curves(folder):
    """The curves that lie in a folder; {} if there are none, or what lies there is something else.

    Args:
        folder: one that an export wrote.
    """
    curves = read_fields(Path(folder) / CURVE_NUMBERS)
    return {kind: curve for kind, curve in curves.items() if kind in FIGURES and _is_curve(curve)}


def write_curves(curves, folder):
    """Writes curves into a folder: the numbers, and a figure of them where matplotlib is installed.

    Args:
        curves: as `curve_of` gives them; {} writes nothing.
        folder: where.

    Returns:
        Whether there is a figure.
    """
    if not curves:
        return False
    # A row is a line: a thousand lines are read more easily than one, or four thousand.
    parts = []
    for kind, curve in curves.items():
        rows = ",\n    ".join(json.dumps(row) for row in curve["rows"])
        columns = json.dumps(curve["columns"])
        parts.append(
            f'  "{kind}": {{\n    "columns": {columns},\n    "every": {curve["every"]},\n'
            f'    "rows": [\n    {rows}\n    ]\n  }}'
        )
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    (Path(folder) / CURVE_NUMBERS).write_text(text, encoding="utf-8")
    if find_spec("matplotlib") is None:
        return False
    _draw(curves, Path(folder) / CURVE_FIGURE)
    return True


def _draw(curves, path):
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {"train": {"lw": 1, "alpha": 0.6}, "held_out": {"lw": 2, "marker": "o", "ms": 4}}
    # What is measured in another unit has an axis of its own.
    units = list(dict.fromkeys(curve["columns"][-1] for curve in curves.values()))
    places = {unit: axes if i == 0 else axes.twinx() for i, unit in enumerate(units)}
    drawn = []
    for number, (kind, curve) in enumerate(curves.items()):
        unit, at = curve["columns"][-1], 1 if "tokens" in curve["columns"] else 0
        label = f"{kind.replace('_', '-')}: {curve['rows'][-1][-1]:.3f} at the end"
        points = [(row[at], row[-1]) for row in curve["rows"]]
        drawn += places[unit].plot(*zip(*points), label=label, color=f"C{number}", **styles[kind])
    for unit, place in places.items():
        place.set_ylabel(TITLES[unit])
    _leave_out_the_start(axes, [c for c in curves.values() if c["columns"][-1] == units[0]])
    has_tokens = all("tokens" in curve["columns"] for curve in curves.values())
    axes.set_xlabel("tokens trained on" if has_tokens else "step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(handles=drawn)
    canvas.print_png(path)  # savefig draws twice


def _leave_out_the_start(axes, curves):
    """The first steps would squeeze the rest of a long curve into the floor."""
    values = sorted(row[-1] for curve in curves for row in curve["rows"])
    top = min(values[-1], 2.5 * values[len(values) // 2])
    room = 0.05 * (top - values[0]) or 0.5
    axes.set_ylim(values[0] - room, top + room)


def is_number(value):
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_curve(curve):
    if not isinstance(curve, dict) or not is_number(curve.get("every")):
        return False
    columns, rows = curve.get("columns"), curve.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list) or not rows:
        return False
    is_known = (
        columns[:1] == ["step"] and columns[-1] in TITLES and columns[1:-1] in ([], ["tokens"])
    )
    return is_known and all(
        isinstance(row, list) and len(row) == len(columns) and all(map(is_number, row))
        for row in rows
    )
