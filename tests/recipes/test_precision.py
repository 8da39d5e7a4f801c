"""What runs compute in: what was asked for, else what the device is faster in, decided once."""

import json

import pytest
import torch

from pretraining import precision
from pretraining.precision import (
    Precision,
    cut,
    faster,
    kept_precision,
    measure,
    precision_of,
    product_of,
    settle,
    time_product,
)
from pretraining.recipe import Recipe, UsageError

CPU = torch.device("cpu")
SLOW, FAST = {"fp32": 0.02, "bf16": 0.026}, {"fp32": 0.02, "bf16": 0.008}  # bf16 on two CPUs
SHORT = ["--precision", "auto", "--eval_every", "0", "--schedule", "constant"]
PRECISIONS = "precision", "precision_seconds"


@pytest.fixture
def instructions(monkeypatch):
    """`instructions(bf16=True)`: what this CPU says that it has."""

    def has(**names):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names, raising=False)

    has(avx512_bf16=True)
    return has


@pytest.fixture
def timed(instructions, monkeypatch):
    """`timed(seconds)`: what a product takes from now on; () raises where one is timed."""

    def takes(seconds=None):
        def time_product(*product):
            assert seconds, "nothing is to be measured here"
            return dict(seconds)

        monkeypatch.setattr(precision, "time_product", time_product)

    return takes


def test_what_is_asked_for(instructions):
    """ "auto" on a CPU is left to be measured, whatever instructions it has."""
    asked = "auto", "bf16", "fp32"
    assert [precision_of(each, CPU).name for each in asked] == ["", "bf16", "fp32"]
    instructions(avx512_bf16=False)
    assert [precision_of(each, CPU).name for each in ("auto", "fp32")] == ["", "fp32"]
    with pytest.raises(UsageError, match="has no bf16"):
        precision_of("bf16", CPU)


def test_a_gpu_is_asked_and_not_timed(monkeypatch):
    gpu = torch.device("cuda")
    for can, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: can)  # noqa: B023
        assert precision_of("auto", gpu).name == name


@pytest.mark.parametrize(
    ("requested", "launched", "expected"),
    [
        ("auto", "no", ""),  # accelerate's default, which nobody asked for
        ("fp32", "no", "fp32"),
        ("bf16", "no", "bf16"),
        ("auto", "bf16", "bf16"),
        ("bf16", "bf16", "bf16"),
        ("fp32", "bf16", None),
        *[(mine, other, None) for mine in ("auto", "fp32", "bf16") for other in ("fp16", "fp8")],
    ],
)
def test_what_the_launcher_asks_for(instructions, requested, launched, expected):
    """It is done or refused, never both asked and ignored."""
    instructions(bf16=True)
    if expected is not None:
        assert precision_of(requested, CPU, launched).name == expected
        return
    with pytest.raises(UsageError, match=f"asks for mixed precision '{launched}'") as error:
        precision_of(requested, CPU, launched)
    assert "--mixed_precision no" in str(error.value) and "\n" not in str(error.value)


def test_the_launchers_bf16_needs_a_device_with_it(instructions):
    instructions()
    with pytest.raises(UsageError, match="has no bf16"):
        precision_of("auto", CPU, "bf16")


def test_a_continuation_is_as_its_run(instructions):
    """Where recipes say "auto"; the launcher may not ask for another."""
    for kept in (Precision("fp32", SLOW), Precision("bf16", FAST)):
        for device in (CPU, torch.device("cuda")):
            assert precision_of("auto", device, "no", kept) is kept
        instructions()  # it goes on on a CPU that emulates bf16
        assert precision_of("auto", CPU, "", kept) is kept
    with pytest.raises(UsageError, match='the run began in "fp32"'):
        precision_of("auto", CPU, "bf16", Precision("fp32"))
    assert precision_of("auto", CPU, "bf16", kept) is kept
    assert precision_of("bf16", CPU, "no", kept) is kept  # which the run began in


def test_the_faster_one():
    assert faster(SLOW) == Precision("fp32", SLOW)
    assert faster(FAST) == Precision("bf16", FAST)
    # What is hardly faster is not worth its digits.
    assert faster({"fp32": 1.05, "bf16": 1.0}).name == "fp32"


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (SLOW, "precision fp32: on this CPU a training product takes 1.30 times as long in bf16"),
        (FAST, "precision bf16: on this CPU a training product takes 2.50 times as long in fp32"),
    ],
)
def test_what_is_said(timed, seconds, line):
    said = []
    timed(seconds)
    assert measure((8, 16, 32), said.append).seconds == seconds
    assert said == [line]


def test_the_best_of_turns_counts(monkeypatch):
    """Other work on the machine falls on either, preparations on the first round."""
    now, calls = [0.0], []
    waits = {False: [9.0, 5.0, 2.0, 4.0], True: [9.0, 3.0, 6.0, 7.0]}

    def product(x, up, down, in_bf16):
        calls.append(in_bf16)
        now[0] += waits[in_bf16][min(calls.count(in_bf16), 4) - 1]

    monkeypatch.setattr(precision, "_product", product)
    found = time_product(8, 16, 32, clock=lambda: now[0])
    assert found == {"fp32": 2.0, "bf16": 3.0}
    assert calls == [False, True] * 4  # no further round when it has taken long


