"""Segment replay beyond the contract: dropout, autocast, states of single tokens, its errors."""

import pytest
import torch
from transformers import DynamicCache

from zoo import MODELS, RetNetConfig, RetNetForCausalLM
from zoo.contract.compare import gradients, relative_gradients
from zoo.contract.subject import zoo_subject
from zoo.core.sequence import restarting_positions

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def in_pieces(model, ids, sizes):
    """The hidden states through the cache, with the graph of everything."""
    cache, outputs = None, []
    for piece in ids.split(sizes, dim=1):
        output = model.model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outputs.append(output.last_hidden_state)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_backward_repeats_what_forward_did(autocast):
    """Dropout draws the same numbers, and autocast rounds alike."""
    torch.manual_seed(0)
    model = RetNetForCausalLM(RetNetConfig(**SIZES, dropout=0.3)).train()
    ids = torch.randint(0, 61, (2, 50))
    results = []
    for replays in (False, True):
        torch.manual_seed(1)
        model.model.replay_segment_length = 16 if replays else None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if replays:
                hidden = model.model(ids, use_cache=False).last_hidden_state
            else:
                hidden = in_pieces(model, ids, [16, 16, 16, 2])
        generator_after = torch.get_rng_state()
        results.append((hidden, gradients(model.model, hidden.float().square().sum())))
        assert torch.equal(torch.get_rng_state(), generator_after)
    (hidden, expected), (replayed, found) = results
    assert torch.equal(hidden, replayed)
    # Under autocast the pieces' gradients of a weight are summed in bfloat16, replayed in float32.
    assert relative_gradients(found, expected) < (2**-8 if autocast else 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_segments_of_a_token(name):
    """A state that decoding writes into is still there when backward needs it."""
    subject = zoo_subject(name)
    model, ids = subject.model().train(), subject.ids(2, 21)
    results = []
    for length in (None, 1, 4):  # the last: pieces of 4, 4, 4, 4, 4, 1
        model.model.replay_segment_length = length
        hidden = model.model(ids, use_cache=True).last_hidden_state
        results.append(gradients(model.model, hidden.square().sum()))
    assert max(relative_gradients(found, results[0]) for found in results[1:]) < 1e-9


def test_no_replay_where_nothing_is_trained():
    """Neither in eval mode nor without gradients, and not of what is short enough."""
    model = zoo_subject("retnet").model()
    model.model.replay_segment_length = 8
    for train, length, expected in ((True, 9, True), (True, 8, False), (False, 9, False)):
        hidden = model.train(train).model(torch.ones(1, length, dtype=torch.long))
        name = type(hidden.last_hidden_state.grad_fn).__name__
        assert (name == "_ReplayBackward") == expected
    with torch.no_grad():
        assert model.train().model(torch.ones(1, 9, dtype=torch.long)).last_hidden_state is not None


def test_refused():
    model = zoo_subject("retnet").model().train()
    model.model.replay_segment_length = 8
    ids = torch.ones(1, 20, dtype=torch.long)
    with pytest.raises(ValueError, match="keeps no hidden states"):
        model(ids, output_hidden_states=True)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="keeps no record of the past"):
        model(ids, past_key_values=cache)
    loss = model(ids).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    with pytest.raises(ValueError, match="do not restart at 0"):
        model(ids, position_ids=torch.arange(20)[None], cu_seq_lens_q=torch.tensor([0, 5, 20]))


def test_restarting_positions():
    bounds = torch.tensor([0, 3, 4, 8])
    found = restarting_positions((1, 8), None, None, bounds, None, None)
    assert found.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    # The first document goes on from a state of 5 tokens.
    found = restarting_positions((1, 8), None, None, bounds, None, torch.tensor([5]))
    assert found.tolist() == [[5, 6, 7, 0, 0, 1, 2, 3]]
    # Padding is not counted, and a boundary on padding belongs to the next token.
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]] * 2)
    found = restarting_positions((2, 8), mask, None, None, documents, None)
    visible = mask.bool()
    assert found[0][visible[0]].tolist() == [0, 1, 0, 1, 0]
    assert found[1][visible[1]].tolist() == [0, 1, 0, 1, 0]
