"""Declared operations per token: counted where PyTorch's counter sees them, and by definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.core.state import state_bytes
from zoo.kernels.dilated_branches import branches_of
from zoo.kernels.windowed_attention import visible_keys
from zoo.layers.adaptive_softmax import Projection
from zoo.layers.short_convolution import ShortConvolution, _MovingSum
from zoo.models.rwkv7 import LowRank

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 48  # whole windows and segments, all of them 16
CASES = [(name, variant) for name, x in zoo.MODELS.items() for variant in x.config.variants]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter


def memory(keys, values, is_delta=False):
    """A state [K, V] that is written and read, or also read at a key and corrected there."""
    row, column, state = torch.ones(1, keys), torch.ones(1, values), torch.ones(keys, values)

    def step():
        new = state + row.T @ (row @ state) if is_delta else state
        return row @ (new + row.T @ column)

    return counted(step).get_total_flops()


def attention(visible_TS, size):
    """Each query with the keys that it sees."""
    total, one = 0, torch.ones(1, size)
    for num_keys in visible_TS.sum(1).tolist():
        keys = torch.ones(num_keys, size)
        total += counted(lambda keys=keys: (one @ keys.T) @ keys).get_total_flops() * (num_keys > 0)
    return total


def band(window, sinks=0):
    visible_TS = visible_keys(LENGTH, LENGTH, window, device="cpu")[0].clone()
    visible_TS[:, :sinks] |= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[:, :sinks]
    return visible_TS


def softmax(mixer):
    visible_TS = band(mixer.window, mixer.num_sinks)
    total = mixer.num_heads * attention(visible_TS, mixer.head_dim)
    if mixer.position_type == "fire":
        hidden = torch.ones(1, mixer.config.fire_mlp_width)
        down = torch.ones(hidden.shape[1], mixer.num_heads)
        total += int(visible_TS.sum()) * counted(lambda: hidden @ down).get_total_flops()
    return total


def linear(keys, values, heads):
    return LENGTH * heads * memory(keys, values)


def rwkv6(mixer):
    heads, size = mixer.head_shape
    x_D, ranks = torch.ones(1, 32), (mixer.mix_lora_a, mixer.decay_lora_a)

    def low_rank():
        ask_BTR = (x_D @ ranks[0]).unflatten(-1, (5, -1))
        for index in range(5):
            ask_BTR[:, index] @ mixer.mix_lora_b[index]
        x_D @ ranks[1] @ mixer.decay_lora_b

    return LENGTH * counted(low_rank).get_total_flops() + linear(size, size_of_v(mixer), heads)


def size_of_v(mixer):
    return mixer.config.value_size // mixer.config.num_attention_heads


def segments_of(length):
    segment = torch.arange(LENGTH) // length
    return band(None) & (segment[:, None] == segment)


def infini(mixer):
    heads, groups, size = mixer.num_heads, mixer.num_groups, mixer.head_dim
    total = heads * attention(segments_of(mixer.config.segment_length), size)
    q_1K, memory_KV, v_1V = torch.ones(1, size), torch.ones(size, size + 1), torch.ones(1, size + 1)
    read = counted(lambda: q_1K @ memory_KV).get_total_flops()
    write = counted(lambda: q_1K.T @ v_1V).get_total_flops()
    update = {"none": 0, "linear": write, "delta": read + write}[mixer.config.memory_update]
    return total + LENGTH * ((read if update else 0) * heads + update * groups)


def focused(mixer):
    heads, size, segment = mixer.num_heads, mixer.head_dim, torch.arange(LENGTH) // mixer.length
    near = heads * attention(segments_of(mixer.length), size)
    back = segment[:, None] - segment
    seen = (back > 0) & (back <= (mixer.windows or LENGTH))
    most = mixer.top_k or LENGTH
    chosen = seen & (seen.cumsum(1) <= most)  # as many as are chosen, whichever they are
    return near + heads * (attention(seen, size) + attention(chosen, size)) / 2


def frames(mixer):
    """Of segments with memory around them, all written but the last; and ARMT's in the layer."""
    config, length = mixer.config, mixer.config.segment_length
    is_armt, num_memory = config.memory == "associative", config.num_memory_tokens
    total = written = read = 0
    for start in range(0, LENGTH, length):
        is_last = start + length >= LENGTH
        writes = 0 if is_last else num_memory
        width = (0 if is_armt else num_memory) + min(length, LENGTH - start) + writes
        visible = torch.ones(width, width, dtype=torch.bool).tril()
        total += mixer.num_heads * attention(visible, mixer.head_dim)
        written, read = written + writes, read + width
    if is_armt:
        features = 2 * config.dpfp_order * config.memory_size
        total += (read + 2 * written) * product(features, config.hidden_size + 1)
    return total


