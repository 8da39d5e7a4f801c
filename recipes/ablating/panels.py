"""The figures of a report: which there are, and those of scores."""

import math
import re

from .figures import BASELINE, INK, Figure, draw_seeds, groups, panels_of
from .panels_of_cost import measured_speed, speeds, states
from .summary import last_figures, numbered, synthetic
from .tables import NAMES

THIN = "Thin lines are seeds, thick ones their mean; {} is grey and in every panel."


def all_figures(results, tasks):
    """The figures that there is something to draw for, and sentences on those there is not."""
    figures, missing = [], []
    baseline = results["sweep"]["sweep"]["baseline"]
    dealt = groups(results["models"], baseline)
    for task in tasks.values():
        found = [rates(task, dealt), losses(task, dealt), *lengths(task, dealt)]
        found += [tests(results, task, dealt), states(results, task, dealt)]
        figures += [figure for figure in found if figure and figure.panels]
        if not any(entry.trials for entry in task.entries.values()):
            missing.append(f"{task.name}: no model has a trial that is reported on")
    speed = speeds(results, dealt)
    figures += [speed] if speed.panels else []
    slow = [name for name, model in results["models"].items() if not measured_speed(model)]
    if slow:
        missing.append(f"throughput and memory by length were not measured: {', '.join(slow)}")
    for figure in figures:
        figure.caption = figure.caption.replace("{}", baseline)
    return figures, missing


def rates(task, dealt):
    """Scores over learning rates, on the seed that rates are chosen on."""
    edge = 1 if task.lower_is_better else 0  # the worse one
    every = sorted({rate for entry in task.entries.values() for rate in entry.choice.scores})
    if not every:
        return None

    def draw(axes, name, style):
        axes.set(xscale="log", xlabel="learning rate", ylabel=NAMES[task.metric][0])
        choice = task.entries[name].choice
        points = [point for point in choice.scores.items() if math.isfinite(point[1])]
        if points:
            draw_seeds(axes, name, style, [points], markers=True)
            best = choice.rate, choice.scores[choice.rate]
            axes.plot(*best, "o", ms=10, mfc="none", mec=style["color"], mew=1.4)
        seeds = list(task.entries[name].score.values.values())
        axes.plot([choice.rate] * len(seeds), seeds, ".", color=style["color"], ms=4)
        for rate in choice.diverged:
            mark = {"color": style["color"], "mfc": "none", "clip_on": False}
            axes.plot(rate, edge, style["marker"], transform=axes.get_xaxis_transform(), **mark)
        axes.set_xticks(every, [f"{rate:g}" for rate in every])

    caption = (
        "Scores on the seed that rates are chosen on. A ring is the best rate, dots are the seeds "
        "reported on. {} is grey and in every panel."
    )
    diverged = [
        f"{name} at {', '.join(f'{rate:g}' for rate in entry.choice.diverged)}"
        for name, entry in task.entries.items()
        if entry.choice.diverged
    ]
    if diverged:
        caption += f" Hollow marks at the edge diverged: {'; '.join(diverged)}."
    return Figure(
        f"rates_{task.name}", f"{task.name}: learning rates", caption, panels_of(dealt, draw)
    )


def losses(task, dealt):
    """Training loss over tokens, FLOPs and time."""
    panels = []

    def axis(kind):
        def place(trial, point):
            _, tokens, seconds, _ = point
            flops = trial.get("training_flops_per_token")
            return {"tokens": tokens, "seconds": seconds, "FLOPs": flops and flops * tokens}[kind]

        def draw(axes, name, style):
            curves = [
                [(place(trial, point), point[3]) for point in trial["curve"] if point[1]]
                for trial in task.entries[name].trials.values()
                if trial.get("curve") and None not in trial["curve"][-1]
            ]
            curves = [curve for curve in curves if curve and curve[0][0] is not None]
            if curves:
                draw_seeds(axes, name, style, curves)
            axes.set(xscale="log", yscale="log", ylabel="training loss (nats per token)")
            axes.set_xlabel(
                {"tokens": "tokens", "seconds": "seconds", "FLOPs": "training FLOPs"}[kind]
            )

        return draw

    if any(
        trial.get("curve") for entry in task.entries.values() for trial in entry.trials.values()
    ):
        for group in dealt:
            for kind in ("tokens", "FLOPs", "seconds"):
                panels += panels_of([group], axis(kind), kind)
    caption = f"At the best rate of each. {THIN}"
    return Figure(f"loss_{task.name}", f"{task.name}: training loss", caption, panels)


def _by_number(task, dealt, prefix, own=None):
    """(names with figures, draw) of what is measured at several settings of a test."""

    def curves(name):
        found = []
        for trial in task.entries[name].trials.values():
            figures = numbered(last_figures(trial), prefix)
            if own is not None and figures:
                figures = dict(sorted({**figures, own: last_figures(trial)[task.metric]}.items()))
            found += [list(figures.items())] if figures else []
        return found

    def draw(axes, name, style):
        if curves(name):
            draw_seeds(axes, name, style, curves(name), markers=True)

    return {n for name in task.entries for curve in curves(name) for n, _ in curve}, draw


def lengths(task, dealt):
    """Bits per byte by context length: of the same targets, and of all text in windows."""
    contexts = _by_number(task, dealt, "bits_per_byte_in_context")
    title = f"{task.name}: bits per byte of the same targets, by context length"
    yield _of_lengths(task, dealt, *contexts, f"contexts_{task.name}", title, "tokens of context")
    windows = _by_number(task, dealt, "bits_per_byte_at", task.length)
    title = f"{task.name}: bits per byte of all held-out text, by length of windows"
    yield _of_lengths(task, dealt, *windows, f"lengths_{task.name}", title, "tokens of a window")


def _of_lengths(task, dealt, numbers, draw_model, name, title, label):
    if not numbers:
        return None

    def draw(axes, model, style):
        draw_model(axes, model, style)
        axes.set(xscale="log", ylabel="bits per byte of held-out text")
        if style is BASELINE:
            _mark(axes, label, task.length)
        axes.set_xticks(sorted(numbers), [f"{n:,}" for n in sorted(numbers)])

    return Figure(name, title, THIN, panels_of(dealt, draw))


def _mark(axes, label, trained):
    """Names the horizontal axis, and draws a line where training was."""
    if trained:
        axes.axvline(trained, color=INK, lw=1, ls=":")
        label += f" (dotted: trained with {trained:,})"
    axes.set_xlabel(label)


def tests(results, task, dealt):
    """Accuracy by the number that a test is named for, such as pairs."""
    numbers, draw_model = _by_number(task, dealt, "accuracy")
    if not numbers:
        return None
    names = [
        name
        for entry in task.entries.values()
        for trial in entry.trials.values()
        for name in last_figures(trial)
    ]
    what = next(re.findall(r"([a-z]+)_\d+$", n) for n in names if n.startswith("accuracy/"))
    what = what[0] if what else "setting of the test"
    trained = synthetic(results, task.name).get(what)

    def draw(axes, name, style):
        draw_model(axes, name, style)
        axes.set(ylabel="accuracy", ylim=(-0.03, 1.05))
        axes.set_xticks(sorted(numbers))
        if style is BASELINE:
            _mark(axes, what, trained)

    title = f"{task.name}: accuracy by {what}"
    return Figure(f"tests_{task.name}", title, THIN, panels_of(dealt, draw))
