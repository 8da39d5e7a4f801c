"""What the papers' code initialises: parameter pattern -> what its values are.

Patterns are fnmatch's. Values are a tuple (mean, standard deviation, distribution), with the
distribution "normal", "truncated" (a normal one cut off at two of its deviations), "uniform" or
"constant"; a list of numbers, one by one; `Orthogonal`; or `Of`, of what a function makes of them.

Written from the papers and their code, not from ours.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F

from zoo.layers.position_fields import position_types


class Orthogonal(NamedTuple):
    """A matrix whose rows or columns, whichever are fewer, are orthogonal and of length `gain`."""

    gain: float


class Of(NamedTuple):
    """Values of which `function` has the statistics."""

    function: Callable
    statistics: tuple[float, float, str]


ZERO = (0.0, 0.0, "constant")
ONE = (1.0, 0.0, "constant")


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
        "*norm.weight": ONE,
    }
    if linear is not None:
        table[f"*.mlp.{linear}_proj.weight"] = linear_default(width)
    else:
        table["*.mlp.up_proj.bias"] = linear_default(width)
        table["*.mlp.down_proj.bias"] = linear_default(mlp_width)
        table["*.inner_norm.bias"] = ZERO
    return table


def uniform(bound):
    """Uniform between -bound and bound."""
    return 0.0, bound / 3**0.5, "uniform"


def powers(width, exponent, offset=0.0):
    """(i / width)^exponent + offset for each channel i."""
    return [(i / width) ** exponent + offset for i in range(width)]


def complements(values):
    """1 - x of each: how much of the previous token, where the others say of the current one."""
    return [1 - x for x in values]


def rwkv_common(config):
    """Embeddings, head and LayerNorms of all trainers; (depth 0 to 1, the rest 1 to 1/L) by layer.

    A layer's schedules divide by L - 1: the trainers cannot build a model of one layer.
    """
    width, vocab, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    table = {
        "model.embed_tokens.weight": uniform(1e-4),
        "lm_head.weight": Orthogonal(0.5 * max(1, vocab / width) ** 0.5),
        "*.mixer_norm.weight": ONE,
        "*.mixer_norm.bias": ZERO,
        "*.mlp_norm.weight": ONE,
        "*.mlp_norm.bias": ZERO,
        "model.norm.weight": ONE,
        "model.norm.bias": ZERO,
        "*.mlp.v_proj.weight": ZERO,
        "*.mixer.out_proj.weight": ZERO,
    }
    if config.embedding_norm:
        table |= {"model.embed_norm.weight": ONE, "model.embed_norm.bias": ZERO}
    return table, [(i / (layers - 1), 1 - i / layers) for i in range(layers)]


def rwkv4(config):
    """RWKV-v4neo's trainer, with the embeddings of the paper's section 4 ("small init")."""
    width, size = config.hidden_size, config.attention_hidden_size
    table, layers = rwkv_common(config)
    for index, (depth, rest) in enumerate(layers):
        mixer, mlp = f"model.layers.{index}.mixer", f"model.layers.{index}.mlp"
        table |= {
            f"{mixer}.mix_k": powers(width, rest),
            f"{mixer}.mix_v": powers(width, rest, 0.3 * depth),
            f"{mixer}.mix_r": powers(width, 0.5 * rest),
            f"{mixer}.time_decay": [
                -5 + 8 * (i / (size - 1)) ** (0.7 + 1.3 * depth) for i in range(size)
            ],
            f"{mixer}.time_first": [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(size)],
            f"{mlp}.mix_k": powers(width, rest),
            f"{mlp}.mix_r": powers(width, rest),
        }
    return table | {
        "*.mixer.k_proj.weight": ZERO,
        "*.mixer.r_proj.weight": ZERO,
        "*.mixer.v_proj.weight": Orthogonal(max(1, size / width) ** 0.5),
        "*.mlp.k_proj.weight": Orthogonal(max(1, config.intermediate_size / width) ** 0.5),
        "*.mlp.r_proj.weight": ZERO,
    }


def rwkv_matrices(config):
    """The matrices and the head norms of RWKV-v5's trainer, which serves 5, 6 and 7."""
    table, layers = rwkv_common(config)
    for index in range(len(layers)):
        loudness = ((1 + index) / len(layers)) ** 0.7
        table[f"model.layers.{index}.mixer.head_norm.weight"] = (loudness, 0.0, "constant")
    table |= {
        "*.mixer.head_norm.bias": ZERO,
        "*.mixer.r_proj.weight": Orthogonal(1.0),
        "*.mixer.k_proj.weight": Orthogonal(0.1),
        "*.mixer.v_proj.weight": Orthogonal(1.0),
        "*.mlp.k_proj.weight": Orthogonal(1.0),
    }
    return table, layers


