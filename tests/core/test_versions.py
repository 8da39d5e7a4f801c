"""Folders of an earlier format version load, of a later one are refused.

The second version is made up: what the present code calls `rms_norm_eps` and `q_proj` was
`old_eps` and `query` in the first.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import zoo
from zoo.core import base, versions
from zoo.core.versions import CHANGES, FORMAT_VERSION, Change, current_fields
from zoo.hub.convert import convert_back
from zoo.hub.export import export
from zoo.hub.outline import check_weights

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(7)[None]
NEW, OLD = "mixer.q_proj", "mixer.query"
SECOND = Change(
    version=2,
    model_types=("zoo_sliding_window",),
    renamed_fields={"old_eps": "rms_norm_eps"},
    removed_fields={"clever": True},
    added_fields={"sliding_window": 3},
    renamed_weights={OLD: NEW},
)
ELSEWHERE = Change(version=2, model_types=("zoo_rwkv4",), renamed_weights={"mixer": "nowhere"})


def write_json(path, fields):
    path.write_text(json.dumps(fields))


def edit_json(path, **changed):
    """Sets fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changed
    write_json(path, {name: x for name, x in fields.items() if x is not None})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = zoo.SlidingWindowConfig(**SIZES, rms_norm_eps=0.125, sliding_window=3)
    return zoo.SlidingWindowForCausalLM(config).eval()


