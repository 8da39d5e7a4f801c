"""The suite itself: it fails what is broken, says what it could not ask, and speaks to a shell."""

import functools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2ForCausalLM

from zoo import MODELS
from zoo.contract import NOT_RUN, Checks, Subject, find_subject, main, run
from zoo.contract.subject import TINY
from zoo.contract.tiny import GENERAL

RetNetForCausalLM = MODELS["retnet"].causal_lm


class SeesTheFuture(RetNetForCausalLM):
    """Each position is given the next one's logits as well."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.roll(-1, dims=1)
        return output


class ForgetsItsState(RetNetForCausalLM):
    """Continues from nothing, whatever it is given."""

    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class IgnoresPadding(RetNetForCausalLM):
    """Reads padding like text."""

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class IgnoresDocuments(RetNetForCausalLM):
    """Reads packed documents like one."""

    def forward(self, *args, position_ids=None, cu_seq_lens_q=None, seq_idx=None, **kwargs):
        return super().forward(*args, **kwargs)


class KeepsAllTokens(RetNetForCausalLM):
    """Hides a growing list of inputs in its cache: more than earlier tests may have left free."""

    def forward(self, input_ids, *args, **kwargs):
        output = super().forward(input_ids, *args, **kwargs)
        cache = output.past_key_values
        if cache is not None:
            cache.seen = [*getattr(cache, "seen", ()), input_ids.repeat(1, 2000)]
        return output


class HasADeadWeight(RetNetForCausalLM):
    """A parameter that nothing reads."""

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.ones(3))


def broken(cls):
    def build(seed):
        torch.manual_seed(seed)
        return cls(cls.config_class(**TINY))

    return Subject(cls.__name__, build)


@functools.cache
def report_on(cls, point):
    return run(broken(cls), [point], num_tokens=20_000)


@pytest.mark.parametrize(
    ("cls", "point", "culprit"),
    [
        (SeesTheFuture, 4, "another token, whole: earlier logits that changed"),
        (ForgetsItsState, 1, "in pieces of 13, fp64: logits"),
        (IgnoresPadding, 2, "at once, fp64: left padding: logits"),
        (IgnoresDocuments, 3, "position_ids alone, fp64: logits"),
        (KeepsAllTokens, 7, "state: bytes more after 700 tokens than after 1"),
        (KeepsAllTokens, 7, "prefill of 20,000 tokens: growth of peak memory, MiB"),
        (HasADeadWeight, 10, "gradients: parameters without any, unused"),
    ],
)
def test_a_broken_model_fails(cls, point, culprit):
    report = report_on(cls, point)
    assert culprit in [check.name for check in report.failed(point)], "\n" + report.table()


def test_full_attention_has_no_constant_state():
    report = run(find_subject("transformers:LlamaForCausalLM"), [4, 7], num_tokens=20_000)
    assert report.verdict(4) == "passed", "\n" + report.table()
    failed = [check.name for check in report.failed()]
    assert "state: bytes more after 700 tokens than after 1" in failed
    assert "prefill of 20,000 tokens: growth of peak memory, MiB" in failed


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LlamaForCausalLM, Mamba2ForCausalLM])
def test_models_of_others_run_to_the_end(cls, monkeypatch):
    monkeypatch.setitem(GENERAL, "num_hidden_layers", 1)  # of layers that are all alike
    report = run(find_subject(f"transformers:{cls.__name__}"), num_tokens=5000)
    assert set(report.titles) == {check.point for check in report.checks}
    assert report.verdict(4) == "passed"
    assert all(check.reason for check in report.checks if check.verdict == NOT_RUN)
    assert report.table()


def test_a_case_that_raises_fails_and_the_next_one_runs():
    checks = Checks(1)
    with checks.case("first"):
        raise RuntimeError("broken\nin many ways")
    with checks.case("second"):
        checks.below("", float("nan"), 1.0)
        checks.below("figure", 0.5, 1.0)
    assert [(check.name, check.verdict, check.reason) for check in checks.found] == [
        ("first", "failed", "RuntimeError: broken"),
        ("second", "failed", ""),
        ("second: figure", "passed", ""),
    ]


def test_what_is_not_run_is_not_passed():
    report = run(find_subject("transformers:Mamba2ForCausalLM"), [3])
    assert report.verdict(3) == "not run"
    assert not report.failed()


def test_command_line(tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(**TINY, eos_token_id=None)).save_pretrained(tmp_path / "llama")
    file = tmp_path / "report.json"
    arguments = ["--strict", "--points", "4,7", "--tokens", "2000", "--json", str(file)]
    assert main([str(tmp_path / "llama"), *arguments]) == 1
    printed = capsys.readouterr().out
    assert "no future leaks: passed" in printed
    assert "state of constant size: failed" in printed
    (report,) = json.loads(file.read_text())
    assert report["verdicts"] == {"4": "passed", "7": "failed"}
    assert {"point", "name", "measured", "bound", "verdict", "reason"} == set(report["checks"][0])
    assert main(["retnet", "--variant", "all", "--points", "4"]) == 0
    assert capsys.readouterr().out.count("no future leaks: passed") > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "expected a model of the zoo (retnet"),
        (["retnet", "--variant", "best"], "retnet has the variants torchscale"),
        (["transformers:NoSuchModel"], "NoSuchModel"),
    ],
)
def test_command_line_without_a_model(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("points", ["0", "11", "one", ""])
def test_command_line_without_a_point(points, capsys):
    with pytest.raises(SystemExit):
        main(["retnet", "--points", points])
    assert "expected numbers of points 1 to 10" in capsys.readouterr().err