def decay_and_bonus(size, depth):
    """The schedules of RWKV-5 and 6 over the channels of the keys."""
    steps = [i / (size - 1) for i in range(size)]
    decay = [-6 + 5 * step ** (0.7 + 1.3 * depth) for step in steps]
    bonus = [depth * (1 - step) + 0.1 * ((i + 1) % 3 - 1) for i, step in enumerate(steps)]
    return decay, bonus


def rwkv5(config):
    """RWKV-v5's trainer, x052."""
    width = config.hidden_size
    table, layers = rwkv_matrices(config)
    for index, (depth, rest) in enumerate(layers):
        mixer, mlp = f"model.layers.{index}.mixer", f"model.layers.{index}.mlp"
        decay, bonus = decay_and_bonus(config.key_size, depth)
        table |= {
            f"{mixer}.mix_k": powers(width, rest),
            f"{mixer}.mix_v": powers(width, rest, 0.3 * depth),
            f"{mixer}.mix_r": powers(width, 0.5 * rest),
            f"{mixer}.time_decay": decay,
            f"{mixer}.bonus": bonus,
            f"{mlp}.mix_k": powers(width, rest),
            f"{mlp}.mix_r": powers(width, rest),
        }
        if config.gated:
            table[f"{mixer}.mix_g"] = powers(width, 0.5 * rest)
    if config.gated:
        table["*.mixer.gate_proj.weight"] = Orthogonal(0.1)
    return table | {"*.mlp.r_proj.weight": ZERO}


def rwkv6(config):
    """RWKV-v5's trainer, x060."""
    width = config.hidden_size
    table, layers = rwkv_matrices(config)
    for index, (depth, rest) in enumerate(layers):
        mixer, mlp = f"model.layers.{index}.mixer", f"model.layers.{index}.mlp"
        decay, bonus = decay_and_bonus(config.key_size, depth)
        current = powers(width, rest)
        w, k, v = current, current, powers(width, rest, 0.3 * depth)
        r, g = powers(width, 0.5 * rest), powers(width, 0.5 * rest)
        table |= {
            f"{mixer}.mu_x": complements(current),
            f"{mixer}.mu": complements(w + k + v + r + g),
            f"{mixer}.time_decay": decay,
            f"{mixer}.bonus": bonus,
            f"{mlp}.mu_k": complements(powers(width, rest**3)),
            f"{mlp}.mu_r": complements(powers(width, rest**3)),
        }
    return table | {
        "*.mixer.gate_proj.weight": Orthogonal(0.1),
        "*.mixer.*_lora_a": ZERO,
        "*.mixer.*_lora_b": uniform(0.01),
        "*.mlp.r_proj.weight": ZERO,
    }


