"""What the Block-Recurrent Transformer's authors (meliad) put around its attention.

Hutchins et al. 2022, https://arxiv.org/abs/2203.07852: the MLP, the last norm, and which fields of
a config go together.
"""

import math

from torch import nn

from .recurrent_cell import CONFIGURATIONS, GATES, truncated_

# Field -> (the position_embedding_type it is about, its default).
BIAS_FIELDS = {
    "num_buckets": ("t5", 32),
    "max_distance": ("t5", 128),
    "alibi_bias_max": ("alibi", 8),
}


def check_biases(config):
    """Raises a ValueError where fields of the biases make none, or are of the other kind."""
    if config.num_buckets < 2 or config.max_distance <= config.num_buckets // 2:
        raise ValueError(
            "num_buckets is at least 2 and max_distance above half of it, got "
            f"{config.num_buckets} and {config.max_distance}."
        )
    if not 0 < config.alibi_bias_max < math.inf:
        raise ValueError(f"alibi_bias_max is a number above 0, got {config.alibi_bias_max}.")
    for name, (kind, default) in BIAS_FIELDS.items():
        value = getattr(config, name)
        if kind != config.position_embedding_type and value != default:
            raise ValueError(
                f"{name} is about position_embedding_type {kind!r}, got {value} and "
                f"{config.position_embedding_type!r}; leave it out."
            )


def check_states(config):
    """Raises a ValueError where there are states and no layers for them, or the other way round."""
    if config.num_states < 0:
        raise ValueError(f"num_states is at least 0, got {config.num_states}.")
    layers = config.recurrent_layers
    if any(not 0 <= i < config.num_hidden_layers for i in layers) or len({*layers}) < len(layers):
        raise ValueError(
            f"recurrent_layers are different layers of {config.num_hidden_layers}, got {layers}."
        )
    if bool(config.num_states) != bool(layers):
        raise ValueError(
            "there are recurrent_layers where num_states is above 0, and none without states, "
            f"got {layers} and num_states = {config.num_states}; leave recurrent_layers out to "
            "have it filled in."
        )
    if config.feedback and not layers:
        raise ValueError("feedback needs a recurrent layer, got num_states = 0.")
    for name, known in (("gate", GATES), ("configuration", CONFIGURATIONS)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(config, name)!r}.")


def check_memory(config):
    """Raises a ValueError where a config's fields of the memory fit no model."""
    layers, defaults = config.memory_layers, type(config)
    if any(not 0 <= i < config.num_hidden_layers for i in layers) or len({*layers}) < len(layers):
        raise ValueError(
            f"memory_layers are different layers of {config.num_hidden_layers}, got {layers}."
        )
    if both := sorted({*layers} & {*config.recurrent_layers}):
        raise ValueError(
            f"a layer has states or a memory, got {both} in recurrent_layers and memory_layers; "
            "take another layer for one of them."
        )
    for name in ("memory_size", "memory_neighbors", "memory_segment_length"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}.")
    for name in ("memory_size", "memory_neighbors", "memory_segment_length", "memory_selection"):
        value = getattr(config, name)
        if not layers and value != getattr(defaults, name):
            raise ValueError(
                f"{name} is about memory_layers, got {value} without any; leave it out."
            )
    size, neighbors = config.memory_size, config.memory_neighbors
    if neighbors > size or config.memory_selection == "columns" and size % neighbors:
        what = "a multiple of" if config.memory_selection == "columns" else "at least"
        raise ValueError(f"memory_size is {what} memory_neighbors, got {size} and {neighbors}.")


class FeedForward(nn.Module):
    """down(relu(up x))."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def init_weights_of_paper(self):
        """The authors' matrices."""
        for proj in (self.up_proj, self.down_proj):
            truncated_(proj.weight, proj.in_features)

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return self.down_proj(self.up_proj(x_BTD).relu())


class FinalNorm(nn.RMSNorm):
    """RMSNorm by whose output, divided by sqrt(D), logits are of order one."""

    def forward(self, x_BTD):
        """[B, T, D] to the same."""
        return super().forward(x_BTD) * x_BTD.shape[-1] ** -0.5
