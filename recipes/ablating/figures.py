"""How a report draws: panels that hold few models each, as SVG one by one and as PNG together.

Thirteen lines in one panel cannot be told apart, so the models are dealt out to panels in the order
of the sweep, four or fewer to each, with the baseline behind them in every one. A model is known by
its label at the line's end, its line style and its marker; colour only helps.
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

PER_PANEL = 4
SIZE = (4.4, 3.3)  # of a panel, in inches
LEFT, BOTTOM, TOP = 0.16, 0.145, 0.915  # of its axes, in parts of the panel
INK, PAPER = "#1f2328", "#fefefe"  # replaced in SVG that stands in a page, which may be dark
# Of one lightness, which shows on white and on black.
STYLES = [
    {"color": "#2f7fd1", "ls": "-", "marker": "o"},
    {"color": "#d9730d", "ls": "--", "marker": "s"},
    {"color": "#1a9e77", "ls": "-.", "marker": "^"},
    {"color": "#b45ccf", "ls": (0, (1, 1)), "marker": "D"},
]
BASELINE = {"color": "#8a8f98", "ls": "-", "marker": "x"}
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: it is small, and can be searched and read aloud
    "svg.hashsalt": "ablations",  # the same results give the same bytes
}


@dataclass
class Panel:
    """One pair of axes: `draw(axes)` fills it.

    Panels of a figure that have the same word in `shares` get the same limits, to be compared.
    """

    title: str
    draw: Callable
    shares: str = ""


@dataclass
class Figure:
    """Panels that belong together, side by side in a report.

    Attributes:
        name: of its files.
        title: above it.
        caption: what is to be seen, and how it was measured.
        panels: to read in this order.
    """

    name: str
    title: str
    caption: str
    panels: list


def short(value):
    """A number with three digits and a prefix: 1.23M."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def groups(models, baseline):
    """The models dealt out to panels: lists of (name, style), each with the baseline first."""
    others = [name for name in models if name != baseline]
    if not others:
        return [[(baseline, BASELINE)]]
    count = math.ceil(len(others) / PER_PANEL)
    size = math.ceil(len(others) / count)
    cut = [others[n : n + size] for n in range(0, len(others), size)]
    return [[(baseline, BASELINE), *zip(part, STYLES)] for part in cut]


def group_title(group):
    """The models of a panel but the baseline, as far as there is room."""
    names = ", ".join(name for name, _ in group[1:]) or group[0][0]
    return names if len(names) < 54 else names[:52] + " …"


def panels_of(dealt, draw, shares=""):
    """One panel for each group, in which `draw(axes, name, style)` draws a model."""
    panels = []
    for group in dealt:

        def fill(axes, group=group):
            for name, style in group:
                draw(axes, name, style)

        panels.append(Panel(group_title(group), fill, shares))
    return panels


def draw_seeds(axes, name, style, curves, markers=False):
    """Draws a model: each seed thin, their mean thick.

    Args:
        axes: of matplotlib.
        name: of the model, which its line's end is labelled with.
        style: of `groups`.
        curves: one for each seed, lists of (x, y).
        markers: whether the points are few enough to be marked.
    """
    is_baseline = style is BASELINE
    for curve in curves if len(curves) > 1 else []:
        axes.plot(*zip(*curve), color=style["color"], lw=0.6, alpha=0.55)
    mean = [  # seeds are measured at the same steps
        [sum(values) / len(values) for values in zip(*points)] for points in zip(*curves)
    ]
    axes.plot(
        *zip(*mean),
        color=style["color"],
        ls=style["ls"],
        lw=3 if is_baseline else 1.6,
        alpha=0.6 if is_baseline else 1,
        marker=style["marker"] if markers else None,
        ms=4,
        gid=f"mean {name}",
    )


def _name(line):
    """The model that a line is the mean of; empty for other lines."""
    return str(line.get_gid() or "").partition("mean ")[2]


