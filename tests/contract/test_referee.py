"""The referee: no false alarm, no fault missed, each on its smallest input, in the time given."""

import functools
import itertools
import json
import re
import time

import direct_faults
import pytest
import referee_table
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import zoo.contract
from zoo.contract import (
    DOES_NOT_APPLY,
    FAILED,
    NOT_PROMISED,
    NOT_RUN,
    PASSED,
    POINTS,
    Subject,
    find_subject,
    judge,
    main,
    printing,
    run,
)
from zoo.contract.finding import smallest
from zoo.contract.report import BUDGET_SPENT, OutOfTime
from zoo.contract.tiny import tiny_config

# torch collects what `torch.device` governs once, when that is first used, and from_pretrained
# replaces torch.linspace while it is: used before, so that later tests find torch as it was.
with torch.device("cpu"):
    torch.empty(0)


def subject_of(cls):
    config = tiny_config(cls.config_class)

    def build(seed):
        torch.manual_seed(seed)
        return cls(config)

    return Subject(cls.__name__, build)


@functools.cache
def llama():
    return judge(find_subject("LlamaForCausalLM"), budget=None)


def test_llama_passes_all_that_applies():
    report = llama()
    assert not report.failed(), "\n" + report.table()
    assert not report.of(NOT_RUN), "\n" + report.table()
    verdicts = {point: report.verdict(point) for point in POINTS}
    assert verdicts == dict.fromkeys(POINTS, PASSED) | {7: DOES_NOT_APPLY}
    assert len(report.of(PASSED)) > 30
    (reason,) = {check.reason for check in report.of(DOES_NOT_APPLY, 7)}
    assert "keys and values of every token" in reason
    assert report.precision["run_in"] == "fp64" and report.precision["computes_in"] == "fp32"


def test_what_nobody_promises_is_told_apart_and_not_dropped():
    report = llama()
    names = {check.name for check in report.of(NOT_PROMISED)}
    apart = {"padding in the middle without position_ids", "packed documents cut token by token"}
    assert apart <= names
    for text in (printing.summary(report), printing.markdown(report).replace("\\", "")):
        assert all(name in text for name in names)
    for check in report.of(NOT_PROMISED):
        assert check.measured > check.bound and check.smallest["figure"] > check.smallest["bound"]
    verdicts = [check["verdict"] for check in report.as_dict()["checks"]]
    assert verdicts.count(NOT_PROMISED) == len(names)


class SeesTheFuture(LlamaForCausalLM):
    """Each position is given a little of the next one's logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.roll(-1, dims=1)
        return output


class ForgetsWhatItRead(LlamaForCausalLM):
    """Reads a token alone, whatever the cache holds."""

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        if input_ids is not None and input_ids.shape[1] == 1:
            past = super().forward(input_ids, past_key_values=past_key_values, use_cache=True)
            alone = super().forward(input_ids, use_cache=False)
            past.logits = alone.logits
            return past
        return super().forward(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )


class IgnoresPadding(LlamaForCausalLM):
    """Reads padding like text."""

    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


class ReadsTheDocumentBefore(LlamaForCausalLM):
    """Shifts a little of each token to the next, over the end of a document too."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        before = torch.nn.functional.pad(output.logits[:, :-1], (0, 0, 1, 0))
        output.logits = output.logits + 0.1 * before
        return output


class TellsItsAttentionNothing(LlamaForCausalLM):
    """Numbers packed documents' tokens anew and attends to all of them, as some classes do."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class ShiftsLabelsTwice(LlamaForCausalLM):
    """Learns to guess the token after the next."""

    def forward(self, *args, labels=None, **kwargs):
        if labels is not None:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return super().forward(*args, labels=labels, **kwargs)


class ForgetsAWeight(LlamaForCausalLM):
    """Does not save one of its weights."""

    def save_pretrained(self, folder, **kwargs):
        weights = self.state_dict()
        weights.pop("model.norm.weight")
        super().save_pretrained(folder, state_dict=weights, **kwargs)


class ScalesInTraining(LlamaForCausalLM):
    """Another model in training mode."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1.01 if self.training else 1)
        return output


