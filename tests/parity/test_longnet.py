"""LongNet against torchscale's code, and its receptive field against the branches."""

import json

import pytest
import torch
from goldens import golden_folder, golden_tensors
from transformers import AutoModelForCausalLM
from ways import WAYS, gradients, run, worst

from zoo import LongNetConfig, LongNetForCausalLM
from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights

GOLDEN = "longnet-torchscale"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "segment_lengths": [8, 16],
    "dilation_rates": [1, 2],
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """dtype -> the golden's model, converted."""
    folder = tmp_path_factory.mktemp("golden")
    convert("torchscale-longnet", golden_folder(GOLDEN), folder / "ours")

    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=dtype).eval()

    return load


@pytest.mark.parametrize("way", WAYS)
def test_logits(load, way):
    golden = golden_tensors(GOLDEN)
    for dtype, relative, bound in ((torch.float64, False, 1e-9), (torch.float32, True, 1e-5)):
        logits, _ = run(load(dtype), golden["input_ids"], way)
        assert worst(logits, golden["logits_f64"], relative) < bound


def test_gradients_are_the_official_ones(load):
    golden, official = golden_tensors(GOLDEN), golden_tensors(GOLDEN, "grads")
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, weights = load(dtype), Weights(dict(official))
        ours = gradients(model, golden["input_ids"])
        pairs = dict(FORMATS["torchscale-longnet"].read_weights(weights, model.config))
        assert weights.untaken == set() and pairs.keys() == ours.keys()
        for key, gradient in pairs.items():
            # The official ones are stored in float32. A key's bias moves all scores of a query
            # alike: its gradient is zero but for rounding, so it is held to what others are.
            largest = gradient.abs().max().clamp(min=1e-3)
            assert (ours[key] - gradient).abs().max() / largest < bound, key


class OfficialXPos:
    """torchscale's q and k with xPos, as the equations page has it: powers centred on T / 2."""

    def __init__(self, config):
        self.half = config.head_dim // 2
        steps = torch.arange(self.half, dtype=torch.float64)
        self.zeta = (2 * steps + 0.4 * config.head_dim) / (1.4 * config.head_dim)
        self.theta = 10000 ** (-steps / self.half)
        self.base = config.xpos_scale_base

    def __call__(self, x_BTHK, sign):
        length = x_BTHK.shape[1]
        n = torch.arange(length, dtype=torch.float64)[:, None]
        scale = self.zeta ** (sign * (n - length // 2) / self.base)
        cos, sin = (
            ((n * self.theta).cos() * scale)[:, None],
            ((n * self.theta).sin() * scale)[:, None],
        )
        a, b = x_BTHK[..., ::2], x_BTHK[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def official_layer(model, x_BTD):
    """The attention of the first layer in torchscale's own order, dense masks, h // ceil(H / r)."""
    config, mixer = model.config, model.model.layers[0].mixer
    length, heads = x_BTD.shape[1], config.num_attention_heads
    q, k, v = (
        proj(x_BTD).unflatten(-1, (heads, -1))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    xpos = OfficialXPos(config)
    q, k = xpos(q, 1), xpos(k, -1)
    outputs, logs, n = [], [], torch.arange(length)
    for w, r in zip(config.segment_lengths, config.dilation_rates):
        offset = torch.arange(heads)[:, None] // -(-heads // r)
        chosen = n % w % r == offset
        seen = (n[:, None] >= n) & (n[:, None] // w == n // w)
        seen = seen & chosen[:, :, None] & chosen[:, None]
        score = torch.einsum("bthk,bshk->bhts", q, k) * config.head_dim**-0.5
        score = score.masked_fill(~seen, -torch.inf)
        logs.append(score.logsumexp(-1).masked_fill(~chosen, -1e8))
        outputs.append(score.softmax(-1).nan_to_num() @ v.transpose(1, 2))
    weight = torch.stack(logs).softmax(0)[..., None]
    y = (torch.stack(outputs) * weight).sum(0).transpose(1, 2).flatten(2)
    return mixer.out_proj(mixer.inner_norm(y))


@torch.no_grad()
@pytest.mark.parametrize("branches", [([8, 16], [1, 2]), ([20, 60], [1, 5]), ([10], [3])])
def test_xpos_is_torchscales(branches):
    torch.manual_seed(0)
    lengths, rates = branches
    fields = SMALL | {"segment_lengths": lengths, "dilation_rates": rates, "xpos_scale_base": 16}
    model = LongNetForCausalLM(LongNetConfig(**fields)).double().eval()
    x_BTD = torch.randn(2, 50, 24, dtype=torch.float64)
    seen = []
    hook = model.model.layers[0].mixer.register_forward_hook(lambda *x: seen.append(x[2][0]))
    model.model.layers[0].mixer_norm = torch.nn.Identity()
    model(inputs_embeds=x_BTD)
    hook.remove()
    assert worst(seen[0], official_layer(model, x_BTD)) < 1e-12


def theirs_of(tmp_path, changes, tensors):
    """A folder like the golden's with another config and more tensors."""
    from safetensors.torch import load_file, save_file

    source = golden_folder(GOLDEN)
    (tmp_path / "theirs").mkdir()
    values = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))
    weights = load_file(source / "model.safetensors")
    save_file(
        {k: x for k, x in (weights | tensors).items() if x is not None},
        tmp_path / "theirs" / "model.safetensors",
    )
    return tmp_path / "theirs"


def test_xpos_converts(tmp_path):
    scale = (torch.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
    buffers = {f"layers.{n}.self_attn.xpos.scale": scale.clone() for n in range(2)}
    theirs = theirs_of(
        tmp_path,
        {"xpos_rel_pos": True, "segment_length": "[16, 32, 64]", "dilated_ratio": "[1,2,4]"},
        {"embed_positions.weight": None} | buffers,
    )
    convert("torchscale-longnet", theirs, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.xpos and not hasattr(model.config, "max_position_embeddings")
    assert model.config.segment_lengths == [16, 32, 64]
    assert not hasattr(model.model, "embed_positions")


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"rel_pos_buckets": 32, "max_rel_pos": 128}, {}, "takes no relative bias"),
        ({"moe_freq": 2}, {}, "mixtures of experts"),
        ({"activation_fn": "mish"}, {}, "activation_fn is one of"),
        ({"dilated_ratio": "[1, 2"}, {}, "dilated_ratio is a list of numbers"),
        ({"dilated_ratio": [1, 2]}, {}, "one positive entry per branch"),
        (
            {"xpos_rel_pos": True},
            {"layers.0.self_attn.xpos.scale": torch.ones(8)},
            "by the config it would be",
        ),
        ({"subln": False}, {}, "nothing uses"),
    ],
)
def test_refused(tmp_path, changes, tensors, message):
    theirs = theirs_of(tmp_path, changes, tensors)
    with pytest.raises(ValueError, match=message):
        convert("torchscale-longnet", theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size is a multiple of num_attention_heads"),
        ({"hidden_size": 12}, "head_dim is even"),
        ({"segment_lengths": [8]}, "one positive entry per branch each"),
        ({"segment_lengths": None}, "one positive entry per branch each"),
        ({"dilation_rates": [1, 0]}, "one positive entry per branch each"),
        ({"xpos_scale_base": 0}, "xpos_scale_base is at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is at least 1"),
        ({"deepnorm": True}, "two ways to the same end"),
        ({"hidden_act": "mish2"}, "hidden_act is one of"),
    ],
)
def test_configs_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        LongNetConfig(**SMALL | fields)


