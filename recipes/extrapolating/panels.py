"""The figures of a study: losses by length, recall by distance."""

from pathlib import Path

from ablating.figures import BASELINE, INK, STYLES, Figure, Panel, draw_seeds, save_png

from .summary import curves, documents

FIGURES = "figures"
GUESS = 0.1  # of a digit
# measure -> (file, title of the y axis, title of the x axis)
DRAWN = {
    "in_context": ("contexts", "bits per byte of the same bytes", "tokens of context"),
    "by_distance": ("recall", "share of digits that are right", "tokens from key to question"),
}
BY_SEGMENT = (
    "segments",
    "share of digits that are right",
    "segments from the key's to the question's",
)


def dealt(results):
    """The ways of each panel with their styles, by the panel's title; the baseline is in all.

    A title of more ways than there are styles goes on in further panels.
    """
    (first, _), *others = results["ways"].items()
    panels = {}
    for name, way in others:
        panels.setdefault(way["panel"], []).append(name)
    found = []
    for title, names in panels.items():
        for n in range(0, len(names), len(STYLES)):
            part = names[n : n + len(STYLES)]
            found.append((title, [(first, BASELINE), *zip(part, STYLES)]))
    return found or [("", [(first, BASELINE)])]


def figure_of(results, measure):
    """The `Figure` of a measure, None if nothing was measured."""
    study, ways = results["study"], results["ways"]
    file, y_title, x_title = DRAWN[measure]
    trained = study["lengths"][0]

    def fill(axes, group):
        for name, style in group:
            found = list(curves(ways[name], measure).values())
            if found:
                draw_seeds(axes, name, style, found, markers=True)
        axes.set(xscale="log", xlabel=x_title, ylabel=y_title)
        ticks = study["lengths"]
        if measure == "by_distance":
            far = study["distances"][-1]
            ticks = [4**n * trained for n in range(-9, 9) if 16 <= 4**n * trained < 2 * far]
            axes.set_ylim(-0.03, 1.03)
            axes.axhline(GUESS, color=INK, lw=0.8, ls=":")
        axes.set_xticks(ticks, [f"{n:,.0f}" for n in ticks])
        axes.axvline(trained, color=INK, lw=0.8, ls=":")

    if not any(way.get(measure) for way in ways.values()):
        return None
    panels = [
        Panel(title, lambda axes, group=group: fill(axes, group), "all")
        for title, group in dealt(results)
        if any(ways[name][measure] for name, _ in group[1:] or group)
    ]
    return Figure(file, "", "", panels)


def segments_figure(results):
    """Recall by segments, a row of panels for each title and a column for each length."""
    study, ways = results["study"], results["ways"]
    file, y_title, x_title = BY_SEGMENT

    def panel(title, group, length):
        last = length // study["segment_length"] - 1

        def fill(axes):
            for name, style in group:
                found = list(curves(ways[name], "digits_by_segment", length).values())
                if found:
                    draw_seeds(axes, name, style, found, markers=True)
            axes.set(xlabel=x_title, ylabel=y_title, ylim=(-0.03, 1.03))
            axes.axhline(GUESS, color=INK, lw=0.8, ls=":")
            axes.set_xticks(range(0, last + 1, max(1, (last + 1) // 8)))

        title = ": ".join(filter(None, (title, documents(study, length))))
        return Panel(title, fill, str(length))

    if not any(way.get("digits_by_segment") for way in ways.values()):
        return None
    panels = [
        panel(title, group, length)
        for title, group in dealt(results)
        if any(ways[name]["digits_by_segment"] for name, _ in group[1:] or group)
        for length in study["lengths"]
    ]
    return Figure(file, "", "", panels)


def draw(results, folder):
    """Writes a PNG for each measure there is; returns their paths."""
    folder = Path(folder) / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    figures = {measure: (figure_of(results, measure), 2) for measure in DRAWN}
    figures["by_segment"] = segments_figure(results), len(results["study"]["lengths"])
    paths = []
    for figure, columns in figures.values():
        if figure:
            paths.append(folder / f"{figure.name}.png")
            save_png(figure, paths[-1], columns)
    return paths
