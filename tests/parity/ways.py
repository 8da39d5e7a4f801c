"""Ways to run a model on a golden, and how far what comes out is from the official numbers."""

import torch
from torch.nn.functional import cross_entropy

WAYS = ("whole", "chunks", "token by token", "left padding")


@torch.no_grad()
def run(model, ids, way):
    """Logits [B, T, vocab] and the cache after the last token."""
    if way == "left padding":
        padded = torch.nn.functional.pad(ids, (5, 0), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
        output = model(padded, attention_mask=mask, use_cache=True)
        return output.logits[:, 5:], output.past_key_values
    sizes = {"whole": [ids.shape[1]], "chunks": [1, 7, 37, 3, ids.shape[1] - 48]}
    cache, logits = None, []
    for chunk in ids.split(sizes.get(way, 1), dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def worst(ours, official, relative=False):
    """Largest difference; relative: to the largest official value."""
    difference = (ours.double() - official.double()).abs().max()
    return (difference / official.abs().max() if relative else difference).item()


def gradients(model, ids):
    """By name. transformers' loss is in float32 at best; this one stays in the model's dtype."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