class OverflowsIn16Bits(LlamaForCausalLM):
    """Infinite where weights are of 16 bits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (torch.inf if output.logits.dtype.itemsize == 2 else 1)
        return output


FAULTS = [
    (SeesTheFuture, 4, "later tokens do not matter", {"before": 1, "after": 1}),
    (
        ForgetsWhatItRead,
        1,
        "generate, token by token = whole",
        {"rows": 1, "prompt": 1, "new": 1},
    ),
    (
        IgnoresPadding,
        2,
        "prompts padded on the left in generate = each alone",
        {"rows": 2, "tokens": 2, "padding": 1, "new": 1},
    ),
    (
        ReadsTheDocumentBefore,
        3,
        "packed with position_ids, seq_idx and cu_seq_lens = each document alone",
        {"documents": 2, "tokens": 1},
    ),
    (
        ShiftsLabelsTwice,
        10,
        "the loss of labels = cross entropy of next tokens",
        {"rows": 1, "tokens": 2, "ignored": 0},
    ),
    (ForgetsAWeight, 6, "saved and loaded", {"tokens": 1}),
    (ScalesInTraining, 8, "training mode without dropout = eval mode", {"rows": 1, "tokens": 1}),
    (OverflowsIn16Bits, 9, "bf16 gives finite logits", {"tokens": 1}),
]


@pytest.mark.parametrize(("cls", "point", "name", "sizes"), FAULTS)
def test_a_planted_fault_is_found_and_shrunk(cls, point, name, sizes):
    report = judge(subject_of(cls), [point], budget=None)
    found = {check.name: check for check in report.failed()}
    assert name in found, "\n" + report.table()
    assert found[name].smallest["sizes"] == sizes
    assert found[name].smallest["is_smallest"] and found[name].promise
    assert report.verdict(point) == FAILED


class RefusesEmbeddings(LlamaForCausalLM):
    """Says in words that it takes ids only."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            raise NotImplementedError("ids only, please")
        return super().forward(*args, **kwargs)