def test_products_are_timed_as_training_has_them():
    """Both are really run, with weights that autocast converts, and draw no random number."""
    state = torch.random.get_rng_state()
    x, up, down = (torch.ones(n, m, requires_grad=True) for n, m in ((4, 8), (16, 8), (8, 16)))
    with torch.profiler.profile() as profile:
        precision._product(x, up, down, True)
    conversions = sum(e.count for e in profile.key_averages() if e.key == "aten::_to_copy")
    assert conversions >= 6  # two weights and what comes in, forward; their gradients, backward
    assert all(seconds > 0 for seconds in time_product(64, 16, 32).values())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_product_is_cut_to_a_fraction_of_a_second():
    assert cut(2048, 144, 288) == (2048, 144, 288)
    for product in ((32768, 256, 1024), (65536, 4096, 11008), (64, 4096, 14336)):
        tokens, size, width = cut(*product)
        assert 12 * tokens * size * width <= precision.FLOPS
        assert tokens >= min(product[0], precision.FEW_TOKENS) and width >= size > 64
    config = type("Config", (), {"hidden_size": 8, "intermediate_size": 24})
    recipe = Recipe("x", "retnet", batch_size=8, sequence_length=64, sequence_parallel=2)
    assert product_of(recipe, config, 4) == (4 * 64 // 2, 8, 24)


def test_the_first_process_decides_for_all(timed):
    """Each would measure something else."""
    found, waiting = [], Precision("")
    timed(SLOW)
    first = settle(waiting, (8, 8, 8), CPU, True, lambda mine: [*found, mine][-2:] + [None])
    assert first.name == "fp32"
    timed()
    answers = iter([[True, True], [first, None]])
    assert settle(waiting, (8, 8, 8), CPU, False, lambda mine: next(answers)) is first


def test_a_process_without_bf16_decides_for_all(timed):
    timed()
    assert settle(Precision(""), (8, 8, 8), CPU, True, lambda _: [True, False]).name == "fp32"


def test_what_is_known_is_not_measured(timed, in_process, workshop):
    """Neither alone nor with others, who would wait."""
    timed()
    for name in ("fp32", "bf16"):
        decided = Precision(name)
        assert settle(decided, None, CPU, True, lambda _: pytest.fail("asked")) is decided
    result = in_process(*SHORT, "--precision", "bf16", "--steps", "8")
    assert result.returncode == 0 and "threads, bf16" in result.stdout, result.stderr
    record = json.loads((workshop.folder / "tiny/run.json").read_text())
    assert [record[key] for key in PRECISIONS] == ["bf16", {}]


@pytest.mark.parametrize(("seconds", "opposite"), [(FAST, SLOW), (SLOW, FAST)])
def test_a_run_keeps_its_precision(timed, in_process, workshop, seconds, opposite):
    """Whatever a measurement says later, and in an older run whose checkpoints do not say it."""
    name = faster(seconds).name

    def run(steps, *options):
        result = in_process(*SHORT, "--steps", str(steps), *options)
        assert result.returncode == 0, result.stderr
        assert f"threads, {name}" in result.stdout
        assert result.stdout.count("a training product takes") == (not options[2:])
        record = json.loads((workshop.folder / options[1] / "run.json").read_text())
        assert [record[key] for key in PRECISIONS] == [name, seconds]

    timed(seconds)
    run(12, "--name", "whole")
    run(8, "--name", "tiny")
    timed(opposite)
    run(9, "--name", "tiny", "--resume")
    timed()
    (workshop.folder / "tiny" / "run.json").write_text("{")  # damaged
    run(10, "--name", "tiny", "--resume", "--precision", name)  # which is no change
    path = workshop.folder / "tiny" / "checkpoint-10" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    assert [manifest.pop(key) for key in PRECISIONS] == [name, seconds]
    path.write_text(json.dumps(manifest))
    run(12, "--name", "tiny", "--resume")
    losses = [[x for x in workshop.curve(n) if "loss" in x] for n in ("tiny", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    other = {"fp32": "bf16", "bf16": "fp32"}[name]
    result = in_process(*SHORT, "--steps", "12", "--resume", "--precision", other)
    assert result.returncode == 2
    assert f"(precision: {name!r} -> {other!r})" in result.stderr, result.stderr


def test_a_run_whose_record_is_lost(tmp_path, instructions):
    """An earlier version took bf16 where there were instructions for it."""
    assert kept_precision(tmp_path, {}, CPU) is None
    for asked, name in (("auto", "bf16"), ("fp32", "fp32")):
        assert kept_precision(tmp_path, {"recipe": {"precision": asked}}, CPU).name == name
    instructions()
    assert kept_precision(tmp_path, {"recipe": {"precision": "auto"}}, CPU).name == "fp32"


def test_two_processes(workshop):
    """They train in what the first has measured, and it is said once."""
    result = workshop.run("--precision", "auto", "--steps", "26", "--eval_every", "0", processes=2)
    assert result.returncode == 0, result.stderr
    record = json.loads((workshop.folder / "tiny/run.json").read_text())
    assert record["processes"] == 2
    assert result.stdout.count("a training product takes") == bool(record["precision_seconds"])
