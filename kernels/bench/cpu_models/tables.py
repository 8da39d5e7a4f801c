"""The results of models.py as README.md's tables, and which targets they meet."""

import statistics
from pathlib import Path

from zoo import MODELS

from ..marked import replaced
from .contenders import COMPILED, MISTRAL
from .tasks import LENGTH

README = Path(__file__).resolve().parents[1] / "README.md"
LARGE = "12 x 768"
# Key of a case -> (heading, what seconds are multiplied with to be in its unit).
COLUMNS = {
    "prefill": ("prefill, us a token", 1e6 / LENGTH),
    "step 1": ("step, ms", 1e3),
    "generate 1": ("`generate`, ms", 1e3),
    "step 8": ("step of 8, ms", 1e3),
    "generate 8": ("`generate` of 8, ms", 1e3),
    "training": ("training, ms", 1e3),
}
PACKAGE = {"rwkv4": "rwkv package RWKV-4", "rwkv7": "rwkv package RWKV-7"}
FLOOR, TRAINING = 0.7, 1.5  # targets


def key(size, dtype, task, group):
    """What a case is called in the result file."""
    return f"{size}, {dtype}, {task}, {group}"


def by_row(record):
    """{(size, dtype): {contender: {task: figures}}}; Mistral's are medians over its groups."""
    found, reference, shares = {}, {}, {}
    for name, entry in record["cases"].items():
        size, dtype, task, group = name.split(", ")
        if group == "compiled":
            continue
        rows = found.setdefault((size, dtype), {MISTRAL: {}})
        for contender, figures in entry["by"].items():
            if contender == MISTRAL:
                of_task = reference.setdefault((size, dtype, task), [])
                of_task += [figures["seconds"]] if "seconds" in figures else []
                of_share = shares.setdefault((size, dtype, task), [])
                of_share += [figures["share"]] if "share" in figures else []
            else:
                rows.setdefault(contender, {})[task] = figures
    for (size, dtype, task), seconds in reference.items():
        if seconds:
            middle = {"seconds": statistics.median(seconds), "ratio": 1.0}
            if shares[size, dtype, task]:
                middle["share"] = statistics.median(shares[size, dtype, task])
            found[size, dtype][MISTRAL][task] = middle
    return found


def misses(contender, task, figures, size):
    """Whether a cell of ours is short of a target: Mistral's speed, or the floor of decoding."""
    if contender not in MODELS or "seconds" not in figures:
        return False
    is_slow = round(figures.get("ratio", 1), 2) < 1
    is_step = task == "step 1" and size == LARGE
    return is_slow or is_step and round(figures.get("share", 1), 2) < FLOOR


