"""The figures that recipes draw."""

import itertools
import math
import os
from pathlib import Path


def plot_loss(path, lines, gzip_bits_per_byte, title):
    """Draws train and held-out bits per byte over training tokens, and gzip's as a line.

    Args:
        path: the PNG.
        lines: of metrics.jsonl.
        gzip_bits_per_byte: of `gzip -9` on the held-out bytes.
        title: above the plot.
    """
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {
        "train": {"lw": 1, "alpha": 0.6},
        "held_out": {"lw": 2, "marker": "o", "ms": 4},
    }
    values = []
    for kind, style in styles.items():
        chosen = [line for line in lines if line["kind"] == kind]
        points = [(line["tokens"], line["bits_per_byte"]) for line in chosen]
        if points:
            label = f"{kind.replace('_', '-')}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points), label=label, **style)
            values += [value for _, value in points]
    axes.axhline(
        gzip_bits_per_byte,
        color="black",
        ls="--",
        lw=1,
        label=f"gzip -9 of the held-out text, {gzip_bits_per_byte:.3f}",
    )
    if values:
        # The first steps would squeeze the rest of the curve into the floor.
        top = min(max(values), 2 * max(gzip_bits_per_byte, sorted(values)[len(values) // 2]))
        axes.set_ylim(0.9 * min([*values, gzip_bits_per_byte]), 1.02 * top)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("bits per byte")
    axes.xaxis.set_major_formatter(lambda value, _: _si(value))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    beside = Path(path).with_name(Path(path).name + ".new")
    canvas.print_png(beside)  # savefig draws twice
    os.replace(beside, path)


def plot_task(path, lines, title):
    """Draws the loss of a task and the accuracy of each of its tests over training tokens.

    Args:
        path: the PNG.
        lines: of metrics.jsonl.
        title: above the plot.
    """
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    trained = [line for line in lines if line["kind"] == "train"]
    tested = [line for line in lines if line["kind"] == "held_out"]
    left.plot([x["tokens"] for x in trained], [x["loss"] for x in trained], color="0.3", lw=1)
    left.set(ylabel="training loss (nats per target)", ylim=(0, None))
    names = [name for name in (tested[-1] if tested else {}) if name.startswith("accuracy")]
    for name, marker in zip(names, itertools.cycle("osD^v<>Px*")):
        points = [(line["tokens"], line[name]) for line in tested if name in line]
        own = name == "accuracy"
        label = "as in training" if own else name.partition("/")[2].replace("_", " ")
        right.plot(
            *zip(*points),
            label=f"{label}, {points[-1][1]:.3f} at the end",
            color="black" if own else None,
            lw=2 if own else 1,
            marker=marker,
            ms=5,
        )
    right.set(ylabel="share of targets that are right", ylim=(-0.02, 1.02))
    if names:
        right.legend()
    for axes in (left, right):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(lambda value, _: _si(value))
        axes.grid(alpha=0.3)
    beside = Path(path).with_name(Path(path).name + ".new")
    canvas.print_png(beside)  # savefig draws twice
    os.replace(beside, path)


def plot_streaming(path, result):
    """Draws perplexity by position, and bytes of state by tokens generated."""
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    window, num_sinks = result["sliding_window"], result["num_sink_tokens"]
    # Thin over thick, so that lines on one another are all seen.
    styles = {
        "sinks": (f"a window of {window:,} and {num_sinks} sinks", "C0", "-", 5),
        "beside": ("a plain window, trained as such", "0.4", ":", 2),
        "evicted": ("the same weights without sinks, first tokens evicted", "C3", "-", 1.5),
    }
    lowest, highest = [], []
    for name in [name for name in styles if name in result["curves"]]:
        label, color, line, width = styles[name]
        early, late, compared = (result["curves"][name][k] for k in ("early", "late", "compared"))
        middles, values = [], []
        for measured, begin in ((early, 0), (late, len(early["perplexity"]) * early["width"])):
            for n, value in enumerate(measured["perplexity"]):
                if n * measured["width"] >= begin:
                    middles.append((n + 0.5) * measured["width"])
                    values.append(value)
        near, far, ratio = compared
        label += f": {compared[ratio]:.4f}"
        left.plot(
            middles, values, label=label, color=color, ls=line, lw=width, marker="o", ms=width
        )
        lowest.append(min(values))
        highest.append(max(values))
    left.axvline(window, color="black", lw=1, ls=":")
    left.annotate(" the window is full", (window, 0.02), xycoords=("data", "axes fraction"))
    left.set(xscale="log", ylabel=f"perplexity per {result['token']}")
    # A collapse needs a logarithm; else the axis begins low enough that rounding is no slope.
    if max(highest) > 3 * min(lowest):
        left.set_yscale("log")
    else:
        left.set_ylim(0.9 * min(lowest), 1.15 * max(highest))
    left.set_xlabel(f"position in the stream ({result['token']}s)")
    left.set_title("The same held-out text at every position")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.legend(title=f"perplexity at {int(far):,} over that at {int(near):,}", loc="upper right")
    records = result["generation"]["records"]
    tokens = [record["tokens"] for record in records]
    held = [record["state_bytes"] / 1e6 for record in records]
    right.plot(tokens, held, color="C0", lw=2, marker="o", ms=3, label="the cache, measured")
    every = [
        result["generation"]["bytes_per_token_of_full_attention"] * count / 1e6 for count in tokens
    ]
    right.plot(tokens, every, color="0.4", ls="--", label="keys and values of all tokens")
    right.set(xscale="log", yscale="log", ylabel="state (MB)")
    right.set_xlabel(f"{result['token']}s generated, one by one")
    right.set_title("The state while it generates")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def plot_by_position(path, result):
    """Draws bits per byte by position: each run thin, the mean of each kind thick."""
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = {
        "windows": "each window begins anew",
        "carried": "states carried from window to window",
    }
    for color, (name, label) in zip(("0.4", "C0"), names.items()):
        curves = [curve["bits_per_byte"] for curve in result["curves"][name]]
        middles = [(n + 0.5) * result["width"] for n in range(len(curves[0]))]
        for curve in curves:
            axes.plot(middles, curve, color=color, lw=0.8, alpha=0.5)
        mean = [sum(values) / len(values) for values in zip(*curves)]
        label += f": {mean[-1]:.4f} at the end"
        axes.plot(middles, mean, color=color, lw=2.5, marker="o", ms=4, label=label)
    axes.axvline(result["window"], color="black", lw=1, ls=":")
    axes.annotate(" a window", (result["window"], 0.97), xycoords=("data", "axes fraction"))
    axes.set(xlabel="position in the stream (tokens)", ylabel="bits per byte of held-out text")
    axes.set_title(f"{result['architecture']}, trained in windows of {result['window']} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def plot_reference(path, records):
    """Draws the runs of each demo in a panel of its own: every seed, and what was held out.

    Demos differ in the tokens of a step, so the panels share an axis of tokens.

    Args:
        path: the PNG.
        records: demo -> what reference.py wrote of it.
    """
    # Without pyplot there is no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, record) in zip(panels, records.items()):
        ends, recipe = [], record["recipe"]
        per_step = recipe["batch_size"] * recipe["sequence_length"]
        for number, curve in enumerate(record["curves"]):
            bits = [value / math.log(2) for value in curve["loss"]]
            tokens = [step * per_step for step in range(1, len(bits) + 1)]
            axes.plot(tokens, bits, color=f"C{number}", lw=0.5, alpha=0.6)
            steps, values = zip(*curve["held_out_bits_per_byte"].items())
            tokens = [int(step) * per_step for step in steps]
            axes.plot(tokens, values, color=f"C{number}", marker="o", ms=4, lw=1)
            ends.append(values[-1])
        axes.set_title(f"{name}: {min(ends):.3f} to {max(ends):.3f}", fontsize=10)
        axes.set_ylim(1.4, 5)
        axes.xaxis.set_major_formatter(lambda value, _: _si(value))
        axes.grid(alpha=0.3)
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(records) - columns) : len(records)]:  # none has one below it
        axes.tick_params(labelbottom=True)
    figure.supxlabel("training tokens")
    figure.supylabel("bits")
    figure.suptitle(
        "Three seeds: bits per token of each step, and per byte of held-out text (dots; the last "
        "in titles)",
        fontsize=11,
    )
    figure.savefig(path, format="png")


def _si(value):
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
