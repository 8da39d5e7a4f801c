"""`torch.export` of every variant, as users of it write: one program for any batch and length."""

import io

import pytest
import torch
from torch.export import Dim, export, load, save

import zoo
from zoo.contract.subject import TINY, with_all_parts_active
from zoo.kernels.delta_recurrence import delta_recurrence_reference
from zoo.kernels.delta_recurrence_export import delta_recurrence_exported
from zoo.kernels.linear_recurrence import linear_recurrence_reference
from zoo.kernels.linear_recurrence_export import linear_recurrence_exported
from zoo.kernels.wkv4 import wkv4_reference
from zoo.kernels.wkv4_export import wkv4_exported

# Each export takes seconds. These show what the others do too, and run with FAST=1.
QUICK = {("retnet", "torchscale"), ("rwkv4", "default"), ("sliding_window", "default")}
VARIANTS = [(name, variant) for name, x in zoo.MODELS.items() for variant in x.config.variants]
# The stack runs once per window or segment.
FEEDBACK = [("block_recurrent", "feedback"), ("transformer_xl", "memory-tokens")]
FEEDBACK += [x for x in VARIANTS if x[0] == "rmt"]
ANY = {0: Dim("B", min=1, max=1024), 1: Dim("T", min=2, max=1 << 20)}
# Windows and segments are 16 tokens long, the chunks of the recurrences 32 and 64, blocks 128.
SHAPES = [(1, 2), (3, 16), (2, 17), (1, 130)]