def rwkv7(config):
    """RWKV-v5's trainer, x070."""
    width, size, head_size = config.hidden_size, config.key_size, config.head_size
    table, layers = rwkv_matrices(config)
    middle = (head_size - 1) / 2
    zigzag = [(i % head_size - middle) / middle for i in range(size)]
    zigzag = [x * abs(x) for x in zigzag]
    linear = [i / (size - 1) - 0.5 for i in range(size)]
    for index, (depth, rest) in enumerate(layers):
        mixer, mlp = f"model.layers.{index}.mixer", f"model.layers.{index}.mlp"
        mixed = [powers(width, power * rest) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]
        speed = [-6 + 6 * (i / (size - 1)) ** (1 + depth**0.3) for i in range(size)]
        table |= {
            f"{mixer}.mu": complements(sum(mixed, [])),
            f"{mixer}.decay.bias": [x + 0.5 + 2.5 * z for x, z in zip(speed, zigzag, strict=True)],
            f"{mixer}.rate.bias": [
                -0.19 + 0.3 * z + 0.4 * x for z, x in zip(zigzag, linear, strict=True)
            ],
            f"{mixer}.k_k": [0.71 - 0.1 * x for x in linear],
            f"{mlp}.mu_k": complements(powers(width, rest**4)),
        }
        if index > 0:
            values = config.value_size
            table[f"{mixer}.residual.bias"] = [
                0.73 - 0.4 * (i / (values - 1) - 0.5) for i in range(values)
            ]
    gain = max(1.0, config.gate_lora_rank / config.value_size) ** 0.5
    table |= {f"*.mixer.{name}.b": Orthogonal(0.1) for name in ("decay", "rate", "residual")}
    return table | {
        "*.mixer.gate.b": Orthogonal(0.1 * gain),
        "*.mixer.*.a": ZERO,
        "*.mixer.k_a": (1.02, 0.0, "constant"),
        "*.mixer.r_k": (-0.04, 0.0, "constant"),
    }


def lightning(config):
    """OpenNLPLab's TransNormerLLM; transformers' MiniMax has the same."""
    normal = (0.0, config.initializer_range, "normal")
    table = {"model.embed_tokens.weight": normal, "lm_head.weight": normal}
    table |= {"*.mixer.*_proj.weight": normal, "*.mlp.*_proj.weight": normal}
    if config.bias:
        table["*_proj.bias"] = ZERO
    if config.norm_weight:
        table["*norm.weight"] = ONE
    channels = config.num_attention_heads * config.head_dim
    for layer in config.lrpe_layers:
        angles = [10000 ** (-2 * i / channels) for i in range(channels)]
        table[f"model.layers.{layer}.mixer.lrpe_theta"] = angles
    return table | position_biases(config)


def sliding_window(config):
    """transformers' Mistral and Bloom, gpt-oss's sink logits; biases by their own papers."""
    normal = (0.0, config.initializer_range, "normal")
    table = dict.fromkeys(("*_proj.weight", "model.embed_tokens.weight"), normal)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = normal
    table["*norm.weight"] = ONE
    if config.norm_bias:
        table["*norm.bias"] = ZERO
    if config.attention_bias or config.mlp_bias:
        table["*_proj.bias"] = ZERO
    if config.learnable_sinks:
        table["*.mixer.sink_logits"] = normal
    return table | position_biases(config)


def position_biases(config):
    """T5's table as its code has it; FIRE as its paper's appendix, with PyTorch's linear layers."""
    table, types, bias = {}, position_types(config), "*.mixer.position_bias."
    if "t5" in types:
        table[f"{bias}table"] = (0.0, config.hidden_size**-0.5, "normal")
    if "fire" in types:
        table[f"{bias}c"] = (config.fire_init_c, 0.0, "constant")
        table[f"{bias}length_factor"] = ONE
        table |= dict.fromkeys((f"{bias}up_weight", f"{bias}up_bias"), linear_default(1))
        down = f"{bias}down_weight", f"{bias}down_bias"
        table |= dict.fromkeys(down, linear_default(config.fire_mlp_width))
    return table


def between(low, high):
    """Uniform between two numbers."""
    return (low + high) / 2, (high - low) / 12**0.5, "uniform"


def gated_deltanet(config):
    """flash-linear-attention's GatedDeltaNet; its A as in Qwen3-Next, which leaves out 0."""
    normal = (0.0, config.initializer_range, "normal")
    table = dict.fromkeys(("*_proj.weight", "model.embed_tokens.weight", "lm_head.weight"), normal)
    log_steps = between(math.log(0.001), math.log(0.1))
    return table | {
        "*.mixer.convolution.weight": normal,
        "*norm.weight": ONE,
        "*.mixer.log_a": Of(lambda x: x.exp(), between(0.01, 16)),
        "*.mixer.dt_bias": Of(lambda x: F.softplus(x).log(), log_steps),
    }


