"""The RWKV family: token shift, extremes, optimizer groups, configs, initialisation."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import initialization as init

import zoo
from zoo.core.sequence import Sequence
from zoo.layers import split_recurrence
from zoo.models.rwkv import Shifted, last_tokens

NAMES = ["rwkv4", "rwkv5", "rwkv6", "rwkv7"]
TINY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

versions = pytest.mark.parametrize("name", NAMES)


def build(name, **fields):
    """A model away from its initialisation, at which many outputs are zero."""
    architecture = zoo.MODELS[name]
    torch.manual_seed(0)
    model = architecture.causal_lm(architecture.config(**TINY | fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight) / (weight.shape[-1] ** 0.5)
    return model.eval()


@pytest.mark.parametrize("with_before", [False, True])
@pytest.mark.parametrize("lengths", [None, [1], [5], [1, 3, 1, 1, 7, 2]])
def test_tokens_before(lengths, with_before):
    """Each document by itself, in plain Python."""
    torch.manual_seed(0)
    if lengths is None:
        x_BTD, documents = torch.randn(3, 6, 4), [(row, 0, 6) for row in range(3)]
        sequence = Sequence.open((3, 6), x_BTD.device)
    else:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        x_BTD = torch.randn(1, sum(lengths), 4)
        sequence = Sequence.open(tuple(x_BTD.shape[:2]), x_BTD.device, position_ids=positions)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        documents = [(0, end - n, end) for n, end in zip(lengths, ends, strict=True)]
    before_ND = torch.randn(len(documents), 4) if with_before else None
    got_BTD = Shifted(x_BTD, sequence, before_ND).before_BTD
    got_ND = last_tokens(x_BTD, sequence)
    for n, (row, start, end) in enumerate(documents):
        first = before_ND[n] if with_before else torch.zeros(4)
        expected = [first, *x_BTD[row, start : end - 1]]
        assert torch.equal(got_BTD[row, start:end], torch.stack(expected))
        assert torch.equal(got_ND[n], x_BTD[row, end - 1])


def make_extreme(name, model):
    """Half of the channels forget at once, half never; RWKV-4's keys reach from -60 to 60."""
    with torch.no_grad():
        for layer in model.model.layers:
            mixer = layer.mixer
            decay = mixer.decay.bias if name == "rwkv7" else mixer.time_decay
            # exp(-exp(5)) is 3e-65 and exp(-exp(-15)) is 1 - 3e-7. RWKV-7 has decays between
            # exp(-0.607) and 1 only, and reaches both ends.
            decay.view(-1)[::2], decay.view(-1)[1::2] = 5.0, -15.0
            if name == "rwkv4":
                seen = []
                hook = mixer.k_proj.register_forward_hook(
                    lambda module, inputs, output, seen=seen: seen.append(output.abs().max())
                )
                model(torch.arange(40)[None])
                hook.remove()
                mixer.k_proj.weight *= 60 / seen[0]


OPERATORS = {
    "rwkv4": "wkv4",
    "rwkv5": "linear_recurrence",
    "rwkv6": "linear_recurrence",
    "rwkv7": "delta_recurrence",
}


def in_float64(operator):
    """The operator on the same numbers in float64: nothing it could do would be more exact."""

    def run(*tensors, **keyword):
        def double(x):
            is_real = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.double() if is_real else x

        keyword = {name: double(x) for name, x in keyword.items()}
        y, state = operator(*map(double, tensors), **keyword)
        return y.to(tensors[2].dtype), None if state is None else state.float()

    return run


@pytest.mark.slow
@versions
def test_extremes_over_65536_tokens_in_bfloat16(name, monkeypatch):
    """Finite, and hardly further from float64 than with an exact recurrence, in every gradient."""
    model = build(name)
    make_extreme(name, model)
    model = model.to(torch.bfloat16)
    exact = build(name).double()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 40, (1, 65_536), generator=torch.Generator().manual_seed(1))

    def run(model):
        model.zero_grad()
        logits = model(ids).logits
        logits.backward(torch.linspace(-1, 1, 40, dtype=logits.dtype).expand_as(logits))
        return {"logits": logits.detach()} | {key: p.grad for key, p in model.named_parameters()}

    expected, got = run(exact), run(model)
    operator = in_float64(getattr(split_recurrence, OPERATORS[name]))
    monkeypatch.setattr(split_recurrence, OPERATORS[name], operator)
    plain = run(model)
    for key, x in got.items():
        assert x.isfinite().all(), key
        error, least = ((y[key] - expected[key]).norm() for y in (got, plain))
        # Below a rounding of the result itself there is nothing to compare.
        assert error < 2 * least + 2**-9 * expected[key].norm(), (key, error / least)