@pytest.fixture(autouse=True)
def without_a_cache_of_fake_results():
    """Shapes that vary hardly ever meet again: filling the cache takes as long as tracing does."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def build(name, variant=None):
    """A tiny model, of one layer where all are alike and its variant does not say how many."""
    architecture = zoo.MODELS[name]
    fields = architecture.config.variants[variant or next(iter(architecture.config.variants))]
    # Later layers of RWKV-7 mix the first one's values in.
    layers = 1 + (name == "rwkv7" or any("layers" in x for x in fields) and variant != "default")
    torch.manual_seed(0)
    config = architecture.config(**TINY | {"num_hidden_layers": layers} | fields)
    return with_all_parts_active(architecture.causal_lm(config)).eval()


def tokens(batch, time):
    return torch.randint(1, 97, (batch, time), generator=torch.Generator().manual_seed(time))


def program_of(model, dims=ANY, strict=False, **inputs):
    inputs = {"input_ids": tokens(2, 20), **inputs}
    shapes = dict.fromkeys(inputs, dims) if dims else None
    kwargs = inputs | {"use_cache": False}
    if shapes:
        shapes["use_cache"] = None
    return export(model, args=(), kwargs=kwargs, dynamic_shapes=shapes, strict=strict)


def check(program, model, shapes=SHAPES):
    run = program.module()
    for shape in shapes:
        ids = tokens(*shape)
        logits = run(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow)
        for x in VARIANTS
        if x not in FEEDBACK
    ],
)
@torch.no_grad()
def test_one_program_for_any_batch_and_length(name, variant):
    model = build(name, variant)
    program = program_of(model)
    check(program, model)
    # Nothing of ours is needed to run it.
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    namespaces = {x.namespace for x in operators if isinstance(x, torch._ops.OpOverload)}
    assert namespaces == {"aten"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), FEEDBACK)
@torch.no_grad()
def test_feedback_has_any_batch_and_one_length(name, variant):
    model = build(name, variant)
    check(program_of(model, {0: ANY[0]}), model, [(1, 20), (3, 20)])
    with pytest.raises(ValueError, match="got a number of tokens that varies"):
        program_of(model)


@pytest.mark.slow
@torch.no_grad()
def test_strict_export():
    model = build("rwkv4")
    check(program_of(model, strict=True), model)


@pytest.mark.parametrize(
    ("name", "dims"), [("rwkv4", None), *((x, ANY) for x in ("rwkv4", "rwkv7"))]
)
def test_with_gradients_on(name, dims):
    """The first exports one shape, and leaves nothing behind that the second would find."""
    model = build(name).train()
    program = program_of(model, dims)
    # The parameters are the model's own.
    ids = tokens(3, 70) if dims else tokens(2, 20)
    gradients = []
    for run in (program.module(), model):
        model.zero_grad()
        output = run(input_ids=ids, use_cache=False)
        output.logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_a_program_that_was_saved():
    model, file = build("retnet"), io.BytesIO()
    save(program_of(model), file)
    file.seek(0)
    check(load(file), model, [(3, 65)])


@torch.no_grad()
def test_what_is_no_row_of_one_document_is_refused():
    model, ids = build("retnet"), tokens(3, 65)
    ones, positions = torch.ones(2, 20, dtype=torch.long), torch.arange(20).repeat(2, 1)
    program = program_of(model, attention_mask=ones, position_ids=positions).module()
    mask, positions = torch.ones_like(ids), torch.arange(65).repeat(3, 1)

    def run(**changes):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | changes
        return program(use_cache=False, **inputs).logits

    torch.testing.assert_close(run(), model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="takes no padding"):
        run(attention_mask=mask.index_fill(1, torch.tensor([0, 1]), 0))
    with pytest.raises(RuntimeError, match="one document per row"):
        run(position_ids=positions % 40)
    with pytest.raises(ValueError, match="got cu_seq_lens_q or seq_idx"):
        program_of(model, None, seq_idx=torch.zeros(2, 20, dtype=torch.long))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def arguments_of(operator, form):
    """(tensors, keyword arguments without the state, shape of a state) of one operator."""
    q, k, v, a, b = (random(5, 2, 70, 2, 8) / 3).unbind()
    gates = -random(2, 70, 2, 8).abs()
    decay = {"none": None, "head": gates[0, 0, :, 0], "token": gates[..., 0], "channel": gates}
    if operator == "wkv4":
        k, v = k.flatten(2), v.flatten(2)
        return (gates[0, 0].flatten(), random(16), k, v), {}, (2, 3, 16)
    if operator == "delta":
        return (q, k, v, decay[form], a, b), {"scale": 0.5}, (2, 2, 8, 8)
    bonus = random(2, 8) if form == "channel" else None
    return (q, k, v, decay[form]), {"scale": 0.5, "bonus": bonus}, (2, 2, 8, 8)


FORMS = {
    "linear": (linear_recurrence_exported, linear_recurrence_reference),
    "delta": (delta_recurrence_exported, delta_recurrence_reference),
    "wkv4": (wkv4_exported, wkv4_reference),
}


@pytest.mark.parametrize(
    ("operator", "form"),
    [
        *((operator, form) for operator in ("linear", "delta") for form in ("none", "head")),
        *(("linear", "token"), ("linear", "channel"), ("delta", "channel"), ("wkv4", None)),
    ],
)
@pytest.mark.parametrize("time", [1, 70])
@torch.no_grad()
def test_states_go_in_and_come_out(operator, form, time, monkeypatch):
    """What a program takes of a state that it is given, and leaves behind, in float64."""
    # Without a program there is nobody to run PyTorch's scan for.
    for module in ("linear_recurrence", "delta_recurrence", "wkv4"):
        monkeypatch.setattr(f"zoo.kernels.{module}_export.scan", scan)
    tensors, keyword, shape = arguments_of(operator, form)
    tensors = [x[:, :time] if x is not None and x.ndim > 2 else x for x in tensors]
    state = random(*shape).abs()
    keyword |= {"initial_state": state, "output_final_state": True}
    (o, after), (expected, expected_after) = (run(*tensors, **keyword) for run in FORMS[operator])
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    if operator == "wkv4":  # in units of its own
        after, expected_after = (x[:, :2] * x[:, 2:].exp() for x in (after, expected_after))
    torch.testing.assert_close(after, expected_after, rtol=1e-9, atol=1e-9)


def scan(step, state, *parts):
    """`export_scan.scan`, by a loop."""
    outputs = []
    for part in zip(*parts, strict=True):
        state, output = step(state, *part)
        outputs.append(output)
    return state, tuple(map(torch.stack, zip(*outputs, strict=True)))