def infini(config):
    """transformers' Llama and Gemma; the gates as in Beomi's code."""
    normal = (0.0, config.initializer_range, "normal")
    table = dict.fromkeys(("*_proj.weight", "model.embed_tokens.weight"), normal)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = normal
    table["*norm.weight"] = ZERO if config.norm_adds_one else ONE
    if config.memory_update != "none":
        table["*.mixer.gate"] = (config.gate_init, 0.0, "constant")
    if config.mlp_bias:
        table["*_proj.bias"] = ZERO
    if config.lm_head_bias:
        table["lm_head.bias"] = ZERO
    return table | position_biases(config)


def long_llama(config):
    """transformers' Llama, which LongLLaMA's own code repeats."""
    normal = (0.0, config.initializer_range, "normal")
    table = dict.fromkeys(("*_proj.weight", "model.embed_tokens.weight"), normal)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = normal
    return table | {"*norm.weight": ONE}


def landmark(config):
    """transformers' Llama, from which the authors' code was made."""
    table = long_llama(config)
    if config.norm_bias:
        table["*norm.bias"] = ZERO
    if config.mlp_bias or config.attention_bias:
        table["*_proj.bias"] = ZERO
    return table


def fan_in_truncated(fan_in, scale=1.0):
    """flax's variance_scaling: variance scale / fan_in, of what is left of the normal."""
    return 0.0, (scale / fan_in) ** 0.5, "truncated"


def block_recurrent(config):
    """meliad, with flax's default for T5's biases: an embedding as wide as there are buckets."""
    width, mlp_width = config.hidden_size, config.intermediate_size
    size, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
    recurrent = config.recurrent_layers
    table = {
        "model.embed_tokens.weight": (0.0, 1.0, "normal"),
        "*norm.weight": ONE,
        "*.mixer.scale": ONE,
        "*.mixer.[qkv]_proj.weight": fan_in_truncated(width),
        "*.mlp.up_proj.weight": fan_in_truncated(width),
        "*.mlp.down_proj.weight": fan_in_truncated(mlp_width),
    }
    if config.position_embedding_type == "t5" and len(config.memory_layers) < layers:
        table["*.mixer.relative_bias"] = (0.0, config.num_buckets**-0.5, "normal")
    if config.memory_layers:
        table["*.mixer.memory.gate"] = (0.0, 0.0, "constant")
    for layer in range(layers):
        is_reader = config.feedback or layer in recurrent
        out = f"model.layers.{layer}.mixer.out_proj.weight"
        table[out] = fan_in_truncated((1 + is_reader) * size)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = table["model.embed_tokens.weight"]
    if recurrent:
        table |= {
            "*.mixer.state_q_proj.weight": fan_in_truncated(width),
            "*.mixer.state_scale": ONE,
            "*.mixer.cell.initial": (0.0, 0.1, "normal"),
            "*.mixer.cell.position": (0.0, 1.0, "normal"),
            "*.mixer.cell.*norm_weight": ONE,
            "*.mixer.cell.scale": ONE,
            "*.mixer.cell.token_scale": ONE,
            "*.mixer.cell.[qkv]_proj.weight": fan_in_truncated(width),
            "*.mixer.cell.token_q_proj.weight": fan_in_truncated(width),
        }
        gated = {} if config.configuration == "single" else {"out": 2 * size}
        if config.configuration != "skip":
            gated["mlp_out"] = mlp_width
            fan_in = width if config.configuration == "dual" else 2 * size
            table["*.mixer.cell.up_proj.weight"] = fan_in_truncated(fan_in)
        for name, fan_in in gated.items():
            table[f"*.mixer.cell.{name}.proj.weight"] = fan_in_truncated(fan_in)
            if config.gate == "bias":
                table[f"*.mixer.cell.{name}.bias"] = (0.0, 0.1, "normal")
            else:
                table[f"*.mixer.cell.{name}.*_gate.weight"] = fan_in_truncated(fan_in, 0.1)
                table[f"*.mixer.cell.{name}.*_gate.bias"] = (0.0, 0.1, "normal")
    return table


