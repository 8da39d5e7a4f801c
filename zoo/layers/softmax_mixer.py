"""Which softmax attention a layer has: the one place that chooses it, for all architectures."""

from .extended_softmax import ExtendedAttention
from .position_fields import position_type_of
from .softmax_attention import SoftmaxAttention


def softmax_mixer(config, layer_idx, **options):
    """The mixer of a layer.

    Args:
        config, layer_idx, options: as of `SoftmaxAttention`.
    """
    has_extension = getattr(config, "rope_extension", None) is not None
    if has_extension and position_type_of(config, layer_idx) == "rope":
        return ExtendedAttention(config, layer_idx, **options)
    return SoftmaxAttention(config, layer_idx, **options)
