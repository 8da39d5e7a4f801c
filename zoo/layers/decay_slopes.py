"""How fast the heads of lightning attention forget: the slope s of each head in each layer.

For head h of H and layer l of L, both counted from 0, by `LightningConfig.decay_schedule`:

    "transnormer"   ALiBi's slopes, 2^(-8 (h + 1) / H) where H is a power of two and between those
                    of the nearest powers elsewhere, times 1 - l / (L - 1) + 1e-5. The released
                    TransNormerLLMs.
    "minimax"       2^(-8 (h + 1) / H), whatever H, times 1 - l / (L - 1 + 1e-5) + 1e-5.
                    MiniMax-Text-01 and M1.
    "paper"         (8 h / H) (1 - l / L), which leaves head 0 without a decay. What the
                    TransNormerLLM paper prints, and fla's `lightning_attn`.
"""

import math

import torch


def alibi_slopes(num_heads, bias_max=8):
    """2^(-8 (h + 1) / H) for H a power of two; else the power below, then every second above it.

    Args:
        num_heads: H.
        bias_max: another number in place of the 8.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-bias_max * (h + 1) / power) for h in range(power)]
    between = [2 ** (-bias_max * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]


def log_decay(config, layer_idx):
    """-slope of each head of a layer, [H] in float64."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.slopes is not None:
        slopes = config.slopes[layer_idx]
    elif config.decay_schedule == "paper":
        slopes = [8 * h / heads * (1 - layer_idx / layers) for h in range(heads)]
    elif config.decay_schedule == "minimax":
        depth = layer_idx / (layers - 1 + 1e-5)
        slopes = [2 ** (-8 * (h + 1) / heads) * (1 - depth + 1e-5) for h in range(heads)]
    else:
        depth = layer_idx / max(layers - 1, 1)  # theirs divides by 0 where there is one layer
        slopes = [slope * (1 - depth + 1e-5) for slope in alibi_slopes(heads)]
    return -torch.tensor(slopes, dtype=torch.float64)


def check_slopes(config):
    """Raises a ValueError if a config's slopes are not one number >= 0 per head and layer."""
    if config.slopes is None:
        return
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    sizes = [len(row) for row in config.slopes]
    if sizes != [heads] * layers or min(map(min, config.slopes)) < 0:
        raise ValueError(
            f"slopes are {heads} numbers >= 0 for each of {layers} layers, got lists of "
            f"{sizes} with a minimum of {min(map(min, config.slopes), default=None)}."
        )
