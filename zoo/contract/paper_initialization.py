"""What the papers' code initialises: parameter pattern -> (mean, standard deviation, distribution).

Patterns are fnmatch's; a distribution is "normal", "uniform" or "constant".

Written from the papers and their code, not from ours.
"""


def xavier_uniform(fan_in, fan_out, gain):
    """Glorot and Bengio 2010: variance gain^2 2 / (fan_in + fan_out)."""
    return 0.0, gain * (2 / (fan_in + fan_out)) ** 0.5, "uniform"


def linear_default(fan_in):
    """PyTorch's nn.Linear: uniform between plus and minus fan_in^-1/2."""
    return 0.0, (3 * fan_in) ** -0.5, "uniform"


def divided(statistics, divisor):
    """The statistics of the same weights divided by a number."""
    mean, std, distribution = statistics
    return mean / divisor, std / divisor, distribution


def retnet(config):
    """torchscale's RetNetDecoder, and its init_scale for deepnorm."""
    width, mlp_width = config.hidden_size, config.intermediate_size
    key_width, value_width = config.key_size, config.value_size
    deepnorm = (8 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0
    # The gated MLP's fc1 is our gate_proj, the branch with the activation.
    activated, linear = ("gate", "up") if config.gated_mlp else ("up", None)
    table = {
        "model.embed_tokens.weight": (0.0, width**-0.5, "normal"),
        "lm_head.weight": (0.0, width**-0.5, "normal"),
        "*.mixer.[qk]_proj.weight": xavier_uniform(width, key_width, 2**-2.5),
        "*.mixer.v_proj.weight": divided(xavier_uniform(width, value_width, 2**-2.5), deepnorm),
        "*.mixer.gate_proj.weight": xavier_uniform(width, value_width, 2**-2.5),
        "*.mixer.out_proj.weight": divided(xavier_uniform(value_width, width, 2**-1), deepnorm),
        f"*.mlp.{activated}_proj.weight": divided(linear_default(width), deepnorm),
        "*.mlp.down_proj.weight": divided(linear_default(mlp_width), deepnorm),
        "*norm.weight": (1.0, 0.0, "constant"),
    }
    if linear is not None:
        table[f"*.mlp.{linear}_proj.weight"] = linear_default(width)
    else:
        table["*.mlp.up_proj.bias"] = linear_default(width)
        table["*.mlp.down_proj.bias"] = linear_default(mlp_width)
        table["*.inner_norm.bias"] = (0.0, 0.0, "constant")
    return table


TABLES = {"retnet": retnet}  # by the name in zoo.MODELS; each takes the config
