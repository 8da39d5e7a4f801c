"""Every model on a GPU, at sizes that are used, against the same model on the CPU: `make gpu`.

Without one, ZOO_TINY_GPU_TESTS=1 runs all of it on the CPU: a test of these tests.
"""

import os

import pytest
import torch

import zoo

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU and "ZOO_TINY_GPU_TESTS" not in os.environ, reason="this torch sees no GPU"
    ),
]

# Heads of 64; what has segments or a window meets more than one of them.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
# No kernel of ours, which know no float64: what a GPU computes can be compared to the last digits,
# and must be where one of a million activations at a kink of relu changes a gradient by 1e-3.
WITHOUT_KERNELS = ("sliding_window", "infini", "block_recurrent", "long_llama", "rmt")
WITHOUT_KERNELS += ("transformer_xl", "landmark")
VARIANTS = [(name, variant) for name, x in zoo.MODELS.items() for variant in x.config.variants]
TOKENS = 300


def build(name, variant="default", **fields):
    torch.manual_seed(0)
    architecture = zoo.MODELS[name]
    config = architecture.config(**SIZES | architecture.config.variants.get(variant, {}) | fields)
    return architecture.causal_lm(config).eval()


def inputs():
    """(ids [2, T], a mask with padding in one row, positions of three packed documents)."""
    ids = torch.randint(0, 512, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    restarts = torch.cat([torch.arange(n) for n in (1, 160, TOKENS - 161)]).repeat(2, 1)
    return ids, mask, restarts


def results(model, device):
    """Logits and gradients of plain, padded and packed rows, on the CPU."""
    model.zero_grad()  # or the old gradients, which a caller has, move along
    model = model.to(device)
    ids, mask, restarts = (x.to(device) for x in inputs())
    losses = (
        model(ids, labels=ids).loss
        + model(ids, labels=ids, attention_mask=mask).loss
        + model(ids, labels=ids, position_ids=restarts).loss
    )
    losses.backward()
    with torch.no_grad():
        logits = {
            "plain": model(ids).logits,
            "padded": model(ids, attention_mask=mask).logits[mask.bool()],
            "packed": model(ids, position_ids=restarts).logits,
        }
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: x.cpu() for name, x in (logits | gradients).items()}


def relative(x, expected, floor=0.0):
    difference = x.double() - expected.double()
    return (difference.norm() / expected.double().norm().clamp(min=floor)).item()


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_equals_the_cpu(name, variant):
    """In float64 there. In float32 up to rounding, and products of 21 bits in the kernels."""
    exact = name in WITHOUT_KERNELS
    model = build(name, variant).double()
    expected = results(model, "cpu")
    got = results(model if exact else model.float(), DEVICE)
    # A gradient that is zero in theory is whatever rounding leaves of it.
    floor = 1e-5 * max(x.double().norm() for x in expected.values())
    errors = {key: relative(got[key], x, floor) for key, x in expected.items()}
    wrong = {key: error for key, error in errors.items() if not error < (1e-9 if exact else 2e-4)}
    assert not wrong, wrong


@pytest.mark.parametrize("name", zoo.MODELS)
def test_decoding_is_the_whole(name):
    """A prefill, a piece and single tokens, as one run."""
    model = build(name).to(DEVICE)
    ids = inputs()[0].to(DEVICE)
    with torch.no_grad():
        expected = model(ids).logits
        bounds = [0, 270, 280, *range(281, TOKENS + 1)]
        cache, parts = None, []
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert relative(torch.cat(parts, 1), expected) < 2e-4


@pytest.mark.parametrize("name", zoo.MODELS)
def test_generates(name):
    """Greedy with a cache, rows of different lengths: what it gives without one."""
    model = build(name).to(DEVICE)
    ids, mask, _ = (x[:, :200].to(DEVICE) for x in inputs())
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    got, expected = (model.generate(ids, use_cache=cached, **how) for cached in (True, False))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_bfloat16_training_step(name):
    """Autocast as in the recipe: no further from float32 than twice what the CPU is."""
    model = build(name).train()
    ids = inputs()[0]

    def step(device, dtype):
        model.to(device).zero_grad()
        x = ids.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(x, labels=x)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        return output.logits.detach().cpu(), gradient.cpu()

    exact = step("cpu", torch.float32)
    cpu, gpu = step("cpu", torch.bfloat16), step(DEVICE, torch.bfloat16)
    for mine, reference, expected in zip(gpu, cpu, exact, strict=True):
        assert relative(mine, expected) < 2 * relative(reference, expected) + 1e-3
