"""Which softmax attention a layer has: the one place that chooses it, for all architectures."""

from .softmax_attention import SoftmaxAttention


def softmax_mixer(config, layer_idx, **options):
    """The mixer of a layer.

    Args:
        config, layer_idx, options: as of `SoftmaxAttention`.
    """
    return SoftmaxAttention(config, layer_idx, **options)