def digits(value):
    """Three digits, and all of a number above 100."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell(contender, task, figures, size):
    """Time, ratio and share: "12.3; 1.05; 71%", bold where it misses a target."""
    if not figures:
        return ""
    if "failed" in figures:
        return "failed"
    said = [digits(figures["seconds"] * COLUMNS[task][1])]
    said += [f"{figures['ratio']:.2f}"] if "ratio" in figures else []
    said += [f"{figures['share']:.0%}"] if "share" in figures else []
    text = "; ".join(said)
    return f"**{text}**" if misses(contender, task, figures, size) else text


def table(size, dtype, rows, models):
    """Markdown of one size and type."""
    lines = ["| | M | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
    lines += ["|---" * (2 + len(COLUMNS)) + "|"]
    for contender, tasks in rows.items():
        known = models.get(f"{size}, {contender}", {}).get("parameters")
        cells = [contender, f"{known / 1e6:.1f}" if known else ""]
        cells += [cell(contender, task, tasks.get(task), size) for task in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"**{size}, {dtype}**", "", *lines])


def targets(record):
    """Lines: of each target, how many meet it, and who misses it by how much."""
    lines = []
    for (size, dtype), rows in sorted(by_row(record).items()):
        own = {name: tasks for name, tasks in rows.items() if name in MODELS}
        if size == LARGE:
            shares = {n: x["step 1"]["share"] for n, x in own.items() if has(x, "step 1", "share")}
            lines += verdict(f"a step at {FLOOR:.0%} of its floor", size, dtype, shares, FLOOR)
        for task, (heading, _) in COLUMNS.items():
            ratios = {n: x[task]["ratio"] for n, x in own.items() if has(x, task, "ratio")}
            wanted = f"no slower than Mistral, {heading.split(',')[0]}"
            lines += verdict(wanted, size, dtype, ratios, 1)
        for task in ("prefill", "step 1"):
            both = {n: (own.get(n, {}), rows.get(x, {})) for n, x in PACKAGE.items()}
            ratios = {
                n: theirs[task]["seconds"] / ours[task]["seconds"]
                for n, (ours, theirs) in both.items()
                if has(ours, task, "seconds") and has(theirs, task, "seconds")
            }
            wanted = f"the `rwkv` package's speed, {COLUMNS[task][0].split(',')[0]}"
            lines += verdict(wanted, size, dtype, ratios, 1)
        pair = [own.get(name, {}) for name in ("rwkv7", "rwkv5")]
        if all(has(x, "training", "seconds") for x in pair):
            seven, five = (x["training"]["seconds"] for x in pair)
            short = {"rwkv7": TRAINING * five / seven}
            wanted = f"RWKV-7 trains within {TRAINING} times RWKV-5's step"
            lines += verdict(wanted, size, dtype, short, 1)
    return lines


def has(tasks, task, field):
    return field in tasks.get(task, {})


def verdict(wanted, size, dtype, values, least):
    """A row: who meets a target, and the others with their figures."""
    if not values:
        return []
    missed = {name: x for name, x in values.items() if round(x, 2) < least}
    said = ", ".join(f"{name} {x:.2f}" for name, x in sorted(missed.items(), key=lambda i: i[1]))
    met = f"{len(values) - len(missed)} of {len(values)}"
    return [f"| {wanted} | {size}, {dtype} | {met} | {said} |"]


def tables(record):
    """The README's part that comes from the result file."""
    commits = sorted({entry["commit"] or "none" for entry in record["cases"].values()})
    versions = ", ".join(f"{name} {x}" for name, x in record["versions"].items())
    parts = [
        f"**{record['device']}**, one thread ({versions}; commit {', '.join(commits)}): "
        f"{measured(record)}.",
        "\n".join(["| target | | met by | missed by |", "|---|---|---|---|", *targets(record)]),
    ]
    for (size, dtype), rows in sorted(by_row(record).items()):
        parts.append(table(size, dtype, rows, record["models"]))
    parts += compiled_table(record)
    return "\n\n".join(parts)


def compiled_table(record):
    """What torch.compile gives: time, and how many times as fast as the same without; or []."""
    lines = []
    for name, entry in record["cases"].items():
        size, dtype, task, group = name.split(", ")
        for who, x in entry["by"].items() if group == "compiled" else ():
            plain = entry["by"].get(who.removesuffix(COMPILED), {})
            if not who.endswith(COMPILED):
                continue
            heading, unit = COLUMNS[task]
            cells = [who.removesuffix(COMPILED), f"{size}, {dtype}", heading]
            if "seconds" in x and "seconds" in plain:
                cells += [digits(plain["seconds"] * unit), digits(x["seconds"] * unit)]
                cells += [f"{plain['seconds'] / x['seconds']:.2f}"]
            else:
                cells += ["", "failed", ""]
            lines.append("| " + " | ".join(cells) + " |")
    heads = ["| `torch.compile` | | | without | with | ratio |", "|---|---|---|---|---|---|"]
    return ["\n".join(heads + lines)] if lines else []


def measured(record):
    """The machine's ceilings, as medians over the cases."""
    found = {}
    for entry in record["cases"].values():
        for name, x in entry["ceilings"].items():
            found.setdefault(name, []).append(x)
    said = {name: statistics.median(x) / 1e9 for name, x in found.items()}
    units = {"product": "GFLOP/s", "vector": "GB/s"}
    return ", ".join(f"{name} {x:.1f} {units[name.split()[0]]}" for name, x in said.items())


def with_tables(text, record):
    """The README's text with up-to-date tables between its two markers."""
    return replaced(text, "models", ["", tables(record), ""])
