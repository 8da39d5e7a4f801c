"""A card says what is so: figures with their bounds, the loss as it was, and no hole anywhere."""

import json
import math
import re
from dataclasses import replace

import pytest
import test_push
import torch
from huggingface_hub import ModelCard
from test_origin import RECIPE, SIZES, card_of, make_model, make_run

import zoo
from zoo.cli import main
from zoo.contract import Check, Report
from zoo.contract.report import FAILED
from zoo.hub.card import Subject, render_card
from zoo.hub.card_holes import check_card, filled, number
from zoo.hub.curve import MAX_POINTS, curve_of
from zoo.hub.export import export
from zoo.hub.info import describe
from zoo.hub.origin import Origin, origin_of_checkpoint
from zoo.hub.push import files_to_push

hub = test_push.hub  # the fixture


@pytest.fixture
def checkpoint(tmp_path):
    """Step 4 of a run that went on to 8."""
    folder = make_model(make_run(tmp_path / "run") / "checkpoint-4")
    (folder / "checkpoint.json").write_text(json.dumps({"step": 4, "recipe": RECIPE}))
    return folder


def subject(architecture="retnet", **changes):
    """What a card is about, without a model's weights."""
    kind = zoo.MODELS[architecture]
    with torch.device("meta"):
        model = kind.causal_lm(kind.config(**SIZES))
    about = Subject(
        name="tiny",
        architecture=kind,
        config=model.config,
        dtype="float32",
        prompt="def main(",
        num_parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=model.state_size(0),
        state_bytes_per_token=model.state_size(1) - model.state_size(0),
        origin=Origin(license="mit"),
    )
    return about._replace(**changes)


def test_the_loss_comes_along_as_it_was(checkpoint, tmp_path):
    card = card_of(checkpoint, tmp_path / "out")
    curves = json.loads((tmp_path / "out" / "loss_curve.json").read_text())
    # Of the steps to this checkpoint alone.
    columns = ["step", "tokens", "bits_per_byte"]
    assert curves == {
        "train": {"columns": columns, "every": 1, "rows": [[2, 200, 6.6], [4, 400, 5.6]]},
        "held_out": {"columns": columns, "every": 1, "rows": [[2, 200, 6.5], [4, 400, 5.5]]},
    }
    assert "](loss_curve.png)" in card.text and "](loss_curve.json)" in card.text
    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    files, left_out = files_to_push(tmp_path / "out")
    assert {"loss_curve.json", "loss_curve.png"} <= set(files) and not left_out
    # And further, from folder to folder.
    card = card_of(tmp_path / "out", tmp_path / "again")
    assert "](loss_curve.png)" in card.text
    name = "loss_curve.json"
    assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()
    # Another model over it takes it away.
    export(make_model(tmp_path / "other"), tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").glob("loss_curve*"))


def test_without_matplotlib_there_are_the_numbers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.hub.curve.find_spec", lambda name: None)
    card = card_of(checkpoint, tmp_path / "out")
    assert "loss_curve.png" not in card.text and "](loss_curve.json)" in card.text
    assert not (tmp_path / "out" / "loss_curve.png").exists()


def test_a_long_curve_is_thinned_and_ends_where_it_did():
    lines = [{"kind": "train", "step": n, "loss": 1 / (n + 1)} for n in range(10 * MAX_POINTS + 3)]
    lines += [{"kind": "train", "step": 1, "loss": math.nan}, {"kind": "held_out", "step": 3}]
    lines += [{"kind": "held_out", "step": 3, "accuracy": 0.5}, {"kind": "sample", "step": 3}]
    curves = curve_of(lines)
    assert curves["held_out"]["rows"] == [[3, 0.5]] and set(curves) == {"train", "held_out"}
    rows = curves["train"]["rows"]
    assert curves["train"]["every"] == 11 and len(rows) == 910
    assert rows[-1] == [10 * MAX_POINTS + 2, 1 / (10 * MAX_POINTS + 3)]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"train": 7}',
        '{"train": {"columns": ["step", "loss"], "every": 1, "rows": [[1, "x"]]}}',
        '{"train": {"columns": ["step", "loss"], "every": 1, "rows": [[1, NaN]]}}',
        '{"train": {"columns": ["step"], "every": 1, "rows": [[1]]}}',
        '{"evil": {"columns": ["step", "loss"], "every": 1, "rows": [[1, 2]]}}',
    ],
)
def test_what_is_no_curve_is_none(checkpoint, tmp_path, content):
    export(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "loss_curve.json").write_text(content)
    assert origin_of_checkpoint(tmp_path / "out").curves == {}
    assert "loss_curve" not in card_of(tmp_path / "out", tmp_path / "again").text


