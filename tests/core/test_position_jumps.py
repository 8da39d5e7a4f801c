"""Positions that jump forward are no boundary of a document; those that do not grow are one."""

import pytest
import torch

import zoo

JUMPING = [0, 1, 2, 40, 41, 42, 43, 44, 90, 91, 92, 93]
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_with(window, implementation):
    torch.manual_seed(0)
    config = zoo.SlidingWindowConfig(**SIZES, sliding_window=window)
    config._attn_implementation = implementation
    return zoo.SlidingWindowForCausalLM(config).double().eval()


@pytest.mark.parametrize("implementation", ["banded", "eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_jump_is_in_the_document(window, implementation):
    """With and without a cache, with a mask of ones and without, whole and in pieces."""
    model = model_with(window, implementation)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([JUMPING, list(range(12))])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        for mask in (None, torch.ones_like(ids)):
            for use_cache in (False, True):
                arguments = {"attention_mask": mask, "use_cache": use_cache}
                found = model(ids, position_ids=positions, **arguments).logits
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        # The first piece ends in front of a jump.
        cache, logits = None, []
        for piece in (range(3), range(3, 9), *([n] for n in range(9, 12))):
            piece = list(piece)
            output = model(ids[:, piece], position_ids=positions[:, piece], past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-10, atol=1e-10)
        # A token in front of the jump is seen behind it, by every implementation alike.
        changed = ids.clone()
        changed[:, 2] = (changed[:, 2] + 1) % 50
        moved = model(changed, position_ids=positions, use_cache=False).logits - expected
        assert (moved[:, 3:7].abs().amax(-1) > 1e-6).all()
        # And the jump is in the rotation: elsewhere it would be another text.
        plain = model(ids, use_cache=False).logits
        assert (plain[0] - expected[0])[3:].abs().amax() > 1e-6
        torch.testing.assert_close(plain[1], expected[1], rtol=1e-10, atol=1e-10)
        # A position that does not grow begins a document, whatever jumps it has.
        two = torch.tensor([[0, 1, 9, 10, 11, 0, 1, 2, 50, 51, 52, 53]])
        both = model(ids[:1], position_ids=two, use_cache=False).logits
        second = model(ids[:1, 5:], position_ids=two[:, 5:], use_cache=False).logits
        torch.testing.assert_close(both[:, 5:], second, rtol=1e-10, atol=1e-10)


def test_segments_that_are_replayed_keep_the_jumps():
    model = model_with(None, "banded").train()
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(2))
    gradients = []
    for segment in (None, 3):
        model.zero_grad()
        model.base_model.replay_segment_length = segment
        positions = torch.tensor([JUMPING])
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
