"""Training full attention in groups (S2-Attn): official numbers, no leak, every way tokens lie."""

import pytest
import torch
from goldens import golden_tensors

import zoo
from zoo.core.sequence import Sequence
from zoo.core.state import State
from zoo.layers.positions import rotate
from zoo.layers.shifted_groups import mean_visible_in_groups, train_in_groups

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "sliding_window": None,
}
implementations = pytest.mark.parametrize("implementation", ["banded", "eager", "sdpa"])


def model_of(size=8, implementation="banded", **fields):
    torch.manual_seed(0)
    config = zoo.SlidingWindowConfig(**SIZES | fields)
    config._attn_implementation = implementation
    model = zoo.SlidingWindowForCausalLM(config).double().train()
    train_in_groups(model, size)
    return model


def attended(model, q_BTHK, k_BTHK, v_BTHV):
    """A mixer's attention of turned queries and keys, each row one document."""
    sequence = Sequence.open(q_BTHK.shape[:2], q_BTHK.device)
    state = State(dict.fromkeys(("keys_BWHK", "values_BWHV")), is_kept=False)
    return model.model.layers[0].mixer.run_groups(q_BTHK, k_BTHK, v_BTHV, None, sequence, state)


def rolled(q, k, v, size, scale):
    """The authors' form without flash attention, whose first tokens see the last: [B, T, H, K]."""
    half, length = q.shape[2] // 2, q.shape[1]
    parts = [x.clone() for x in (q, k, v)]
    for x in parts:
        x[:, :, half:] = x[:, :, half:].roll(-(size // 2), dims=1)
    groups = [x.unflatten(1, (length // size, size)) for x in parts]
    scores = torch.einsum("bnthk,bnshk->bnhts", *groups[:2]) * scale
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    o = torch.einsum(
        "bnhts,bnshv->bnthv", scores.masked_fill(future, -torch.inf).softmax(-1), groups[2]
    )
    o = o.flatten(1, 2)
    o[:, :, half:] = o[:, :, half:].roll(size // 2, dims=1)
    return o


def turned(model, golden):
    q, k, v = (golden[name].transpose(1, 2) for name in "qkv")
    rotation = model.model.rotation(torch.arange(q.shape[1])[None])
    return rotate(q, *rotation), rotate(k, *rotation), v


@implementations
def test_official_numbers(implementation):
    golden, model = golden_tensors("ops-s2attn"), model_of(8, implementation)
    leaves = {name: golden[name].requires_grad_() for name in "qkv"}
    o_BHTV = attended(model, *turned(model, leaves)).transpose(1, 2)
    torch.testing.assert_close(o_BHTV, golden["flash.o"], rtol=0, atol=1e-9)
    (o_BHTV * golden["cotangent"]).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, golden[f"flash.grad_{name}"], rtol=0, atol=1e-9)


def test_the_form_that_rolls_is_the_authors_other_one():
    golden, model = golden_tensors("ops-s2attn"), model_of(8)
    q, k, v = turned(model, golden)
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    o_BHTV = rolled(q, k, v, 8, 8**-0.5).transpose(1, 2)
    torch.testing.assert_close(o_BHTV, golden["eager.o"], rtol=0, atol=1e-9)


def what_is_seen(attend, length):
    """Of each half of the heads, [T, T]: whose value an output depends on."""
    q_BTHK, k_BTHK = (torch.rand(1, length, 4, 8, dtype=torch.float64) for _ in range(2))
    v_BSHV = torch.zeros(length, length, 4, 8, dtype=torch.float64)
    v_BSHV[range(length), range(length)] = 1.0  # row by row, of one key at a time
    o_BTHV = attend(q_BTHK.expand(length, -1, -1, -1), k_BTHK.expand(length, -1, -1, -1), v_BSHV)
    return [(half[..., 0] > 0).all(-1).T for half in o_BTHV.chunk(2, dim=2)]


def leaks(attend, length=32):
    return any(seen.triu(1).any() for seen in what_is_seen(attend, length))


def test_no_token_sees_a_later_one():
    golden, model = golden_tensors("ops-s2attn"), model_of(8, num_key_value_heads=4)
    found = what_is_seen(lambda *x: attended(model, *x), 32)
    for seen, name in zip(found, ("unshifted", "shifted_flash")):
        assert torch.equal(seen, golden[f"visible_{name}"])
    assert not leaks(lambda *x: attended(model, *x))
    assert leaks(lambda *x: rolled(*x, 8, 1.0))
    for size, length in ((8, 30), (7, 30), (5, 3), (1, 4), (40, 32)):
        train_in_groups(model, size)
        for shift, seen in zip(
            (0, size // 2), what_is_seen(lambda *x: attended(model, *x), length)
        ):
            group = (torch.arange(length) + shift) // size
            assert torch.equal(seen, (group[:, None] == group).tril())


@pytest.mark.parametrize("kind", ["alibi", "t5", "fire", "xpos", None])
@implementations
def test_scores_are_those_of_the_document(implementation, kind):
    """As by all scores, of which a group's are left; three heads of keys for two halves."""
    fields = {"position_embedding_type": kind, "num_attention_heads": 6, "num_key_value_heads": 3}
    fields |= {"fire_init_length": 4} if kind == "fire" else {}
    has_logits = kind is None and implementation != "sdpa"
    model = model_of(8, implementation, learnable_sinks=has_logits, **fields)
    mixer = model.model.layers[0].mixer
    if has_logits:
        torch.nn.init.normal_(mixer.sink_logits)
    q, k, v = (torch.randn(2, 30, heads, 8, dtype=torch.float64) for heads in (6, 3, 3))
    found = attended(model, q, k, v)
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    token = torch.arange(30)
    distance = (token[:, None] - token).clamp(min=0)
    decay_K = mixer.log_decay(q.device) if kind == "xpos" else torch.zeros(8).double()
    decay_TSK = (distance[..., None] * decay_K).exp()
    scores = torch.einsum("bthk,bshk,tsk->bhts", q, k, decay_TSK) * mixer.scale
    if kind == "fire":
        places = token, distance, torch.float64
        scores = scores + mixer.position_bias.by_query(*places).movedim(-1, 0)
    elif kind in ("alibi", "t5"):
        scores = scores + mixer.position_bias.by_distance(distance, torch.float64)
    if has_logits:
        logits_H = mixer.sink_logits.detach()
        scores = torch.cat([scores, logits_H[:, None, None].expand(2, 6, 30, 1)], dim=-1)
    for half, shift in ((slice(0, 3), 0), (slice(3, 6), 4)):
        group = (token + shift) // 8
        seen = (group[:, None] == group).tril()
        seen = torch.nn.functional.pad(seen, (0, scores.shape[-1] - 30), value=True)
        p = scores[:, half].masked_fill(~seen, -torch.inf).softmax(-1)[..., :30]
        expected = torch.einsum("bhts,bshv->bthv", p, v[:, :, half])
        torch.testing.assert_close(found[:, :, half], expected, rtol=0, atol=1e-12)


TYPES = [
    {},
    {"position_embedding_type": "alibi"},
    {"position_embedding_type": "t5", "attention_scale": 1.0},
    {"position_embedding_type": ["rope", None], "num_key_value_heads": 1},
    {"position_embedding_type": "xpos"},
    {"position_embedding_type": "fire", "fire_init_length": 4, "fire_mlp_width": 5},
    {"learnable_sinks": True, "num_attention_heads": 6, "num_key_value_heads": 3},
]


@pytest.mark.parametrize(
    "fields", TYPES, ids=["rope", "alibi", "t5", "list-odd", "xpos", "fire", "sinks-odd"]
)
@implementations
def test_rows_padding_and_packing(implementation, fields):
    """The same numbers and gradients for a document alone, padded on the left, and packed."""
    if implementation == "sdpa" and "learnable_sinks" in fields:
        pytest.skip("sdpa has no logits without a value")
    model, alone = model_of(8, implementation, **fields), model_of(8, "eager", **fields)
    with torch.no_grad():
        for p in model.parameters():  # sink logits and tables of no special value
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    alone.load_state_dict(model.state_dict())
    lengths = [19, 30, 8, 1]
    documents = [torch.randint(0, 50, (1, n)) for n in lengths]
    expected = [alone(ids, use_cache=False).logits[0] for ids in documents]
    sum(x.square().sum() for x in expected).backward()
    ids = torch.zeros(len(lengths), 30, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(documents):
        ids[row, 30 - own.shape[1] :], mask[row, 30 - own.shape[1] :] = own[0], 1
    packed = torch.cat([torch.arange(n) for n in lengths])[None]
    rows = torch.cat([documents[1], documents[1].flip(1)])
    ways = {
        "padded": (model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], 1),
        "packed": (
            model(torch.cat(documents, 1), position_ids=packed, use_cache=False).logits[0],
            1,
        ),
        "rows": (model(rows, use_cache=False).logits[0], 0),
    }
    for way, (found, is_all) in ways.items():
        wanted = torch.cat(expected) if is_all else expected[1]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=way)
        if is_all:
            model.zero_grad()
            found.square().sum().backward()
            for p, own in zip(model.parameters(), alone.parameters()):
                torch.testing.assert_close(p.grad, own.grad, rtol=1e-8, atol=1e-10, msg=way)


def test_in_training_alone():
    """Full attention in evaluation, with any state; nothing of it in config or weights."""
    model, plain = model_of(4), model_of(None)
    ids = torch.randint(0, 50, (2, 19))
    assert not torch.allclose(model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="takes whole texts, got a state of tokens before"):
        model(ids, past_key_values=model(ids, use_cache=True).past_key_values)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 19
    model.eval(), plain.eval()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.train(), train_in_groups(model, None)
    torch.testing.assert_close(model(ids).logits, plain.train()(ids).logits, rtol=0, atol=0)


def test_recomputed_in_groups():
    model, ids = model_of(8), torch.randint(0, 50, (2, 30))
    gradients = []
    for recomputes in (False, True):
        model.zero_grad()
        if recomputes:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_operations_of_a_step_count_groups():
    seen = [sum(len({*range(i // 8 * 8, i + 1)}) for i in range(30))]
    seen.append(sum(len({*range(max(0, (i + 4) // 8 * 8 - 4), i + 1)}) for i in range(30)))
    assert mean_visible_in_groups(30, 8) == sum(seen) / 2 / 30
    model, plain = model_of(8), model_of(None)
    less = plain.flops_per_token(30) - model.flops_per_token(30)
    assert less == pytest.approx(2 * 4 * 4 * 8 * (31 / 2 - sum(seen) / 60))
    assert model.eval().flops_per_token(30) == plain.flops_per_token(30)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"sliding_window": 8}, 4, "got a model with a window of 8 tokens"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 4, "number is even, got 3"),
        ({}, 0, "at least 1 token, got 0"),
        ({"rope_extension": {"type": "rerope", "window": 8}}, 4, "is for use without training"),
    ],
)
def test_what_has_no_groups(fields, size, message):
    with pytest.raises(ValueError, match=message):
        model_of(size, **fields)


def test_hybrids_and_recurrences():
    config = zoo.LightningConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="got a model with no softmax attention"):
        train_in_groups(zoo.LightningForCausalLM(config), 4)
    fields = {"softmax_layers": [1], "num_key_value_heads": 2}
    hybrid = zoo.LightningForCausalLM(zoo.LightningConfig(**{**config.to_dict(), **fields})).train()
    ids = torch.randint(0, 50, (1, 19))
    before = hybrid(ids).logits
    train_in_groups(hybrid, 4)
    assert (hybrid(ids).logits - before).abs().max() > 1e-4
