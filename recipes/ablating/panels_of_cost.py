"""The figures of what models cost: scores by bytes of state, speed and memory by length."""

from .figures import BASELINE, INK, Figure, draw_seeds, panels_of
from .tables import NAMES


def state_bytes(results, task, model):
    """Bytes of a model's state at a task's length, or at the longest that is known; or None."""
    values = results["models"][model]
    per_task = (values.get("per_task") or {}).get(task.name) or {}
    known = per_task.get("state_bytes") or values.get("state_bytes")
    if isinstance(known, dict):
        known = known.get(str(task.length), known[max(known, key=int)]) if known else None
    return known


def states(results, task, dealt):
    """Scores over bytes of state."""
    points = {
        name: (state_bytes(results, task, name), entry.score)
        for name, entry in task.entries.items()
        if state_bytes(results, task, name) and entry.score.mean is not None
    }
    if not points:
        return None
    every = [(size, score.mean) for size, score in points.values()]

    def draw(axes, name, style):
        if style is BASELINE:
            axes.plot(*zip(*every), "o", color=INK, alpha=0.2, ms=4)
        if name not in points:
            return
        size, score = points[name]
        learned = task.entries[name].learned is not False
        axes.errorbar(
            size, score.mean, score.half or 0, color=style["color"], capsize=2, lw=1, alpha=0.7
        )
        axes.plot(
            size,
            score.mean,
            style["marker"],
            color=style["color"],
            ms=7,
            mfc=style["color"] if learned else "none",
            gid=f"mean {name}",
        )
        axes.set(xscale="log", xlabel="bytes of state", ylabel=NAMES[task.metric][0])
        if task.metric == "accuracy":
            axes.set_ylim(-0.03, 1.05)

    caption = (
        "Means over seeds with their 95% intervals; faint dots are the models of other panels."
    )
    if task.control_pairs:
        caption += (
            f" A hollow mark did not learn the easy control of {task.control_pairs} pairs, so that "
            "its accuracy says nothing about its state."
        )
    title = f"{task.name}: {NAMES[task.metric][0]} by bytes of state"
    return Figure(f"states_{task.name}", title, caption, panels_of(dealt, draw))


def measured_speed(model):
    """The lengths of a model that speed was measured at."""
    return [line for line in model.get("speed") or [] if "error" not in line]


def speeds(results, dealt):
    """Throughput and memory over lengths."""
    kinds = {
        "prefill_tokens_per_second": "prefill: tokens per second",
        "training_tokens_per_second": "training: tokens per second",
        "peak_bytes": "peak memory of training (bytes)",
    }
    models, panels = results["models"].values(), []
    measured = sorted({line["length"] for model in models for line in measured_speed(model)})
    for group in dealt:
        for key, label in kinds.items():

            def draw(axes, name, style, key=key, label=label):
                lines = measured_speed(results["models"][name])
                points = [(line["length"], line[key]) for line in lines if line.get(key)]
                if points:
                    draw_seeds(axes, name, style, [points], markers=True)
                axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
                axes.set_xticks(measured, [f"{n:,}" for n in measured])

            if any(measured_speed(results["models"][name]) for name, _ in group):
                panels += panels_of([group], draw, key)
    caption = "One sequence at a time, with nothing else running in the process. {} is grey."
    return Figure("speed", "Throughput and memory by length", caption, panels)