class StumblesOverEmbeddings(LlamaForCausalLM):
    """Means to take them."""

    def forward(self, *args, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds @ inputs_embeds
        return super().forward(*args, inputs_embeds=inputs_embeds, **kwargs)


class RefusesToDecode(LlamaForCausalLM):
    """Says in words that it does not do what every causal LM is for."""

    def forward(self, input_ids=None, **kwargs):
        if kwargs.get("past_key_values") is not None and input_ids.shape[1] == 1:
            raise NotImplementedError("no decoding, please")
        return super().forward(input_ids, **kwargs)


def test_a_refusal_in_words_is_no_failure_where_there_is_a_choice():
    name = "generate from inputs_embeds = from ids"
    (check,) = judge(subject_of(RefusesEmbeddings), [5], budget=None).of(DOES_NOT_APPLY)
    assert check.name == name
    assert check.reason == "it refuses: NotImplementedError: ids only, please"
    (check,) = judge(subject_of(StumblesOverEmbeddings), [5], budget=None).failed()
    assert check.name == name and "RuntimeError" in check.reason
    names = {check.name for check in judge(subject_of(RefusesToDecode), [1], budget=None).failed()}
    assert "generate, token by token = whole" in names


class WrongIn64Bits(LlamaForCausalLM):
    """Reads its mask in float32 only, as some attention overflows in float64."""

    def forward(self, *args, attention_mask=None, **kwargs):
        mask = None if self.dtype == torch.float64 else attention_mask
        return super().forward(*args, attention_mask=mask, **kwargs)


def test_what_differs_in_float64_alone_is_told_apart():
    report = judge(subject_of(WrongIn64Bits), [2], budget=None)
    assert not report.failed(), "\n" + report.table()
    reasons = {check.name: check.reason for check in report.of(NOT_PROMISED)}
    name = "prompts padded on the left in generate = each alone"
    assert reasons[name].startswith("in fp64 alone")


def test_a_class_that_does_not_pack_is_told_apart():
    report = judge(subject_of(TellsItsAttentionNothing), [3], budget=None)
    assert not report.failed() and report.verdict(3) == DOES_NOT_APPLY
    assert len(report.of(NOT_PROMISED)) == len(report.checks) > 2


class BreaksAtAWindow(LlamaForCausalLM):
    """Hands a prompt of 16 tokens, a block of its config, over wrongly."""

    def __init__(self, config):
        super().__init__(config)
        config.block_size = 16

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        cache = output.past_key_values
        if cache is not None and input_ids is not None and input_ids.shape[1] == 16:
            for layer in cache.layers:
                layer.values[:, :, -1] = 0
        return output


def test_a_fault_at_one_cut_is_not_hidden_by_the_cuts_that_pass():
    report = judge(subject_of(BreaksAtAWindow), [1], budget=None)
    cuts = {
        int(number): check.verdict
        for check in report.checks
        for number in re.findall(r"after a prompt of (\d+)", check.name)
    }
    assert cuts == dict.fromkeys(cuts, PASSED) | {16: FAILED}, "\n" + report.table()
    assert {1, 15, 16, 17} <= set(cuts)
    assert report.verdict(1) == FAILED


class RoundsInside(LlamaForCausalLM):
    """Computes its logits in float32, in another order where there is a cache."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        x = output.logits.float()
        output.logits = (x * 3 / 3 if output.past_key_values is None else x).to(output.logits)
        return output


def test_rounding_inside_is_no_fault():
    report = judge(subject_of(RoundsInside), [1], budget=None)
    assert not report.failed(), "\n" + report.table()
    assert report.precision["computes_in"] == "fp32"
    assert any(1e-9 < check.measured for check in report.of(PASSED) if check.measured)


class AsOff(LlamaForCausalLM):
    """Off by as much as roundings are, and a little more, always the same way."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.past_key_values is not None:
            output.logits = output.logits * (1 + 3e-5)
        return output


def test_a_small_difference_that_no_rounding_makes_is_a_fault():
    report = judge(subject_of(AsOff), [1], budget=None)
    assert "with a cache = without" in {check.name for check in report.failed()}


def test_experts_without_float64_are_run_in_float32_and_it_is_said():
    report = judge(subject_of(MixtralForCausalLM), [2, 4], budget=None)
    assert not report.failed(), "\n" + report.table()
    assert report.precision["run_in"] == "fp32" and report.precision["reason"].startswith("no fp64")
    assert "no fp64" in printing.summary(report)


@pytest.mark.parametrize("model", ["rwkv", "minimax", "mamba2"])
def test_verdicts_agree_with_programs_of_transformers_alone(model):
    """Whatever version of transformers this is: a fault is found if and only if it is there."""
    points = {"rwkv": [1], "minimax": [1, 2, 3], "mamba2": [1, 3]}[model]
    report = judge(find_subject(referee_table.MODELS[model]), points, budget=None)
    found, left, _ = referee_table.explained(model, report)
    assert left == [], "\n" + report.table()
    for program, names in referee_table.EXPLAINED[model].items():
        if not any(check.name.startswith(names) for check in report.checks):
            continue
        with torch.no_grad():
            is_there = getattr(direct_faults, program)().is_there
        assert bool(found[program]) == is_there, program
    if model == "rwkv" and found["rwkv_rows"]:
        smallest_of = {check.name: check.smallest for check in found["rwkv_rows"]}
        assert smallest_of["generate, token by token = whole"]["sizes"]["rows"] == 2
        error = smallest_of["forward passes token by token = whole"]["error"]
        assert "shape [2, 4, 97]" in error


def test_results_on_record():
    readme = (referee_table.FOLDER / "README.md").read_text()
    for model, cls in referee_table.MODELS.items():
        report = json.loads((referee_table.FOLDER / f"{model}.json").read_text())
        assert report["subject"] == cls and f"[{model}]({model}.json)" in readme
        assert report["versions"]["transformers"] and report["versions"]["torch"]
        failed = [check for check in report["checks"] if check["verdict"] == FAILED]
        names = [x for xs in referee_table.EXPLAINED.get(model, {}).values() for x in xs]
        for check in failed:
            assert check["smallest"] and check["name"].startswith(tuple(names))
        assert bool(failed) == bool(names)
    assert all(f"`{program.__name__}`" in readme for program in direct_faults.PROGRAMS)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    clock = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        yield


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("budget", [0.5, 60])
def test_a_budget_is_kept_and_what_it_cut_off_is_not_passed(budget):
    report = judge(find_subject("LlamaForCausalLM"), budget=budget)
    assert not report.failed()
    left_out = report.of(NOT_RUN)
    assert left_out and {check.reason for check in left_out} == {BUDGET_SPENT}
    assert {report.verdict(check.point) for check in left_out} == {NOT_RUN}
    # Nothing is left out without a word.
    assert [check.name for check in report.checks] == [check.name for check in llama().checks]
    if budget > 1:
        # The most telling were run.
        assert report.checks[0].verdict == PASSED
    text = printing.summary(report)
    assert BUDGET_SPENT in text


@pytest.mark.usefixtures("ticking")
def test_a_budget_for_ours():
    report = run(zoo.contract.zoo_subject("retnet"), [3, 4], budget=12)
    assert not report.failed(), "\n" + report.table()
    left_out = [check for check in report.checks if check.reason == BUDGET_SPENT]
    assert left_out and all(check.verdict == NOT_RUN for check in left_out)
    assert {report.verdict(check.point) for check in left_out} == {NOT_RUN}
    assert any(check.verdict == PASSED for check in report.checks if check.point == 4)
    assert report.as_dict()["verdicts"][3] == NOT_RUN


def test_the_smallest():
    tried = []

    def fails(sizes):
        tried.append(dict(sizes))
        return sizes["rows"] >= 2 and sizes["tokens"] * sizes["rows"] >= 20

    found = smallest(fails, {"rows": 4, "tokens": 100}, {"rows": 1, "tokens": 1})
    assert found == ({"rows": 2, "tokens": 10}, True)
    assert len(tried) < 30

    def out_of_time(sizes):
        raise OutOfTime(BUDGET_SPENT)

    assert smallest(out_of_time, {"rows": 4}, {"rows": 1}) == ({"rows": 4}, False)


def test_files_are_well_formed(tmp_path, capsys):
    config = LlamaConfig(**zoo.contract.subject.TINY, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    files = [str(tmp_path / name) for name in ("report.json", "report.md")]
    arguments = ["--points", "3,7", "--json", files[0], "--markdown", files[1]]
    capsys.readouterr()
    assert main([str(tmp_path / "llama"), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "packed documents = separate documents: passed" in printed.out
    assert "state of constant size: does not apply" in printed.out
    with open(files[0]) as file:
        (report,) = json.load(file)
    assert report["verdicts"] == {"3": PASSED, "7": DOES_NOT_APPLY}
    assert report["precision"]["bound"] == 1e-5 and report["versions"]["transformers"]
    assert {"smallest", "promise", "measured", "verdict"} <= set(report["checks"][0])
    with open(files[1]) as file:
        lines = file.read().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {5}


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_budget_is_seconds(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["LlamaForCausalLM", "--budget", seconds])
    assert "expected seconds, more than 0" in capsys.readouterr().err


def test_a_class_that_cannot_be_made_small(capsys):
    assert main(["T5EncoderModel:Nothing"]) == 2
    assert main(["PreTrainedModel"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "config_class" in error
