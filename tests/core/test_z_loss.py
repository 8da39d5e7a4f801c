"""z-loss: its definition, in chunks and at once, with gradients of autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import zoo
from zoo.core import base

CONFIG = zoo.RetNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def step(z_loss, chunk, **options):
    torch.manual_seed(0)
    model = zoo.RetNetForCausalLM(CONFIG).double().train()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.z_loss, model.loss_chunk_size = z_loss, chunk
    ids = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels, **options)
    return model, ids, labels, output


def defined(model, ids, labels, z_loss):
    """Cross entropy and the mean of log^2 Z, from all logits."""
    model.loss_chunk_size, model.z_loss = None, 0.0
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    log_z = torch.log(torch.exp(logits).sum(-1))[targets != -100]
    return cross_entropy(logits, targets), z_loss * (log_z**2).mean()


@pytest.mark.parametrize("chunk", [None, 4, 100])
def test_loss_and_gradient_are_the_definitions(chunk):
    model, ids, labels, output = step(0.1, chunk)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    nats, penalty = defined(model, ids, labels, 0.1)
    (nats + penalty).backward()
    # The losses are summed in float32, as without z-loss.
    assert penalty > 0.1
    assert output.z_loss.item() == pytest.approx(penalty.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx((nats + penalty).item(), rel=1e-6)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-6 * p.grad.norm(), name
    assert (output.logits is None) == (chunk is not None)


@pytest.mark.parametrize("chunk", [None, 4])
def test_parts_of_a_batch_add_up(chunk):
    """As for the loss itself: divided by what all parts score together."""
    whole = step(0.1, chunk)[3]
    halves = step(0.1, chunk, num_items_in_batch=2 * 14)[3]
    assert 2 * halves.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert 2 * halves.z_loss.item() == pytest.approx(whole.z_loss.item(), rel=1e-6)


def test_of_a_fused_kernel(monkeypatch):
    """Liger's loss has it in it, and says how much it is."""

    def fused(head, hidden_TD, z_loss):
        def sums(weight, hidden_TD, target_T, bias):
            nats, square = base.cross_entropy_and_square(hidden_TD @ weight.T, target_T)
            return SimpleNamespace(loss=nats + z_loss * square, z_loss=z_loss * square)

        return sums

    expected = step(0.1, 4)[3]
    monkeypatch.setattr(base, "_fused_linear_cross_entropy", fused)
    output = step(0.1, 4)[3]
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert output.z_loss.item() == pytest.approx(expected.z_loss.item(), rel=1e-6)
    assert not output.z_loss.requires_grad


def test_only_training_has_it():
    model, ids, labels, _ = step(0.1, 4)
    measured = model.eval()(ids, labels=labels)
    assert "z_loss" not in measured
    assert measured.loss.item() == pytest.approx(defined(model, ids, labels, 0)[0].item(), rel=1e-6)