@pytest.fixture
def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=["one file", "shards"])
def first(tmp_path, model, request):
    """A folder as the first version wrote it, seen from the second."""
    folder = tmp_path / "first"
    model.save_pretrained(folder, max_shard_size="5KB" if request.param == "shards" else "5GB")
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("format_version")
    assert fields.pop("sliding_window") == 3
    fields["old_eps"] = fields.pop("rms_norm_eps")
    write_json(folder / "config.json", fields | {"clever": True})
    for path in folder.glob("*.safetensors"):
        tensors = {name.replace(NEW, OLD): x for name, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    for path in folder.glob("*.index.json"):
        path.write_text(path.read_text().replace(NEW, OLD))
    return folder


@pytest.fixture
def second(monkeypatch):
    """The present code is the second version's."""
    for module in (versions, base):
        monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    monkeypatch.setattr(versions, "CHANGES", (SECOND, ELSEWHERE))


def weights_of(folder):
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_the_version_is_written_and_read(tmp_path, model, logits):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert json.loads(path.read_text())["format_version"] == FORMAT_VERSION
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["format_version"] == FORMAT_VERSION
    assert zoo.SlidingWindowConfig(**config.to_dict()).to_dict() == config.to_dict()
    # What was written before there were versions.
    edit_json(path, format_version=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("says", [None, 1])
def test_a_folder_of_the_first_version(first, tmp_path, logits, says):
    edit_json(first / "config.json", format_version=says)
    loaded, info = AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    assert (loaded.config.rms_norm_eps, loaded.config.sliding_window) == (0.125, 3)
    assert not any(info.values())
    assert torch.equal(loaded(IDS).logits, logits)
    # Of the class itself, of the decoder alone, and by a config that is at hand.
    direct = zoo.SlidingWindowForCausalLM.from_pretrained(first, config=loaded.config)
    assert torch.equal(direct(IDS).logits, logits)
    decoder = AutoModel.from_pretrained(first)
    assert torch.equal(loaded.lm_head(decoder(IDS).last_hidden_state), logits)
    # Saved, it is one of the second.
    loaded.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["format_version"] == 2
    assert not {"old_eps", "clever"} & set(fields)
    assert not any(OLD in name for name in weights_of(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.usefixtures("second")
def test_key_mapping_of_the_users_own(first, logits):
    """It is about the names in the files, and transformers gives them back when it saves."""
    for path in first.glob("*.safetensors"):
        tensors = {name.replace("lm_head", "output"): x for name, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    for path in first.glob("*.index.json"):
        path.write_text(path.read_text().replace("lm_head", "output"))
    mapping = {"^output": "lm_head"}
    loaded = AutoModelForCausalLM.from_pretrained(first, key_mapping=mapping)
    assert torch.equal(loaded(IDS).logits, logits)
    loaded.save_pretrained(first / "saved")
    names = weights_of(first / "saved")
    assert "output.weight" in names and not any(OLD in name for name in names)


@pytest.mark.usefixtures("second")
def test_the_hub_reads_a_folder_of_the_first_version(first, tmp_path, logits):
    check_weights(first)
    export(first, tmp_path / "exported")
    assert not any(OLD in name for name in weights_of(tmp_path / "exported"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(loaded(IDS).logits, logits)
    convert_back("hf-mistral", first, tmp_path / "native")
    assert any("q_proj" in name for name in weights_of(tmp_path / "native"))


def test_the_folders_own_code_reads_the_first_version(first, tmp_path, model, logits):
    """By the code of an export, in which the second version is written down."""
    model.save_pretrained(tmp_path / "model")
    code = tmp_path / "code"
    export(tmp_path / "model", code)
    source = (code / "versions.py").read_text()
    source, count = re.subn(r"(?m)^FORMAT_VERSION = .*$", "FORMAT_VERSION = 2", source)
    fields = ", ".join(
        f"{name}={dict(value) if hasattr(value, 'items') else value!r}"
        for name, value in SECOND._asdict().items()
    )
    change = f"CHANGES: tuple[Change, ...] = (Change({fields}),)"
    source, changes = re.subn(r"(?m)^CHANGES: .*$", change, source)
    assert (count, changes) == (1, 1)
    (code / "versions.py").write_text(source)
    own = get_class_from_dynamic_module("sliding_window.SlidingWindowForCausalLM", str(code))
    assert own.__module__.startswith("transformers_modules")
    loaded = own.from_pretrained(first)
    assert torch.equal(loaded.eval()(IDS).logits, logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert not any(OLD in name for name in weights_of(tmp_path / "saved"))
    # zoo is of the first, and says what to do about the second.
    with pytest.raises(ValueError, match="upgrade longzoo"):
        AutoConfig.from_pretrained(tmp_path / "saved")


@pytest.mark.usefixtures("second")
def test_other_architectures_and_names_are_left_alone(tmp_path):
    torch.manual_seed(0)
    model = zoo.RWKV7ForCausalLM(zoo.RWKV7Config(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", format_version=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    renamed = versions.renamed_weights({}, "zoo_sliding_window")
    for name in (
        "layers.0.mixer.query_norm.weight",
        "layers.0.xmixer.query.weight",
        "mixer.x.query",
    ):
        assert versions.current_name(name, renamed) == name
    assert versions.current_name("mixer.query.weight", renamed) == "mixer.q_proj.weight"
    assert versions.renamed_weights({"format_version": 2}, "zoo_sliding_window") == {}


@pytest.mark.usefixtures("second")
def test_changes_come_one_after_the_other(monkeypatch):
    third = Change(version=3, renamed_fields={"rms_norm_eps": "eps"}, added_fields={"clever": 1})
    monkeypatch.setattr(versions, "FORMAT_VERSION", 3)
    monkeypatch.setattr(versions, "CHANGES", (SECOND, third))
    given = {"old_eps": 0.5, "clever": True, "sliding_window": None}
    expected = {"eps": 0.5, "clever": 1, "sliding_window": None, "format_version": 3}
    assert current_fields(given, "zoo_sliding_window") == expected
    assert given == {"old_eps": 0.5, "clever": True, "sliding_window": None}
    # What the second took away, the third has again, and a folder of it keeps its value.
    given = {"rms_norm_eps": 0.5, "clever": 2, "format_version": 2}
    assert current_fields(given, "zoo_rwkv4") == {"eps": 0.5, "clever": 2, "format_version": 3}


@pytest.mark.usefixtures("second")
def test_a_model_that_there_is_no_longer(first, tmp_path):
    edit_json(first / "config.json", clever=False)
    for load in (AutoConfig.from_pretrained, lambda x: export(x, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"version 1 with clever other than True.*own code"):
            load(first)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            FORMAT_VERSION + 1,
            rf"version {FORMAT_VERSION + 1}, .*upgrade longzoo.*trust_remote_code",
        ),
        (0, f"from 1 to {FORMAT_VERSION}, got 0"),
        ("1", f"from 1 to {FORMAT_VERSION}, got '1'"),
        (True, f"from 1 to {FORMAT_VERSION}, got True"),
    ],
)
def test_a_version_that_is_not_known(tmp_path, model, version, message):
    model.save_pretrained(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", format_version=version)
    for load in (
        AutoConfig.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        zoo.SlidingWindowForCausalLM.from_pretrained,
        lambda x: export(x, tmp_path / "out"),
        lambda x: convert_back("hf-mistral", x, tmp_path / "out"),
        check_weights,
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path / "model")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fields_of_another_version_by_hand():
    with pytest.raises(ValueError, match="from_dict read earlier ones"):
        zoo.SlidingWindowConfig(format_version=FORMAT_VERSION + 1)


def test_the_changes_fit_together():
    """Rules for whoever adds one."""
    numbers = [change.version for change in CHANGES]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(2, FORMAT_VERSION + 1))
    types = {a.config.model_type for a in zoo.MODELS.values()}
    for change in CHANGES:
        assert set(change.model_types) <= types
        for renamed in (change.renamed_fields, change.renamed_weights):
            assert not set(renamed) & set(renamed.values())
    for model_type in types:
        versions.renamed_weights({}, model_type)  # refuses a name that is renamed twice