def test_positions_end_where_the_table_does(load):
    model = load(torch.float32)
    with pytest.raises(ValueError, match="learned positions end at max_position_embeddings = 158"):
        model(torch.ones(1, 159, dtype=torch.long))


def by_hand(config, length):
    """Which tokens each sees, from the definition: a matrix for a layer, to the power of layers."""
    n, heads = torch.arange(length), config.num_attention_heads
    one = torch.eye(length, dtype=torch.bool)
    for w, r in zip(config.segment_lengths, config.dilation_rates):
        for h in range(heads):
            offset = h // -(-heads // r) if config.head_offsets == "grouped" else h % r
            chosen = n % w % r == offset
            one |= (n[:, None] >= n) & (n[:, None] // w == n // w) & chosen[:, None] & chosen
    all_layers = one
    for _ in range(config.num_hidden_layers - 1):
        all_layers = (all_layers.double() @ one.double()) > 0
    return all_layers


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    "branches",
    [
        {"segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 4]},
        {"segment_lengths": [7, 30], "dilation_rates": [3, 4], "head_offsets": "modulo"},
        {"segment_lengths": [5, 100], "dilation_rates": [1, 7]},
    ],
)
def test_receptive_field(branches, layers):
    """A late logit's gradient reaches exactly the tokens that the branches let it reach."""
    torch.manual_seed(0)
    config = LongNetConfig(**SMALL | {"num_hidden_layers": layers} | branches)
    model = LongNetForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for length in (97, 128):
        embeds = torch.randn(1, length, 24, dtype=torch.float64, requires_grad=True)
        logits = model(inputs_embeds=embeds).logits[0, -1]
        weight = torch.randn(len(logits), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(logits @ weight, embeds)
        reached = gradient[0].abs().amax(-1) > 0
        expected = by_hand(config, length)[-1]
        assert torch.equal(reached, expected)
        assert torch.equal(model.visible_tokens(length), expected)


@torch.no_grad()
def test_decodes_ten_times_past_the_longest_segment():
    """Token by token over 10 of the longest segments: the logits of one pass, bytes that stay."""
    torch.manual_seed(0)
    config = LongNetConfig(**SMALL | {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]})
    model = LongNetForCausalLM(config).double().eval()
    ids = torch.randint(61, (2, 330))
    whole, cache, steps, sizes = model(ids).logits, None, [], set()
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
        sizes.add(sum(x.nbytes for layer in cache.layers for x in layer.tensors.values()))
    assert worst(torch.cat(steps, dim=1), whole) < 1e-12
    # sum of w / r slots of keys and of values, in both layers, for two rows.
    slots = 8 + 8 + 8
    assert sizes == {2 * 2 * 2 * slots * 24 * 8} == {2 * model.state_size()}
