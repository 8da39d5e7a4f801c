"""Models on the Triton kernels, in the interpreter, against the same models on the PyTorch path."""

import sys

import pytest
import torch

import zoo
from zoo.kernels.launch_triton import recording

# Attention to windows and segments, and matrix products: nothing of it is a kernel of ours.
WITHOUT_KERNELS = ("sliding_window", "infini", "block_recurrent", "long_llama", "rmt", "landmark")
WITHOUT_KERNELS += ("transformer_xl",)
NAMES = [name for name in zoo.MODELS if name not in WITHOUT_KERNELS]
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Lengths of the documents in a row: of one token, and the row beyond a chunk of 64 tokens. The
# kernels of RWKV-4 walk token by token, in tiles of 32, the delta rule's have chunks of 16: a
# document beyond one, and for these beyond two.
DOCUMENTS = dict.fromkeys(("rwkv4", "rwkv7", "gated_deltanet"), (1, 33, 6))


@pytest.fixture
def on_triton(monkeypatch):
    """Turns backend="auto" into what it is on a GPU."""

    def switch():
        for name, module in list(sys.modules.items()):
            if name.startswith("zoo.kernels.") and hasattr(module, "choose_backend"):
                monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")

    return switch


def ways_to_run(model, documents):
    """Logits, states and gradients of a whole, padded, packed and continued sequence."""
    generator, length = torch.Generator().manual_seed(0), sum(documents)
    ids = torch.randint(0, 40, (2, length), generator=generator)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :30] = 0
    mask[1, 20:33] = 0
    restarts = torch.cat([torch.arange(n) for n in documents]).repeat(2, 1)
    model.zero_grad()
    loss = model(ids, labels=ids).loss + model(ids, labels=ids, attention_mask=mask).loss
    loss.backward()
    with torch.no_grad():
        yield model(ids).logits
        yield model(ids, attention_mask=mask).logits[mask.bool()]
        yield model(ids, position_ids=restarts).logits
        cache = model(ids[:, :-5], use_cache=True).past_key_values
        for column in range(length - 5, length):
            yield model(ids[:, column : column + 1], past_key_values=cache).logits
        yield from (x for layer in cache.layers for x in layer.tensors.values())
    yield from (p.grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_pytorch_path(name, on_triton):
    torch.manual_seed(0)
    classes = zoo.MODELS[name]
    model = classes.causal_lm(classes.config(**SIZES)).eval()
    documents = DOCUMENTS.get(name, (1, 40, 29))
    expected = list(ways_to_run(model, documents))
    on_triton()
    with recording() as launches:
        got = list(ways_to_run(model, documents))
    assert launches, "the model does not use the kernels"
    for a, b in zip(got, expected, strict=True):
        # Two float32 orders of summation, through two layers and a loss.
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
