"""Results as lines of text, and as README.md's tables and plot."""

import json
import math
from pathlib import Path

from ..marked import replaced

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "results"
README = HERE / "README.md"
PLOT = RESULTS / "ratios.svg"


def lines_of(name, entry):
    """A case as lines of text."""
    lines = [f"{name}: {entry['failed']}"] if "failed" in entry else []
    for mode, record in entry.items():
        if not isinstance(record, dict) or "by" not in record:
            continue
        for who, figures in record["by"].items():
            said = f"{name} {mode}, {who}: "
            if "failed" in figures:
                lines.append(f"{said}not timed: {figures['failed']} {figures.get('errors', '')}")
                continue
            said += f"{figures['ms']} ms ({figures['low_ms']} to {figures['high_ms']})"
            said += f", host {figures['host_us']} us, {figures['peak_mb']} MB"
            if "of_floor" in figures:
                said += f", {figures['of_floor']:.0%} of the floor ({record['floor_of']})"
            if "ratio" in figures:
                said += f"; ours is {figures['ratio']}x as fast"
            lines.append(said)
    return lines


def first_call_lines(name, entry):
    return [f"{name} first call, {who}: {x}" for who, x in entry.get("first call", {}).items()]


def fla_of(by):
    """fla's figures; the faster ones, where there are two ways to call it."""
    theirs = [figures for who, figures in by.items() if who.startswith("fla")]
    return min(theirs, key=lambda figures: figures.get("ms", math.inf), default={})


def gpu_table(record):
    """A Markdown table of one GPU's results."""
    rows = [
        "| (B, T, H, K[, V]) | | ours ms | of the floor | error | host us | MB | fla ms | ratio "
        "| wanted | attention ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in record["results"].items():
        for mode in ("forward", "training", "decode"):
            if mode not in entry:
                continue
            by = entry[mode]["by"]
            ours, other = (by.get(who, {}) for who in ("ours", "attention"))
            fla = fla_of(by)
            error = max(ours.get("errors", {}).values(), default="")
            share = f"{ours['of_floor']:.0%}" if "of_floor" in ours else ""
            cells = [name, mode, ours.get("ms", ours.get("failed", "")), share, error]
            cells += [ours.get("host_us", ""), ours.get("peak_mb", "")]
            cells += [fla.get("ms", fla.get("failed", "")), fla.get("ratio", "")]
            cells += [entry[mode].get("target", ""), other.get("ms", "")]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    for name, entry in record["results"].items():
        for who, figures in entry.get("first call", {}).items():
            said = figures.get("failed") or f"{figures['seconds']} s"
            rows.append(f"\nFirst call, nothing compiled, {name}, {who}: {said}.")
    known = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    title = f"**{record['device']}** ({known}): a copy moves {record['copy_tb_per_s']} TB/s, a "
    title += f"bfloat16 matrix product does {record['matmul_tflops']} TFLOP/s."
    return "\n".join([title, "", *rows])


def training_table(record):
    """A Markdown table of training.py's results."""
    rows = [
        "| model | M | (B, T) | ours tokens/s | MFU | GB | fla tokens/s | MFU | GB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in record["models"].items():
        cells = [name, round(entry["parameters"] / 1e6), tuple(entry["batch"])]
        for who in ("ours", "fla"):
            x = entry["by"].get(who, {})
            share = f"{x['mfu']:.0%}" if "mfu" in x else ""
            cells += [x.get("tokens_per_s", x.get("failed", "")), share, x.get("peak_gb", "")]
        cells.append(entry["by"].get("fla", {}).get("ratio", ""))
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    known = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    title = f"**A training step, {record['device']}** ({known}): forward, backward and AdamW."
    return "\n".join([title, "", *rows])


def cpu_table(record):
    """A Markdown table of cpu.py's results."""
    rows = ["| | | ours ms | theirs ms | ratio |", "|---|---|---|---|---|"]
    for name, directions in record["results"].items():
        for direction, figures in directions.items():
            cells = [name, direction, figures["ours_ms"], figures["theirs_ms"], figures["ratio"]]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    title = f"**CPU**, {record['device']}, threads: {record['threads']} (torch {record['torch']}, "
    title += f"transformers {record['transformers']}, commit {record['commit']})."
    return "\n".join([title, "", *rows])


def records(folder=RESULTS):
    """(GPU results, CPU results): the files of run.py and those of cpu.py."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [x for x in found if "results" in x]
    return [x for x in found if "versions" in x], [x for x in found if "versions" not in x]


def tables():
    """The README's part that comes from the result files."""
    gpus, cpus = records()
    parts = [gpu_table(record) for record in gpus] or ["**GPU**: not measured on a GPU yet."]
    trained = sorted(RESULTS.glob("*-training.json"))
    parts += [training_table(json.loads(path.read_text())) for path in trained]
    return "\n\n".join(parts + [cpu_table(record) for record in cpus])


def with_tables(text):
    """The README's text with up-to-date tables between its two markers."""
    return replaced(text, "tables", ["", tables(), ""])


def plot():
    """An SVG image of all ratios, their time over ours, on a logarithmic scale."""
    gpus, cpus = records()
    bars = []
    for record in gpus:
        for name, entry in record["results"].items():
            for mode in ("forward", "training", "decode"):
                ratio = fla_of(entry.get(mode, {}).get("by", {})).get("ratio")
                if ratio:
                    bars.append((f"{record['device']}: {name} {mode}, beside fla", ratio))
    for record in cpus:
        for name, directions in record["results"].items():
            bars += [(f"CPU: {name}, {key}", x["ratio"]) for key, x in directions.items()]
    left, step, row = 560, 70, 22  # where 1x is, pixels for a factor of 2, height of a bar
    right = left + step * math.ceil(math.log2(max(2, *(ratio for _, ratio in bars)))) + 60
    height = row * len(bars) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#777">',
        f'<line x1="{left}" y1="0" x2="{left}" y2="{height - 25}" stroke="#777"/>',
        f'<text x="{left}" y="{height - 8}" text-anchor="middle">as fast</text>',
    ]
    for i, (label, ratio) in enumerate(bars):
        width = step * abs(math.log2(ratio))
        start, y = left if ratio >= 1 else left - width, row * i + 4
        colour = "#4878a8" if ratio >= 1 else "#b05030"
        parts += [
            f'<text x="{min(left, start) - 6:.0f}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{start:.0f}" y="{y}" width="{width:.0f}" height="15" fill="{colour}"/>',
            f'<text x="{max(left, start + width) + 5:.0f}" y="{y + 12}">{ratio}x</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def write_readme():
    """Brings the README's tables and the plot up to date with the result files."""
    README.write_text(with_tables(README.read_text()))
    PLOT.write_text(plot())