def test_the_contracts_figures_stand_on_the_card(tmp_path, capsys):
    make_model(tmp_path / "model")
    out = tmp_path / "out"
    assert (
        main(["export", str(tmp_path / "model"), str(out), "--license", "mit", "--contract"]) == 0
    )
    report = json.loads((out / "contract.json").read_text())
    assert report["subject"] == "out" and set(report["verdicts"].values()) == {"passed"}
    text = ModelCard((out / "README.md").read_text()).text
    rows = re.findall(r"(?m)^\| (.+) \| passed \| (.+) \| (.+) \| (.+) \| (\d+) \|$", text)
    assert [row[0] for row in rows] == list(report["titles"].values()) and len(rows) == 7
    for title, what, measured, bound, count in rows:
        number = next(n for n, name in report["titles"].items() if name == title)
        made = [c for c in report["checks"] if c["point"] == int(number)]
        assert int(count) == sum(c["verdict"] != "not run" for c in made)
        (check,) = {c["name"]: c for c in made if c["name"] == what}.values()
        assert float(measured) == pytest.approx(check["measured"], rel=0.1)
        assert float(bound) == pytest.approx(check["bound"], rel=0.1)
    assert "Not measured here: save, load, export;" in text
    assert "contract.json" in files_to_push(out)[0]
    # It is of that export: who exports again without measuring has no figures.
    assert main(["export", str(out), str(tmp_path / "again")]) == 0
    text = (tmp_path / "again" / "README.md").read_text()
    assert "on these weights it was not measured" in text and "--contract` measures it" in text
    assert not (tmp_path / "again" / "contract.json").exists()