def label_ends(axes, gap=0.085):
    """Writes the name of each model beside the end of its line, with none on top of another."""
    named = [line for line in axes.lines if _name(line)]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(*to_axes.transform(line.get_xydata()[-1]), line) for line in named]
    ends.sort(key=lambda end: end[1])
    # Up from below with a distance, then down again from the top where that went too high.
    heights = []
    for _, y, _ in ends:
        y = min(max(y, 0.0), 1.0)
        heights.append(max(y, heights[-1] + gap if heights else 0.0))
    limit = max(0.98, (len(heights) - 1) * gap)
    for n in reversed(range(len(heights))):
        heights[n] = min(heights[n], limit)
        limit = heights[n] - gap
    for height, (x, y, line) in zip(heights, ends):
        color, place = line.get_color(), {"transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.035], [y, height], color=color, lw=0.8, alpha=0.7, **place)
        axes.text(1.045, height, _name(line), va="center", fontsize=8.5, **place)


def _log_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 3 else (1,)
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 0.7 else steps
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(ticks, [short(tick) for tick in ticks])


def _ticks_width(axes):
    """Characters of the longest number beside the vertical axis."""
    return max((len(label.get_text()) for label in axes.get_yticklabels()), default=0)


def _fill(panels, all_axes, columns=1, rows=1):
    """Draws panels: limits are shared, and there is room for the longest label."""
    from matplotlib.ticker import FixedLocator

    for panel, axes in zip(panels, all_axes):
        axes.grid(color=BASELINE["color"], alpha=0.25, lw=0.6)
        axes.set_title(panel.title, loc="left", x=-0.13)
        panel.draw(axes)
    shown = list(zip(panels, all_axes))
    limits = [(panel.shares, axes.get_xlim(), axes.get_ylim()) for panel, axes in shown]
    names = [_name(line) for _, axes in shown for line in axes.lines if _name(line)]
    room = min(0.45, 0.04 + 0.0165 * max(map(len, names), default=0))
    for panel, axes in shown:
        xs, ys = zip(*[(x, y) for shares, x, y in limits if shares == panel.shares])
        axes.set_xlim(min(low for low, _ in xs), max(high for _, high in xs))
        axes.set_ylim(min(low for low, _ in ys), max(high for _, high in ys))
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axes.minorticks_off()
                if not isinstance(axis.get_major_locator(), FixedLocator):
                    _log_ticks(axis)
    # Constrained layout would measure every text for the same.
    begin = LEFT + 0.013 * max(0, max(map(_ticks_width, all_axes)) - 4)
    for n, axes in enumerate(all_axes):
        row, column = n // columns % rows, n % columns
        left, bottom = (column + begin) / columns, (rows - 1 - row + BOTTOM) / rows
        axes.set_position([left, bottom, (1 - begin - room) / columns, (TOP - BOTTOM) / rows])
        label_ends(axes)


def svgs(figure):
    """Each panel of a figure as an SVG file's text."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    texts = []
    with matplotlib.rc_context(SETTINGS):
        canvases = [Canvas(figsize=SIZE) for _ in figure.panels]
        _fill(figure.panels, [canvas.add_subplot() for canvas in canvases])
        for canvas, panel in zip(canvases, figure.panels):
            file = io.StringIO()
            canvas.savefig(file, format="svg", metadata={"Date": None, "Title": panel.title})
            texts.append(_shorter(file.getvalue()))
    return texts


def save_png(figure, path, columns=3):
    """All panels of a figure as one PNG."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    with matplotlib.rc_context(SETTINGS):
        canvas = Canvas(figsize=(SIZE[0] * columns, SIZE[1] * rows))
        _fill(figure.panels, [canvas.add_axes((0, 0, 1, 1)) for _ in figure.panels], columns, rows)
        canvas.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _shorter(svg):
    """With paths to a hundredth of a point."""
    return re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)


def in_page(svg, prefix):
    """An SVG that stands in a page: in the page's ink, on its paper, with ids of its own.

    Args:
        svg: a file's text.
        prefix: that no other SVG of the page has.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", svg)
