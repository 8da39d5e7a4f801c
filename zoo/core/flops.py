"""Floating-point operations of a forward pass, as the definition of a model needs them.

A product of [m, k] and [k, n] counts 2 m n k, attention 2 K + 2 V per head and visible key, a state
[K, V] of a recurrence 2 K V to be written and 2 K V to be read. What is done for each number alone
(norms, activations, decays, softmax) does not count, nor what a way of running adds to the
definition: chunks, masked scores, activations computed again. Backward takes twice as many.
"""

from torch import nn

BACKWARD = 2  # times forward


def linear_flops(*modules):
    """Of the linear layers in modules, per vector that goes through each."""
    weights = {
        id(linear): linear.weight
        for module in modules
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    }
    return product_flops(*weights.values())


def product_flops(*weights):
    """Of a vector with each of some matrices."""
    return sum(2 * weight.numel() for weight in weights)


def mean_visible(length, window=None, num_sinks=0):
    """Keys a token sees on average, in a text of so many tokens.

    Args:
        length: T; token p sees p + 1 at most.
        window: W, the last so many, its own included; None: all.
        num_sinks: first tokens that stay visible.
    """
    width = min(window or length, length)
    seen = width * (width + 1) // 2 + (length - width) * width
    beyond = length - width  # tokens before which 1, 2, ... have left the window
    some = min(beyond, num_sinks)
    seen += some * (some + 1) // 2 + (beyond - some) * num_sinks
    return seen / length


def mean_of_segments(length, segment, count):
    """The mean per token of what a segment of so many tokens takes, over a text cut into segments.

    Args:
        length: T.
        segment: tokens of each but the last.
        count: (tokens of a segment) -> what all of them together take.
    """
    whole, rest = divmod(length, segment)
    return (whole * count(segment) + (count(rest) if rest else 0)) / length
