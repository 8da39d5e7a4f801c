"""A sweep's report: report.html, report.md and their figures, from results.json alone."""

import json
import shutil
import textwrap
from pathlib import Path

from . import checks, panels, tables
from .figures import in_page, save_png, svgs
from .summary import summarise

LEGEND = (
    "Scores are means over seeds with their 95% t-intervals; differences are paired by seed, which "
    "share the order of data. Better and worse are said where Holm's p over all models is below "
    "0.05, else not separable; accuracies also differ by more than chance would have it in so many "
    "answers. The learning rate is chosen on a seed of its own."
)


def write(folder, say=print):
    """Writes report.html, report.md and figures/, and prints the table and the checks that failed.

    Args:
        folder: of the sweep, with its results.json, which may be partial.
        say: prints a line.

    Returns:
        The checks, those that failed first.
    """
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tasks = summarise(results)
    content = {
        "name": results["sweep"].get("name", folder.name),
        "results": results,
        "tasks": tasks,
        "checks": checks.run(results, tasks),
        "table": tables.columns(results, tasks),
        "conclusions": tables.conclusions(results, tasks),
        "legend": LEGEND,
        "control": checks.CONTROL,
    }
    content["figures"], content["missing"] = panels.all_figures(results, tasks)
    shutil.rmtree(folder / "figures", ignore_errors=True)  # of an earlier report
    (folder / "figures").mkdir()
    drawn = {}
    for figure in content["figures"]:
        save_png(figure, folder / "figures" / f"{figure.name}.png")
        drawn[figure.name] = svgs(figure)
        for n, svg in enumerate(drawn[figure.name]):
            path = folder / "figures" / f"{figure.name}_{n + 1}.svg"
            path.write_text(svg, encoding="utf-8")
    (folder / "report.md").write_text(markdown(content), encoding="utf-8")
    (folder / "report.html").write_text(html(content, drawn), encoding="utf-8")
    for line in terminal(content):
        say(line)
    say(f"wrote {folder / 'report.html'}, report.md and figures/")
    return content["checks"]


def terminal(content):
    """What is printed, in lines of at most 100 characters."""
    lines = [*tables.terminal(content["table"]), ""]
    for sentence in content["conclusions"]:
        lines += textwrap.wrap(sentence, 100, subsequent_indent="  ")
    lines.append("")
    for check in content["checks"]:
        if check.verdict == checks.FAIL:
            lines.append(f"FAILED  {check.name}")
            for found in check.found:
                lines += textwrap.wrap(found, 92, initial_indent="  ", subsequent_indent="    ")
    return [*lines, summary(content["checks"])]


def summary(made):
    """How many checks there are of each verdict."""
    counts = {verdict: sum(check.verdict == verdict for check in made) for verdict in ORDER}
    return "fairness checks: " + ", ".join(f"{n} {ORDER[v]}" for v, n in counts.items() if n)


ORDER = {checks.FAIL: "failed", checks.NOT_CHECKED: "could not be made", checks.PASS: "passed"}


def command_of(results, model):
    """The trials of a model with their commands, in the order of results.json."""
    return [trial for trial in results["trials"] if trial["model"] == model]


def markdown(content):
    """The text of report.md."""
    results, lines = content["results"], [f"# {content['name']}", ""]
    lines += [tables.markdown(content["table"]), "", content["legend"], ""]
    lines += [f"- {sentence}" for sentence in content["conclusions"]]
    lines += ["", "## Is it fair?", "", summary(content["checks"]) + ".", ""]
    for check in content["checks"]:
        lines.append(f"- **{check.verdict.upper()}** {check.name}")
        lines += [f"  - {found}" for found in check.found]
    if content["missing"]:
        lines += ["", "## What is missing", ""]
        lines += [f"- {sentence}" for sentence in content["missing"]]
    for figure in content["figures"]:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}](figures/{figure.name}.png)"]
        lines += ["", figure.caption]
    lines += ["", "## How it was run", ""]
    for title, text in details(results, content["tasks"]):
        lines += [f"<details><summary>{title}</summary>", "", "```", text, "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def html(content, drawn):
    """The text of report.html.

    Args:
        content: of the report.
        drawn: the SVGs of each figure, by its name.
    """
    from jinja2 import Environment, FileSystemLoader

    inline = {
        name: [in_page(svg, f"{name}{n}") for n, svg in enumerate(texts)]
        for name, texts in drawn.items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    rows = list(zip(*[column.cells for column in content["table"]]))
    return template.render(
        **content,
        rows=rows,
        drawn=inline,
        summary=summary(content["checks"]),
        details=details(content["results"], content["tasks"]),
    )


def by_seed(task):
    """Lines with every score that a model of a task is reported on, and the tests of it."""
    lines = [f"{task.name} ({task.metric})"]
    for model, entry in task.entries.items():
        said = [f"seed {seed} {score:.6g}" for seed, score in entry.score.values.items()]
        if entry.holm_p is not None:
            of_seeds = ", ".join(f"{x:+.4g}" for x in entry.difference.values.values())
            said.append(f"differences {of_seeds}")
            said.append(f"p {entry.difference.p:.2g}, Holm's p {entry.holm_p:.2g}")
        lines.append(f"  {model}: {'; '.join(said) or 'no trial'}")
    return lines


def details(results, tasks):
    """(title, text) of what is folded away: scores by seed, the sweep, models, each command."""

    def pretty(value):
        return json.dumps(value, indent=1, sort_keys=True)

    scores = "\n".join(line for task in tasks.values() for line in by_seed(task))
    folded = [("scores by seed, p-values", scores), ("the sweep", pretty(results["sweep"]))]
    folded.append(("machine and versions", pretty(results.get("environment", "not recorded"))))
    for name, values in results["models"].items():
        trials = command_of(results, name)
        parts = ["commands:"]
        for trial in trials:
            what = f"{trial['task']}, {trial['learning_rate']:g}, seed {trial['seed']}"
            said = trial.get("command") or "not recorded"
            said = said if isinstance(said, str) else " ".join(said)
            parts.append(f"  {what} ({trial['role']}, {trial['status']})\n    {said}")
        own = {key: value for key, value in values.items() if key != "speed"}
        recipes = {trial["task"]: trial.get("recipe") for trial in trials}
        parts += ["", "model:", pretty(own)]
        for task, recipe in recipes.items():
            parts += ["", f"recipe of the last trial on {task}:", pretty(recipe)]
        folded.append((f"{name}: commands, model, recipes", "\n".join(parts)))
    return folded
