"""Landmarks where they belong, a state in whole blocks, and steps that read few of them."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from zoo import LandmarkConfig, LandmarkForCausalLM
from zoo.core.sequence import Sequence
from zoo.core.state import fork_state, state_bytes
from zoo.layers.landmark_softmax import choose
from zoo.layers.landmark_stream import LandmarkStream, stream_length

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_length": 4,
}
IDS = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(0))


def build(**fields):
    torch.manual_seed(0)
    return LandmarkForCausalLM(LandmarkConfig(**SIZES, initializer_range=0.3, **fields)).eval()


def text_with_landmarks(num_tokens, at_once):
    """Numbers of tokens, and -1 for a landmark, as a reader would write them down."""
    stream = []
    for number in range(num_tokens):
        if not at_once and number and number % 4 == 0:
            stream.append(-1)
        stream.append(number)
        if at_once and number % 4 == 3:
            stream.append(-1)
    return stream


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("form", ["dense", "rows at different places", "packed"])
def test_landmarks_are_where_they_belong(at_once, form):
    """Of documents that begin after `before` tokens, which the state has."""
    befores, counts = {
        "dense": ([6, 6], [7, 7]),
        "rows at different places": ([3, 8], [6, 6]),
        "packed": ([0, 3, 0, 4], [1, 9, 13, 4]),
    }[form]
    if form == "packed":
        before = torch.tensor(befores)
        bounds = torch.tensor([0, *counts]).cumsum(0)
        document = torch.arange(4).repeat_interleave(torch.tensor(counts))
        clock = torch.cat([b + torch.arange(n) for b, n in zip(befores, counts)])[None]
        sequence = Sequence(
            (4, max(counts)),
            clock,
            clock,
            before + torch.tensor(counts),
            cu_seqlens=bounds,
            token_index=torch.arange(len(document)),
            row_of_document=torch.arange(4),
            continues=before > 0,
            last_document=torch.arange(4),
        )
        tokens = clock.float()[..., None]
    else:
        shape = 2, counts[0]
        sequence = Sequence.open(shape, "cpu", clock_before=torch.tensor(befores))
        tokens = sequence.clock.expand(shape).float()[..., None]
    stream = LandmarkStream(sequence, 4, at_once, num_slots=10)
    landmarks = torch.full((*stream.landmark_ids(0).shape, 1), -1.0)
    joined = stream.join(tokens, landmarks)
    expected = []
    for before, count in zip(befores, counts):
        seen = len(text_with_landmarks(before, at_once))
        assert seen == stream_length(before, 4, at_once)
        assert seen == stream_length(torch.tensor(before), 4, at_once)
        expected.append(text_with_landmarks(before + count, at_once)[seen:])
    found = joined[..., 0].flatten().tolist()
    assert found == [float(x) for row in expected for x in row]
    again, rest = stream.split(joined)
    assert torch.equal(again, tokens) and (rest == -1).all()
    assert stream.num_slots % 5 == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_state_by_formula(at_once):
    model = build(landmark_predicts_next=at_once)
    cache = None
    with torch.no_grad():
        for number in range(1, 14):
            cache = model(IDS[:1, number - 1 : number], past_key_values=cache, use_cache=True)
            cache = cache.past_key_values
            blocks = -(-len(text_with_landmarks(number, at_once)) // 5)
            expected = (
                2 * 2 * 5 * blocks * 2 * 4 * 4
            )  # layers, keys and values, places, G, K, bytes
            assert state_bytes(cache) == expected == model.state_size(number)


@torch.no_grad()
def test_a_step_reads_the_chosen_blocks_and_its_own():
    """All other tokens may be anything: landmarks alone are looked at."""
    model = build(retrieved_blocks=2)
    chosen = [[] for _ in range(2)]
    for layer, seen in zip(model.model.layers, chosen):
        layer.mixer.choice.register_forward_hook(
            lambda _, args, index, seen=seen: seen.append(index)
        )
    cache = model(IDS[:1], use_cache=True).past_key_values
    step = IDS[:1, :1]
    for seen in chosen:
        seen.clear()
    expected = model(step, past_key_values=fork_state(cache)).logits
    for layer, seen in zip(cache.layers, chosen):
        for name, x in layer.tensors.items():
            blocks = x.unflatten(1, (-1, 5))
            for group in range(2):
                # Of the token, which begins a block, and of the landmark before it.
                heads = torch.cat([i[0, :, 2 * group : 2 * group + 2].flatten() for i in seen])
                unread = sorted({*range(len(blocks[0]) - 1)} - {*heads.tolist()} - {9})
                assert unread
                upto = 4 if name.startswith("keys") else 5
                blocks[0, unread, :upto, group] = torch.nan
    assert torch.equal(model(step, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("fields", [{}, {"retrieved_blocks": 2}])
@torch.no_grad()
def test_autocast_is_of_matrices_alone(fields):
    model = build(**fields)
    expected = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(IDS[:, :17], use_cache=True).past_key_values
        found = model(IDS[:, 17:], past_key_values=cache).logits
    if not fields:  # what is chosen is a step function of what was rounded
        assert (found - expected[:, 17:]).abs().max() < 0.05 * expected.abs().max()
    assert found.isfinite().all()


def test_of_blocks_that_score_the_same_the_first_are_read():
    scores = torch.tensor([2.0, 3.0, 2.0, 2.0, 9.0, 0.0, 0.0]).view(1, 1, 1, 1, 7)
    block = torch.tensor([[4]])  # blocks 0 to 3 come before
    assert choose(scores, block, 2, has_ties=True).flatten().tolist() == [1, 0]
    assert choose(scores, block, 1, has_ties=False).flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_length": 0}, "block_length is at least 1, got 0"),
        ({"retrieved_blocks": 0}, "retrieved_blocks is at least 1, got 0; None reads all"),
        ({"landmark_token_id": 31}, "landmark_token_id is below vocab_size 31, got 31"),
        ({"landmark_token_id": 3, "pad_token_id": 3}, "got that of pad_token_id, 3"),
        ({"norm_bias": True}, "norm_bias is of norm_type 'layer'"),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 64,
            },
            "do not depend on a text's length, got rope_type 'dynamic'",
        ),
    ],
)
def test_configs_that_cannot_be(fields, words):
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        LandmarkConfig(**SIZES | fields)


@torch.no_grad()
def test_position_ids_say_where_documents_begin_alone():
    model, ids = build(), IDS[:1, :20]
    expected = model(ids).logits
    found = model(ids, position_ids=7 * torch.arange(20)[None]).logits
    assert torch.equal(found, expected)
    restarting = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = model(ids, position_ids=restarting).logits
    torch.testing.assert_close(packed[:, 12:], model(ids[:, 12:]).logits)
