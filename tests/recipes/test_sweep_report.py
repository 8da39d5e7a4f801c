"""The report is whole, says what is missing, and reaches for nothing outside itself."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from made_results import MODELS, made_results

from ablating import panels, report, tables
from ablating.figures import Figure, Panel, groups, in_page, label_ends, save_png, svgs
from ablating.statistics import interval
from ablating.summary import last_figures, summarise

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """Whether tags are closed in order, and what the page says and asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.said = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def check_alone(html):
    """The page asks for nothing outside itself, and no cell of it is empty."""
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not re.search(r"@import|url\((?!#)|(?:src|href)=\"(?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"<t[dh][^>]*>\s*</t[dh]>", html)
    return page


def write(folder, results):
    """(page, Markdown, printed lines) of a report."""
    (folder / "results.json").write_text(json.dumps(results))
    lines = []
    report.write(folder, lines.append)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text(), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A report of three models, one of which is 3% larger."""
    folder = tmp_path_factory.mktemp("sweep")
    results = made_results(points=5)
    results["models"]["rwkv7"]["parameters_without_embeddings"] = 101_253
    return folder, *write(folder, results)


def test_the_page_is_whole_and_by_itself(finished):
    _, html, _, _ = finished
    page = check_alone(html)
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', html)
    assert used and set(used) <= set(page.ids)
    assert "<title>made: an ablation</title>" in html
    details = [data for data in page.said if "--resume_or_start" in data]
    assert sum(data.count("--resume_or_start") for data in details) == 2 * (3 * 6 + 1)


def test_every_seed_is_there(finished):
    folder, html, text, _ = finished
    entry = summarise(json.loads((folder / "results.json").read_text()))["text"].entries["rwkv7"]
    scores = "; ".join(f"seed {seed} {score:.6g}" for seed, score in entry.score.values.items())
    for said in (text, unescape(html)):
        assert f"  rwkv7: {scores}; differences -0.1" in said
        assert f"p {entry.difference.p:.2g}, Holm's p {entry.holm_p:.2g}" in said


def test_markdown_shows_every_figure(finished):
    folder, _, text, _ = finished
    shown = re.findall(r"!\[[^\]]*\]\(figures/([^)]+\.png)\)", text)
    drawn = {path.name for path in (folder / "figures").glob("*.png")}
    assert set(shown) == drawn == {f"{name}.png" for name in FIGURES}
    for name in FIGURES:
        assert (folder / "figures" / f"{name}_1.svg").read_text().startswith("<?xml")


FIGURES = ["rates_text", "loss_text", "contexts_text", "lengths_text", "states_text"]
FIGURES += ["rates_recall", "loss_recall", "tests_recall", "states_recall", "speed"]


def test_a_fault_is_in_all_three(finished):
    _, html, text, lines = finished
    fault = "rwkv7: +3.0% parameters without embeddings (101,253; transformer has 98,304)"
    assert fault in html and fault in text and f"  {fault}" in lines
    assert "FAILED  models are of one size" in lines
    first = re.search(r'<li class="(\w+)"><b>(.*?)</b> (.*)', html)
    assert first.groups() == ("fail", "fail", "models are of one size")
    assert "fairness checks: 1 failed, 13 passed" in lines
    assert max(map(len, lines[:-1])) <= 100


def test_the_table_of_thirteen_models():
    results = made_results(MODELS, points=1)
    tasks = summarise(results)
    table = tables.columns(results, tasks)
    lines = tables.terminal(table)
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line] == [*["model", *MODELS] * 3]
    row = next(x for x in tables.markdown(table).splitlines() if x.startswith("| window |"))
    assert "| 98,324 | 200k | 32.8k | 0.003 |" in row
    assert re.search(r"\| 2\.2\d\d ± 0\.\d{3} \| \+0\.0\d\d ± 0\.\d{3}<br>worse \|", row)
    assert re.search(r"0\.1\d\d ± 0\.\d{3}<br>did not learn", row)
    _, about_recall = tables.conclusions(results, tasks)
    assert about_recall.endswith("did not learn: window, rwkv4, block_recurrent, longnet.")


def test_what_is_missing_is_said(tmp_path):
    results = made_results(points=3)
    results["trials"] = [
        trial
        for trial in results["trials"]
        if trial["task"] == "text" and (trial["model"] != "rwkv7" or trial["seed"] == 1)
    ]
    for trial in results["trials"]:
        trial["curve"] = []
        if trial["learning_rate"] == 1e-2:
            trial |= {"status": "diverged", "score": None}
    for key in ("speed", "state_bytes", "per_task"):
        del results["models"]["retnet"][key]
    results["models"]["rwkv7"]["speed"] = [{"length": 256, "error": "out of memory"}]
    html, text, lines = write(tmp_path, results)
    check_alone(html)
    assert not re.search(r"\| *\|", text)
    for said in (html, text):
        assert "recall: no model has a trial that is reported on" in said
        assert "Hollow marks at the edge diverged: transformer at 0.01; retnet at 0.01." in said
        assert "throughput and memory by length were not measured: retnet, rwkv7" in said
        assert "rwkv7 on text: missing seed 1, 2, 3 (no rate chosen)" in said
        assert not re.search(r"\b(nan|None|inf)\b", said.split("How it was run")[0])
    assert "| retnet | 98,324 | 200k | not known |" in text
    assert "no trial" in " ".join(lines) and "no score" in " ".join(lines)
    assert not (tmp_path / "figures/rates_recall.png").exists()
    results["trials"], results["models"] = [], {"transformer": results["models"]["transformer"]}
    write(tmp_path, results)
    assert [path.name for path in (tmp_path / "figures").glob("*.png")] == ["speed.png"]


def test_every_panel_has_the_baseline_and_few_others():
    dealt = groups(MODELS, "transformer")
    assert [[name for name, _ in group] for group in dealt] == [
        ["transformer", *list(MODELS)[first : first + 4]] for first in (1, 5, 9)
    ]
    for group in dealt:
        styles = [(str(style["ls"]), style["marker"]) for _, style in group]
        assert len({marker for _, marker in styles}) == len(styles), "told apart without colour"
    assert groups(["a"], "a")[0][0][0] == "a"


def test_labels_do_not_lie_on_one_another():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    for name, y in {"a": 1.0, "b": 1.0, "c": 0.999, "d": 0.0, "e": 0.001}.items():
        axes.plot([0, 1], [0, y], gid=f"mean {name}")
    label_ends(axes)
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:])) >= 0.0849
    assert heights[0] >= 0 and heights[-1] <= 1


@pytest.mark.parametrize("low", [1e-4, 0.1])
def test_long_numbers_leave_room_for_the_axis_title(tmp_path, monkeypatch, low):
    """In the first column a title left of 0.0001 is still within the image."""
    canvases = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *words, **how: canvases.append(self)
    )

    def fill(axes):
        axes.plot([1, 2], [low, 1], gid="mean a_model")
        axes.set(yscale="log", ylabel="training loss (nats per token)")

    save_png(Figure("", "", "", [Panel(f"panel {n}", fill, "all") for n in range(4)]), tmp_path)
    canvas = canvases[0]
    canvas.draw_without_rendering()
    for axes in canvas.axes:
        left = axes.yaxis.label.get_window_extent().x0
        before = [text for other in canvas.axes if other.bbox.x1 < left for text in other.texts]
        assert left > max((text.get_window_extent().x1 for text in before), default=0)


def test_the_same_results_draw_the_same_bytes():
    tasks = summarise(made_results(points=2))
    figure = panels.rates(tasks["text"], groups(tasks["text"].entries, "transformer"))
    (first,), (second,) = svgs(figure), svgs(figure)
    assert first == second
    inline = in_page(first, "x")
    assert inline.startswith("<svg") and "#1f2328" not in inline and "currentColor" in inline


def test_the_readmes_table_is_that_of_the_committed_sweep():
    folder = ROOT / "recipes/results/ablations/laptop"
    results = json.loads((folder / "results.json").read_text())
    tasks, rows = summarise(results), []
    for model, facts in results["models"].items():
        text, recall = tasks["text"].entries[model], tasks["recall"].entries[model]
        cells = [f"`{model}`", f"{facts['state_bytes']['128']:,}"]
        for context in (128, 512):
            key = f"bits_per_byte_in_context/{context}"
            found = interval({s: last_figures(t)[key] for s, t in text.trials.items()})
            cells.append(f"{found.mean:.2f} ± {found.half:.2f}")
        unlearned = "" if recall.learned else ", did not learn"
        cells.append(f"{recall.score.mean:.2f} ± {recall.score.half:.2f}{unlearned}")
        rows.append(f"| {' | '.join(cells)} |")
    assert "\n".join(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
