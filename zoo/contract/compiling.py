"""Of point 8: what torch.compile makes of a model, in one graph."""

import torch
from torch import nn

from .compare import BOUNDS, gradients, loss_of, relative, relative_gradients
from .subject import cache_tensors

BOUND = BOUNDS[torch.float64]
# The backward pass is traced too. What of the forward pass is kept for it, and what computed again,
# is torch's own affair: the partition that does not search for the best takes a tenth less time.
WITH_BACKWARD = "aot_eager_default_partitioner"


def compiled(subject, checks, model, ids):
    """Checks a prefill, decoding steps and a training step against the same without a graph.

    Tracing takes as long as the graph has operations, whatever their size, and most of it where a
    backward pass is traced too. The whole depth is in the graph of the decoding step, which has the
    fewest; in the others is one layer of each kind.

    Args:
        subject, checks: as of every point.
        model: one of `subject.model()`.
        ids: [2, T].
    """

    def in_one_graph(function, backend="eager"):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend)

    def prefill(ids):
        return subject.forward(model, ids, use_cache=True)

    def step(ids, cache, mask):
        return subject.forward(model, ids, cache, mask)

    with torch.no_grad():
        with checks.case("a decoding step"):
            caches = [subject.run(model, ids)[1] for _ in range(2)]
            graph, mask = in_one_graph(step), ids.new_ones(2, ids.shape[1] + 1)
            for name in ("first", "second"):
                expected = step(ids[:, :1], caches[0], mask).logits
                # As the second step would have it: the first need not be traced for its lengths.
                torch._dynamo.maybe_mark_dynamic(mask, 1)
                _mark_what_grows(*caches)
                found = graph(ids[:, :1], caches[1], mask).logits
                checks.below(f"{name}: logits", relative(found, expected), BOUND)
                mask = nn.functional.pad(mask, (0, 1), value=1)
        if subject.is_ours:
            leave_one_layer_of_each_kind(model.base_model)
        with checks.case("prefill"):
            expected, found = prefill(ids), in_one_graph(prefill)(ids)
            checks.below("logits", relative(found.logits, expected.logits), BOUND)
    with checks.case("training"):
        expected, found = (
            gradients(model, loss_of(run(ids).logits))
            for run in (
                lambda ids: subject.forward(model, ids),
                in_one_graph(lambda ids: subject.forward(model, ids), WITH_BACKWARD),
            )
        )
        checks.below("gradients", relative_gradients(found, expected), BOUND)
    torch._dynamo.reset()


def _mark_what_grows(longer, shorter):
    """Marks the axes of a cache's tensors that are longer in one that is further on."""
    further = cache_tensors(longer)
    for path, tensor in cache_tensors(shorter).items():
        for axis, size in enumerate(tensor.shape):
            if path in further and further[path].shape[axis] != size:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)


def leave_one_layer_of_each_kind(decoder):
    """Takes the last layers away from a decoder of ours, as long as those before are like them.

    Args:
        decoder: a `ZooModel`, which loses them.
    """
    kinds = [kind_of(layer) for layer in decoder.layers]
    while kinds[-1] in kinds[:-1]:
        kinds.pop()
    decoder.layers = decoder.layers[: len(kinds)]


def kind_of(layer):
    """What decides which operations a layer runs: its modules, and what they are made with.

    Numbers that are no counts, such as a decay, and the layer's place decide nothing.
    """
    described = []
    for path, module in layer.named_modules():
        fields = vars(module).items()
        described.append(
            (
                path,
                type(module),
                {k: x for k, x in fields if k != "layer_idx" and _is_plain(x)},
                {k: x.shape for k, x in module.named_parameters(recurse=False)},
                {k: x.shape for k, x in module.named_buffers(recurse=False)},
            )
        )
    return described


def _is_plain(value):
    return isinstance(value, (bool, int, str, type, type(None)))