def product(size, width):
    """Of a vector with a matrix."""
    return counted(lambda: torch.ones(1, size) @ torch.ones(size, width)).get_total_flops()


def block_recurrent(mixer):
    config, window = mixer.config, mixer.window
    states, size = config.num_states, config.head_dim
    visible = band(window + 1) & ~torch.eye(LENGTH, dtype=torch.bool)
    total = attention(visible, size)
    if mixer.reads_states:
        total += attention(torch.ones(LENGTH, states, dtype=torch.bool), size)
    if mixer.is_recurrent:
        keys = torch.ones(states, states + 2 * window, dtype=torch.bool)
        per_window = attention(keys, size)
        total += LENGTH / window * per_window
    if mixer.memory is not None:
        # Scores of all in the memory, and attention to those chosen.
        q_1K, index = torch.ones(1, size), torch.arange(LENGTH)
        begin_T = index // config.memory_segment_length * config.memory_segment_length
        remembered = (begin_T[:, None] > index) & (begin_T[:, None] - config.memory_size <= index)
        for num_keys in remembered.sum(1).tolist():
            keys = torch.ones(num_keys, size)
            total += counted(lambda keys=keys: q_1K @ keys.T).get_total_flops() * (num_keys > 0)
        neighbors = torch.ones(LENGTH, config.memory_neighbors, dtype=torch.bool)
        total += attention(neighbors, size)
    return config.num_attention_heads * total


