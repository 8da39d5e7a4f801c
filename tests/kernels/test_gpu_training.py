"""Training steps beside fla's models (kernels/bench/gpu/training.py), tiny and on a CPU."""

import copy
import importlib
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.kernels.bench.gpu import training
from zoo.kernels.bench.gpu.timing import Cpu

CPU = Cpu()


@pytest.fixture
def without_fla(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: None)


@pytest.mark.parametrize("name", training.MODELS)
def test_a_model_is_timed_and_fla_is_told_about(name, tmp_path, without_fla, monkeypatch):
    output, told = tmp_path / "training.json", tmp_path / "told.txt"
    monkeypatch.setenv("ZOO_GPU_FAILURES", str(told))
    plain = ["--tiny", "--device", "cpu", "--output", str(output)]
    assert training.main([name, *plain]) == 0
    content = json.loads(output.read_text())
    entry = content["models"][name]
    assert content["device"] == "cpu" and list(entry["by"]) == ["ours", "fla"]
    ours, fla = entry["by"].values()
    seconds, rate = ours["ms"] / 1000, CPU.ceilings()[1]
    assert ours["mfu"] == pytest.approx(entry["tflop"] * 1e12 / seconds / rate, abs=1e-3)
    assert ours["tokens_per_s"] == pytest.approx(64 / seconds, rel=1e-2)
    has_none = name == "lightning"
    why = "fla has no such model" if has_none else "flash-linear-attention is not installed"
    assert fla == {"failed": f"LookupError: {why}"}
    assert told.read_text() == f"{name}, fla: LookupError: {why}\n"


def test_the_file_holds_all_models(tmp_path):
    """Of one device and the same versions."""
    path, one = tmp_path / "training.json", {"device": "a", "versions": {"torch": "2"}}
    training.keep(path, one, "retnet", {"x": 1})
    training.keep(path, one, "rwkv6", {"x": 2})
    training.keep(path, one, "retnet", {"x": 3})
    assert json.loads(path.read_text())["models"] == {"retnet": {"x": 3}, "rwkv6": {"x": 2}}
    training.keep(path, one | {"device": "b"}, "rwkv7", {"x": 4})
    assert json.loads(path.read_text())["models"] == {"rwkv7": {"x": 4}}


@pytest.mark.parametrize("name", training.MODELS)
def test_sizes_are_those_of_340_million(name):
    """And fla's config can say them."""
    config = training.config_of(name, False)
    assert training.parameters_of(name, config) == pytest.approx(training.PARAMETERS, rel=0.01)
    module = training.MODELS[name][0]
    if module:
        values, _ = importlib.import_module(f"zoo.hub.convert.{module}").write_config(config)
        assert (values["hidden_size"], values["num_hidden_layers"]) == (1024, 24)
        assert values["intermediate_size"] == config.intermediate_size


@pytest.mark.parametrize("name", [name for name, (module, _) in training.MODELS.items() if module])
def test_fla_gets_our_weights(name):
    """As many, and none of them that training would change."""
    model = zoo.MODELS[name].causal_lm(training.config_of(name, True))
    _, tensors = training.written_for_fla(name, model)
    parameters = list(model.parameters())
    before = [x.clone() for x in tensors.values()]
    with torch.no_grad():
        for x in parameters:
            x.add_(1)
    assert all(map(torch.equal, before, tensors.values()))
    assert sum(x.numel() for x in tensors.values()) == sum(x.numel() for x in parameters)


@pytest.mark.parametrize("name", training.MODELS)
def test_operations_are_those_of_a_step(name):
    """As PyTorch counts them; it runs chunks and not tokens, which is little beside wide layers."""
    fields = training.MODELS[name][1] | training.HEADS | {"vocab_size": 512, "hidden_size": 512}
    fields |= {"num_hidden_layers": 1, "intermediate_size": 1024}
    if name == "gated_deltanet":
        fields |= {"head_dim": 16, "value_head_dim": 32}
    if name == "rwkv7":
        fields |= {"num_attention_heads": 8}
    model = zoo.MODELS[name].causal_lm(zoo.MODELS[name].config(**fields))
    ids = torch.randint(1, 500, (1, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops()
    # No gradient of the embedding's input, and decays per head take none.
    assert counted == pytest.approx(training.flops_of_step(model, 1, 16), rel=0.15)


@pytest.mark.parametrize("is_same", [True, False], ids=["the same", "another function"])
def test_only_the_same_function_is_timed(is_same, monkeypatch):
    kept, entries = [], []
    build = training.written_for_fla

    def remember(name, model):
        kept.append(copy.deepcopy(model))
        return build(name, model)

    def theirs(written):
        model = kept[0]
        if not is_same:
            with torch.no_grad():
                model.lm_head.weight.mul_(1.1)
        return model

    monkeypatch.setattr(training, "written_for_fla", remember)
    monkeypatch.setattr(training, "peer_of", theirs)
    write = lambda entry: entries.append(copy.deepcopy(entry))  # noqa: E731
    entry = training.measure("retnet", CPU, True, write)
    assert [list(x["by"]) for x in entries] == [["ours"], ["ours", "fla"]]
    fla = entry["by"]["fla"]
    if is_same:
        expected = fla["ms"] / entry["by"]["ours"]["ms"]
        assert fla["ratio"] == pytest.approx(expected, abs=0.01)
    else:
        assert fla == {"failed": "ArithmeticError: logits are 0.1 from ours"}


def test_out_of_time_and_no_gpu(capsys):
    entry = training.measure("retnet", CPU, True, lambda entry: None, deadline=0)
    assert {x["failed"] for x in entry["by"].values()} >= {"TimeoutError: out of time"}
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            training.main(["retnet"])
        assert "sees no GPU" in capsys.readouterr().err