@versions
def test_optimizer_groups_are_the_authors(name):
    """Linear layers and embeddings decay; decays learn twice as fast, RWKV-4's u three times."""
    model = build(name)
    names = {id(p): key for key, p in model.named_parameters()}
    seen = {}
    for group in model.optimizer_groups():
        for p in group["params"]:
            assert names[id(p)] not in seen
            seen[names[id(p)]] = (group["decays"], group["lr_scale"])
    assert seen.keys() == set(names.values())
    linear = {
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    assert {key for key, (decays, _) in seen.items() if decays} == linear
    faster = {key.split("mixer.")[-1]: scale for key, (_, scale) in seen.items() if scale != 1}
    assert (
        faster
        == {
            "rwkv4": {"time_decay": 2.0, "time_first": 3.0},
            "rwkv5": {"time_decay": 2.0},
            "rwkv6": {"time_decay": 2.0},
            "rwkv7": {"decay.bias": 2.0},
        }[name]
    )
    model.lm_head.requires_grad_(False)
    trained = [p for group in model.optimizer_groups() for p in group["params"]]
    assert len(trained) == len(names) - 1


@versions
def test_every_matrix_is_initialised_once(name, monkeypatch):
    """Orthogonal matrices are dear: a model of 24 layers would take minutes twice over."""
    made = []
    orthogonal_ = init.orthogonal_
    monkeypatch.setattr(
        init, "orthogonal_", lambda x, **keyword: (made.append(id(x)), orthogonal_(x, **keyword))
    )
    architecture = zoo.MODELS[name]
    architecture.causal_lm(architecture.config(**TINY))
    assert len(made) == len(set(made)) > 0


def test_one_layer_is_the_first_of_many():
    """The trainers divide by L - 1, which one layer makes 0."""
    for name in NAMES:
        architecture = zoo.MODELS[name]
        model = architecture.causal_lm(architecture.config(**TINY | {"num_hidden_layers": 1}))
        assert all(p.isfinite().all() for p in model.parameters())


def test_the_first_layers_values_reach_all_others():
    """Layer 2's residual is taken from layer 0, not from layer 1."""
    model = build("rwkv7", num_hidden_layers=3).double()
    ids = torch.arange(20)[None]
    seen = {}
    for index, layer in enumerate(model.model.layers):

        def keep(module, inputs, output, index=index):
            seen[index] = output

        layer.mixer.v_proj.register_forward_hook(keep)
    received = []
    model.model.layers[2].mixer.register_forward_pre_hook(
        lambda module, inputs: received.append(inputs[3])
    )
    model(ids)
    assert torch.equal(received[0], seen[0])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rwkv5", {"head_size": 12, "num_attention_heads": None}, "num_attention_heads"),
        ("rwkv6", {"head_size": 8}, "num_attention_heads"),
        ("rwkv6", {"mix_lora_rank": 0}, "mix_lora_rank"),
        ("rwkv7", {"value_size": 33}, "value_size"),
        ("rwkv7", {"gate_lora_rank": 0}, "gate_lora_rank"),
        ("rwkv4", {"attention_hidden_size": 0}, "attention_hidden_size"),
    ],
)
def test_configs_that_do_not_fit(name, fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        zoo.MODELS[name].config(**TINY | fields)


def test_sizes_follow_the_released_models():
    """What the authors' checkpoints have: 0.1B and 1.5B of RWKV-7, 1.6B of RWKV-6, 169M of 4."""
    small = zoo.MODELS["rwkv7"].config(hidden_size=768)
    ranks = [getattr(small, f"{x}_lora_rank") for x in ("decay", "rate", "value", "gate")]
    assert ranks == [64, 64, 32, 128]
    large = zoo.MODELS["rwkv7"].config(hidden_size=2048)
    ranks = [getattr(large, f"{x}_lora_rank") for x in ("decay", "rate", "value", "gate")]
    assert ranks == [96, 96, 64, 256]
    assert (large.num_attention_heads, large.head_size, large.intermediate_size) == (32, 64, 8192)
    assert zoo.MODELS["rwkv6"].config(hidden_size=2048).intermediate_size == 7168
    assert zoo.MODELS["rwkv4"].config(hidden_size=768).intermediate_size == 3072


def test_a_new_document_in_a_used_cache_has_seen_nothing():
    """Keys far below those of the document before: its maximum must not be what they start from."""
    model = build("rwkv4").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.k_proj.weight *= 2000
    ids = torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True).past_key_values
    positions = torch.arange(20)[None].expand(3, 20)
    pieces = [
        model(ids[:, a:b], past_key_values=cache, position_ids=positions[:, a:b]).logits
        for a, b in ((0, 1), (1, 20))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits)