def landmark(mixer):
    """A landmark stands after every eight tokens, is scored by all after it, and read by none."""
    config, size = mixer.config, mixer.config.block_length + 1
    places = LENGTH + (LENGTH - (not config.landmark_predicts_next)) // config.block_length
    place, total, one = torch.arange(places), 0, torch.ones(1, mixer.head_dim)

    def product(count):
        return counted(lambda: one @ torch.ones(mixer.head_dim, count)).get_total_flops()

    for query in place.tolist():
        block, is_token = place // size, place % size < size - 1
        own = (block == query // size) & (place <= query) & is_token
        earlier, count = query // size, config.retrieved_blocks
        read = earlier if count is None else min(earlier, count)
        total += product(int(own.sum()) + read * size) + product(int(own.sum()) + read * (size - 1))
        total += product(earlier) if count is not None and earlier else 0
    return mixer.num_heads * total


def transformer_xl(mixer):
    """Three products for each key: with the key, with its distance, with the value."""
    config, index = mixer.config, torch.arange(LENGTH)
    begin = index - config.mem_len + 1
    if not config.same_length:
        begin = index // config.segment_length * config.segment_length - config.mem_len
    visible = band(None) & (index >= begin[:, None])
    return mixer.num_heads * attention(visible, mixer.head_dim) * 3 // 2


def frames_and_past(mixer):
    """The same of segments with memory around them, where it sees itself in both directions."""
    config, length = mixer.config, mixer.config.segment_length
    number, total, past = config.num_memory_tokens, 0, 0
    for start in range(0, LENGTH, length):
        of_text = min(length, LENGTH - start)
        width = number + of_text + number * (start + length < LENGTH)
        visible = torch.ones(width, past + width, dtype=torch.bool).tril(past)
        if not config.read_memory_from_cache:
            visible[:number, :past] = visible[number + of_text :, :past] = False
        visible[:number, past : past + number] = True
        visible[number + of_text :, past:] = True
        total += mixer.num_heads * attention(visible, mixer.head_dim) * 3 // 2
        past = min(config.mem_len, past + width)
    return total


def longnet(mixer):
    config, total, index = mixer.config, 0, torch.arange(LENGTH)
    for branch in branches_of(config.segment_lengths, config.dilation_rates):
        same = index[:, None] // branch.length == index // branch.length
        for offset in branch.offsets(config.num_attention_heads, config.head_offsets, "cpu"):
            chosen = index % branch.length % branch.rate == offset
            visible = band(None) & same & chosen[:, None] & chosen
            total += attention(visible, config.head_dim)
    return total


def delta(mixer):
    config = mixer.config
    return LENGTH * config.num_attention_heads * memory(*sizes_of(mixer), is_delta=True)


def sizes_of(mixer):
    return mixer.state_specs()["memory_NHKV"].shape[1:]


# What a mixer does beside its matrices, of all tokens, by its class.
CORE = {
    "Retention": lambda m: linear(m.key_dim, m.value_dim, m.num_heads),
    "RWKV4TimeMix": lambda m: LENGTH * 8 * m.config.attention_hidden_size,
    "RWKV5TimeMix": lambda m: linear(m.head_shape[1], size_of_v(m), m.head_shape[0]),
    "RWKV6TimeMix": rwkv6,
    "RWKV7TimeMix": delta,
    "GatedDeltaRule": delta,
    "LightningAttention": lambda m: linear(
        m.head_shape[1] * (1 + m.has_lrpe), m.head_shape[1], m.head_shape[0]
    ),
    "SoftmaxAttention": softmax,
    "ExtendedAttention": softmax,
    "FrameAttention": frames,
    "InfiniAttention": infini,
    "SegmentAttention": lambda m: (
        m.num_heads * attention(segments_of(m.config.segment_length), m.head_dim)
    ),
    "FocusedAttention": focused,
    "WindowAttention": block_recurrent,
    "DilatedAttention": longnet,
    "RelativeAttention": transformer_xl,
    "RelativeFrameAttention": frames_and_past,
    "LandmarkAttention": landmark,
}


def convolved(x_BLD, weight_DW):
    return F.conv1d(x_BLD.mT, weight_DW[:, None], groups=len(weight_DW)).mT


@pytest.mark.parametrize(("name", "variant"), CASES)
@torch.no_grad()
def test_declared_is_counted(name, variant, monkeypatch):
    # Sums of products that the counter does not see, as the operator that it does.
    monkeypatch.setattr(_MovingSum, "apply", convolved)
    architecture = zoo.MODELS[name]
    fields = SIZES | architecture.config.variants[variant]
    if fields.get("sliding_window") in (13, 32):  # which do not divide LENGTH
        fields["sliding_window"] = 16
    model = architecture.causal_lm(architecture.config(**fields)).eval()
    counter = counted(lambda: model(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=True))
    counts = counter.get_flop_counts()
    dense = sum(
        sum(counts.get(f"{type(model).__name__}.{path}", {}).values())
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, LowRank, ShortConvolution, Projection))
    )
    if fields.get("feedback"):  # where keys and values of states are computed for readers again
        dense -= LENGTH // 16 * 2 * 2 * fields["num_states"] * 32 * 32
    core = sum(CORE[type(layer.mixer).__name__](layer.mixer) for layer in model.model.layers)
    assert dense > core / 100
    assert LENGTH * model.flops_per_token(LENGTH) == pytest.approx(dense + core, rel=1e-12)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_without_memory_for_a_model(name):
    """On meta, at any length; longer texts cost no more per token where windows bound them."""
    config = zoo.MODELS[name].config(**SIZES)
    with torch.device("meta"):
        model = zoo.MODELS[name].causal_lm(config)
    live = zoo.MODELS[name].causal_lm(config).eval()
    with torch.no_grad():
        cache = live(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert model.state_size(3) == state_bytes(cache)
    costs = [model.flops_per_token(length) for length in (1, 100, 2**20, 2**21)]
    assert costs == [live.flops_per_token(length) for length in (1, 100, 2**20, 2**21)]
    if name == "rmt":  # whose short texts pay for the memory that they read
        assert costs[1] < costs[0]
        costs[0] = 0
    assert costs == sorted(costs)
    if model.has_constant_state:
        assert costs[3] < 1.01 * costs[2]
