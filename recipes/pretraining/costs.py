"""What a run costs: operations per token, memory, and the share of a device's peak that is used."""

import contextlib
import re
import sys

import torch
from torch import nn

from zoo.core.flops import BACKWARD, product_flops

# Names of devices -> operations per second in bf16, dense, by NVIDIA's data sheets.
PEAKS = {
    r"NVIDIA A100[- ](SXM4|SXM|PCIE)[- ]\d+GB": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
}


def training_flops(model, length):
    """Operations per token of a training step: of the definition, forward and backward.

    Matrices that are not trained get no gradient, but pass one on.
    """
    with _in_use(model):
        frozen = [
            module.weight
            for module in model.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        ]
        return (1 + BACKWARD) * model.flops_per_token(length) - product_flops(*frozen)


def forward_flops(model, length):
    """Operations per token of a forward pass, of the definition."""
    with _in_use(model):
        return model.flops_per_token(length)


@contextlib.contextmanager
def _in_use(model):
    """A model without the modules that peft keeps beside those that it trains whole."""
    kept = {}
    for module in model.modules():
        if "original_module" in module._modules and "modules_to_save" in module._modules:
            kept[module] = dict(module._modules)
    try:
        for module in kept:
            del module._modules["original_module"]
        yield
    finally:
        for module, modules in kept.items():
            module._modules.clear()  # the order is that of the optimizer
            module._modules.update(modules)


def peak_flops(recipe, device, precision):
    """Operations per second a device can do at most, or None where nobody said it.

    Args:
        recipe: its `peak_flops` comes first.
        device: that is trained on.
        precision: "bf16" or "fp32"; the table is of bf16.
    """
    if recipe.peak_flops:
        return recipe.peak_flops
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


def peak_memory(device):
    """The most memory this process had so far, in bytes, and what that is a measure of."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the device (CUDA)"
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return unit * peak, "resident memory of the process"


def describe(recipe, model):
    """Lines about a model and its training, before there is memory for either.

    Args:
        recipe: of the run.
        model: the language model, on meta.
    """
    parameters = {id(p): p for p in model.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    count = sum(p.numel() for p in parameters.values())
    others = sum(p.numel() for p in parameters.values() if id(p) not in embeddings)
    size = sum(p.nbytes for p in parameters.values())
    trained = [p for p in parameters.values() if p.requires_grad]
    number, moving = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    length = recipe.sequence_length
    tokens = recipe.steps * recipe.batch_size * length
    forward, training = forward_flops(model, length), training_flops(model, length)
    parts = {"parameters": size, "gradients": moving, "optimizer": 2 * moving}
    if recipe.ema_decay:
        parts["average"] = size
    listed = ", ".join(f"{name} {in_units(part, 'B')}" for name, part in parts.items())
    total = in_units(sum(parts.values()), "B")
    return [
        f"{count:,} parameters, {others:,} without embeddings"
        + (f", {number:,} trained" if number < count else ""),
        f"{tokens:,} tokens ({tokens / count:.1f} per parameter)",
        f"{in_units(forward, 'FLOPs')} per token forward, {in_units(training, 'FLOPs')} in "
        f"training; {in_units(training * tokens, 'FLOPs')} in all",
        f"{model.state_size(length):,} bytes of state per sequence, after {length:,} tokens",
        f"{total} per process, shared out by FSDP and ZeRO: {listed}; activations come on top",
    ]


def in_units(value, unit):
    """A number with a prefix: 1.23 MB."""
    prefixes = ["", *"kMGTPE"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    return f"{value:.3g} {prefixes[0]}{unit}"