def test_what_fails_is_said(tmp_path, capsys, monkeypatch):
    def run(subject, points, tokens):
        checks = [Check(n, f"check {n}", 0.5, 1.0, "passed") for n in points if n != 4]
        checks += [Check(4, "worse", 3.0, 1.0, FAILED), Check(4, "bad", "no", "yes", FAILED)]
        titles, seconds = {n: f"point {n}" for n in points}, dict.fromkeys(points, 0.0)
        return Report("x", titles, checks, {}, seconds, {"torch": "1"})

    monkeypatch.setattr("zoo.contract.run", run)
    make_model(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--license", "mit", "--contract"]
    assert main(["export", *arguments]) == 0
    assert "the contract does not hold: worse, bad; see README.md" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Failed:** worse; bad." in text and "| point 4 | failed | worse | 3 | 1 | 2 |" in text


def test_only_our_own_classes_are_measured_for_a_card(tmp_path, capsys):
    arguments = [str(make_model(tmp_path / "model")), str(tmp_path / "out"), "--license", "mit"]
    assert main(["export", *arguments, "--format", "native", "--contract"]) == 2
    assert "--contract measures our own classes" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", list(zoo.MODELS))
def test_every_card_is_without_a_hole(architecture):
    text = render_card(subject(architecture))
    assert not re.search(r"\$\w|`None`|\bnan\b|More Information", text)
    for section in ("Model", "Training", "Contract", "Limits", "License"):
        assert f"\n## {section}\n\n" in text
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"custom_code", "long-context"} <= set(data.tags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_parameters": None}, "a number for num_parameters, got None"),
        ({"num_parameters": math.nan}, "a number for num_parameters, got nan"),
        ({"state_bytes": -1}, "a number for state_bytes, got -1"),
        ({"state_bytes": True}, "a number for state_bytes, got True"),
        ({"dtype": ""}, "a value for dtype, got ''"),
        ({"name": " "}, "a value for name"),
        ({"origin": Origin(bits_per_byte=math.inf)}, "a number for bits_per_byte, got inf"),
        ({"origin": Origin(training=[["loss", "nan"]])}, "a value for loss, got 'nan'"),
        ({"origin": Origin(training=[["loss", "None"]])}, "a value for loss, got 'None'"),
        ({"origin": Origin(base_model="nowhere")}, "no model's name on the Hub"),
        ({"origin": Origin(license="My License")}, "no license's name on the Hub"),
    ],
)
def test_a_hole_is_an_error(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        render_card(subject(**changes))
    assert "\n" not in str(error.value)


def test_a_template_asks_for_nothing_that_is_not_given():
    assert filled("$a ${b} $$5 $notes", a="1", b="2", notes="") == "1 2 $5 "
    with pytest.raises(ValueError, match="a value for b, got None"):
        filled("$a ${b}", a="1")
    assert number("n", 12345.5) == "12,345.5"


METADATA = [
    ("license: [mit, 'My License']", "license 'My License'"),
    ("base_model: ../evil", "base_model '../evil'"),
    ("base_model: [a/b, 7]", "base_model 7"),
    ("base_model_relation: sibling", "base_model_relation 'sibling'"),
    ("tags: [a, 7]", "tags with 7"),
    ("datasets: ['']", "datasets with ''"),
    ("license: mit\nlicense: [", "metadata that cannot be read"),
    ("license: !!python/object/apply:os.mkdir [evil]", "metadata that cannot be read"),
    ("model-index: 7", "metadata that cannot be read"),
    ("- a\n- list", "metadata that cannot be read"),
]
RESULT = """model-index:
- name: x
  results:
  - task: {{type: text-generation}}
    dataset: {{type: d, name: d}}
    metrics: [{{type: bits_per_byte, value: {}}}]"""
METADATA += [(RESULT.format(".nan"), "bits_per_byte = nan"), (RESULT.format("x"), "= 'x' among")]


@pytest.mark.parametrize(("metadata", "message"), METADATA)
def test_metadata_that_the_hub_would_not_take(metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_card(f"---\n{metadata}\n---\n\n# x\n")
    assert "\n" not in str(error.value) and "README.md" in str(error.value)


def test_a_card_that_was_not_filled_in():
    with pytest.raises(ValueError, match="More Information Needed"):
        check_card("---\nlicense: mit\n---\n\n# x\n\n[More Information Needed]\n")
    check_card("---\nlicense: mit\n---\n\n# x costs $5 {{ y }}\n")


def test_what_the_weights_are_to_those_of_others(checkpoint, tmp_path):
    origin = replace(origin_of_checkpoint(checkpoint), base_model="them/base")
    assert origin.base_model_relation == "finetune"
    assert replace(origin, base_model=None).base_model_relation is None
    converted = Origin(base_model="them/base", format="fla-retnet", source="them/base")
    assert converted.base_model_relation is None
    converted.add_rounding("from float32 to bfloat16")
    assert converted.base_model_relation == "quantized"
    card = card_of(checkpoint, tmp_path / "out", base_model="them/base")
    assert card.data.base_model == "them/base"
    assert card.data.base_model_relation == "finetune"


def test_the_hub_is_asked_about_the_card(hub, tmp_path, capsys):
    export(make_model(tmp_path / "model"), tmp_path / "out", license="mit")
    ModelCard.load(tmp_path / "out" / "README.md").validate()
    text = (tmp_path / "out" / "README.md").read_text()
    # Of the right shape, and no license all the same.
    (tmp_path / "out" / "README.md").write_text(text.replace("license: mit", "license: mitt"))
    assert test_push.push(tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zoo: error: ") and '"license" must be one of' in error
    assert [commit["title"] for commit in hub.repositories["me/tiny"]["commits"]] == [
        "initial commit"
    ]


def test_describe_and_a_card_agree():
    state = re.search(r"([\d,]+) bytes of state", describe("retnet"))[1]
    kind = zoo.MODELS["retnet"]
    with torch.device("meta"):
        model = kind.causal_lm(kind.config())
    text = render_card(subject(config=kind.config(), state_bytes=model.state_size(0)))
    assert f"**{state} bytes" in text