def rmt(config):
    """transformers' Mistral and GPT-2, memory as wide as embeddings; ARMT's matrices of PyTorch."""
    normal = (0.0, config.initializer_range, "normal")
    matrices = "*.mixer.*_proj.weight", "*.mlp.*_proj.weight", "model.embed*.weight"
    table = dict.fromkeys((*matrices, "model.memory.vectors"), normal)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = normal
    table["*norm.weight"] = ONE
    if config.norm_bias:
        table["*norm.bias"] = ZERO
    if config.attention_bias:
        table["*.mixer.*_proj.bias"] = ZERO
    if config.mlp_bias:
        table["*.mlp.*_proj.bias"] = ZERO
    if config.memory == "associative":
        default = linear_default(config.hidden_size)
        table |= dict.fromkeys(("*.memory.[qk]_proj.weight", "*.strength_proj.*"), default)
        table["*.memory.v_proj.weight"] = ZERO
    return table


def longnet(config):
    """torchscale's decoder, whose scale for sub-LayerNorms or deepnorm takes biases too."""
    width, mlp_width, layers = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )
    divisor = 1 / math.log(2 * layers) ** 0.5 if config.sub_norm else 1.0
    if config.deepnorm:
        divisor = (8 * layers) ** 0.25
    embedding = (0.0, width**-0.5, "normal")
    table = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    if hasattr(config, "max_position_embeddings"):
        table["model.embed_positions.weight"] = embedding
    table["*norm.weight"], table["*norm.bias"] = ONE, ZERO
    for kind in ("weight", "bias"):
        table |= {
            f"*.mixer.[qk]_proj.{kind}": linear_default(width),
            f"*.mixer.v_proj.{kind}": divided(linear_default(width), divisor),
            f"*.mixer.out_proj.{kind}": divided(linear_default(width), divisor),
            f"*.mlp.up_proj.{kind}": divided(linear_default(width), divisor),
            f"*.mlp.down_proj.{kind}": divided(linear_default(mlp_width), divisor),
        }
    return table


def transformer_xl(config):
    """The authors' train.py: everything N(0, 0.02), norms around 1, projections N(0, 0.01)."""
    std = config.initializer_range
    table = {
        "model.embed_tokens.*weight": (0.0, std, "normal"),
        "*query_biases.*": (0.0, std, "normal"),
        "*norm.weight": (1.0, std, "normal"),
        "*norm.bias": ZERO,
        "*.mixer.*_proj.weight": (0.0, std, "normal"),
        "*.mlp.*_proj.weight": (0.0, std, "normal"),
        "*.mlp.*_proj.bias": ZERO,
        "lm_head.*bias": ZERO,
    }
    if not config.tie_word_embeddings:
        table["lm_head.*weight"] = (0.0, std, "normal")
    if config.num_memory_tokens:  # of variance 1, as what the last norm leaves of them
        table["model.memory.vectors"] = (0.0, 1.0, "normal")
    if config.cutoffs:
        table["lm_head.clusters.weight"] = (0.0, std, "normal")
    if config.div_val > 1 or config.d_embed != config.hidden_size:
        del table["model.embed_tokens.*weight"]
        table["model.embed_tokens.tables.*.weight"] = (0.0, std, "normal")
        table["model.embed_tokens.projections.*.weight"] = (0.0, 0.01, "normal")
        table["lm_head.projections.*.weight"] = (0.0, 0.01, "normal")
    return table


# By the name in zoo.MODELS; each takes the config.
TABLES = {
    "retnet": retnet,
    "rwkv4": rwkv4,
    "rwkv5": rwkv5,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "gated_deltanet": gated_deltanet,
    "lightning": lightning,
    "sliding_window": sliding_window,
    "infini": infini,
    "landmark": landmark,
    "block_recurrent": block_recurrent,
    "longnet": longnet,
    "transformer_xl": transformer_xl,
    "long_llama": long_llama,
    "rmt": rmt,
}
