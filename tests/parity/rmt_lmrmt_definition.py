"""RMT in Transformer-XL's stack by its definition, key by key, and small models to compare."""

import torch
from torch.nn.functional import layer_norm, softmax

from zoo import TransformerXLConfig, TransformerXLForCausalLM

SMALL = {
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 6,
    "segment_length": 5,
    "same_length": False,
    "num_memory_tokens": 3,
}
SETTINGS = {
    "no cache": {"mem_len": 0, "untie_r": False},
    "cache, not read by memory": {"mem_len": 4},
    "cache, read by memory": {"mem_len": 4, "read_memory_from_cache": True, "pre_lnorm": True},
    "cache of two segments": {"mem_len": 15, "read_memory_from_cache": True, "clamp_len": 17},
    "one token, near distances alone": {"mem_len": 9, "num_memory_tokens": 1, "clamp_len": 3},
    "clusters": {"mem_len": 4, "cutoffs": [10, 20], "div_val": 2},
}


def build(fields):
    """A small model in float64 whose parameters are all of order one."""
    torch.manual_seed(0)
    model = TransformerXLForCausalLM(TransformerXLConfig(**SMALL | fields)).double().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_(0.3 * torch.randn_like(x) * (x.shape[-1] ** -0.5 if "weight" in name else 1))
    return model


def ids_of(*shape):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def run(model, ids, sizes, padding=0):
    """Logits and the cache after pieces of these sizes, the first behind so much padding."""
    cache, logits = None, []
    for chunk in ids.split(sizes, dim=1):
        inputs = {}
        if padding and cache is None:
            chunk = torch.nn.functional.pad(chunk, (padding, 0), value=3)
            mask = torch.nn.functional.pad(torch.ones_like(ids[:, : sizes[0]]), (padding, 0))
            inputs["attention_mask"] = mask
        output = model(chunk, past_key_values=cache, use_cache=True, **inputs)
        logits.append(output.logits[:, padding if cache is None else 0 :])
        cache = output.past_key_values
    return torch.cat(logits, dim=1), cache


def definition(model, ids):
    """Logits of one text, its memories and last caches, key by key, from the authors' equations.

    For full segments, and rows of keys that are masked as there: a later segment's memory does not
    exist yet, and a shifted score is looked up where the shift leaves it.
    """
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    number, length = config.num_memory_tokens, config.segment_length

    def of(name, x):
        bias = weights.get(f"{name}.bias")
        y = x @ weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(name, x):
        return layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def vector(distance):
        if config.clamp_len > 0:
            distance = min(distance, config.clamp_len)
        angles = distance / 10000 ** (torch.arange(0, width, 2).double() / width)
        return torch.cat([angles.sin(), angles.cos()])

    def attend(layer, x, past):
        own = f"{layer}.mixer" if config.untie_r else "model"
        u, t = (weights[f"{own}.query_biases.{name}"] for name in ("content", "position"))
        both = torch.cat([past, x])
        if config.pre_lnorm:
            both = norm(f"{layer}.mixer_norm", both)
        q, k, v = (of(f"{layer}.mixer.{c}_proj", both).view(-1, heads, size) for c in "qkv")
        q, before, keys = q[len(past) :], len(past), len(both)
        r = of(f"{layer}.mixer.r_proj", torch.stack([vector(d) for d in range(keys)]))
        r = r.view(keys, heads, size)
        outputs = []
        for i in range(len(x)):
            is_read, is_write = i < number, i >= number + length
            sees, scores = [], []
            for j in range(keys):
                place, n = j - before, before + i - j
                together = (is_read and 0 <= place < number) or (
                    is_write and place >= number + length
                )
                hidden = place < 0 and (is_read or is_write) and not config.read_memory_from_cache
                if hidden or not (n >= 0 or together):
                    continue
                position = 0
                if n >= 0:
                    position = ((q[i] + t) * r[n]).sum(-1)
                elif n < -1:
                    position = ((q[i + 1] + t) * r[keys + 1 + n]).sum(-1)
                scores.append((((q[i] + u) * k[j]).sum(-1) + position) / size**0.5)
                sees.append(v[j])
            p = softmax(torch.stack(scores), dim=0)
            outputs.append((p[..., None] * torch.stack(sees)).sum(0).flatten())
        return of(f"{layer}.mixer.out_proj", torch.stack(outputs))

    layers = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]
    caches = [ids.new_zeros(0, width).double() for _ in layers]
    memory, logits, memories = weights["model.memory.vectors"], [], []
    embeds = model.model.embed_tokens(ids) * width**0.5
    for text in embeds.split(length):
        x = torch.cat([memory, text, memory])
        for index, layer in enumerate(layers):
            past = caches[index]
            both = torch.cat([past, x]).detach()
            caches[index] = both[max(len(both) - config.mem_len, 0) :]
            y = x + attend(layer, x, past)
            if not config.pre_lnorm:
                y = norm(f"{layer}.mixer_norm", y)
            h = norm(f"{layer}.mlp_norm", y) if config.pre_lnorm else y
            x = y + of(f"{layer}.mlp.down_proj", of(f"{layer}.mlp.up_proj", h).relu())
            if not config.pre_lnorm:
                x = norm(f"{layer}.mlp_norm", x)
        memory = x[-number:]
        logits.append(model.lm_head(x[number:-number]))
        memories.append(memory)
    return torch.cat(logits), memories, caches
