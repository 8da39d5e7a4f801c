"""The Block-Recurrent Transformer against its authors' numbers, and against its definition."""

import json
import math

import pytest
import torch
from goldens import SHARED, golden_folder, golden_tensors
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from ways import WAYS, run, worst

from zoo.hub.convert import FORMATS, convert
from zoo.hub.convert.format import Weights
from zoo.hub.convert.meliad import MEMORY_FIELDS, cell_names, tensor_names
from zoo.hub.folder import settings
from zoo.kernels.windowed_attention import attention_step
from zoo.layers.block_attention import distance_buckets
from zoo.layers.recurrent_cell import RecurrentCell, look
from zoo.models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM

# All that there are, here or beside the clone.
GOLDENS = sorted({"brt-meliad-bias-skip", *(p.name for p in SHARED.glob("brt-meliad-*"))})
STATE = "transformer1_recurrent_state_f64"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(name of a golden, dtype) -> its model, converted."""
    folders = {}

    def load(name, dtype):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("converted") / name
            convert("meliad", golden_folder(name), folders[name])
        return AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype).eval()

    return load


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GOLDENS)
def test_logits_and_states(load, name, way):
    golden = golden_tensors(name)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        is_relative = dtype == torch.float32
        for call, length in (("S1", 64), ("S2", 128)):
            ids = golden["input_ids"][:, :length]
            logits, cache = run(load(name, dtype), ids, way)
            official = golden["logits_f64"][:, :length]
            assert worst(logits, official, is_relative) < bound
            states = cache.layers[1].tensors["states_BMD"]
            assert worst(states, golden[f"{call}_{STATE}"], is_relative) < bound


@pytest.mark.parametrize("name", GOLDENS)
def test_gradients_are_the_official_ones(load, name):
    weights = Weights(golden_tensors(name, "grads"))
    # The official ones are of the first of two calls, and stored in float32.
    ids = golden_tensors(name)["input_ids"][:, :64]
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model = load(name, dtype)
        logits = model(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if dtype == torch.float64:
            assert abs(loss.item() - golden_tensors(name)["loss_f64"].item()) < 1e-12
        official = dict(FORMATS["meliad"].read_weights(weights, model.config))
        weights.finish()
        found = dict(model.named_parameters())
        assert official.keys() == found.keys()
        for key, gradient in official.items():
            assert worst(found[key].grad, gradient, relative=True) < bound, key


def cell_config(gate="bias", configuration="skip"):
    """Of the operators' golden."""
    return BlockRecurrentConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=32,
        num_hidden_layers=1,
        sliding_window=10,
        num_states=6,
        gate=gate,
        configuration=configuration,
    )


@pytest.mark.parametrize("configuration", ["skip", "dual", "single"])
@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_the_cell_is_the_official_one(gate, configuration):
    golden, prefix = golden_tensors("ops-brt-cell"), f"{gate}_{configuration}"
    config = cell_config(gate, configuration)
    cell = RecurrentCell(config).double()
    names = {
        theirs: (ours.removeprefix("cell."), is_kernel)
        for ours, theirs, is_kernel in cell_names(config, "cell", f"{prefix}.W.tb")
    }
    assert names.keys() == {key for key in golden if key.startswith(f"{prefix}.W.")}
    parameters = dict(cell.named_parameters())
    with torch.no_grad():
        for theirs, (ours, is_kernel) in names.items():
            x = golden[theirs]
            parameters[ours].copy_(x.mT if is_kernel else x)
    inputs = {key: golden[f"in.{key}"].requires_grad_() for key in ("state", "k_w", "v_w", "q2")}
    state, k_w, v_w, q2 = inputs.values()
    read = cell.keys_values(state)
    found = {"next_state": cell.update(state, read, k_w, v_w), "read": look(q2, *read[1:])}
    loss = 0
    for key, x in found.items():
        assert worst(x, golden[f"{prefix}.{key}"]) < 1e-12
        loss = loss + (x * golden[f"cotangent_{key}"]).sum()
    loss.backward()
    for key, x in inputs.items():
        assert worst(x.grad, golden[f"{prefix}.grad_{key}"]) < 1e-12
    for theirs, (ours, is_kernel) in names.items():
        official = golden[theirs.replace(".W.", ".G.")]
        # Jax's and torch's sums, of some hundred terms.
        official = official.mT if is_kernel else official
        assert worst(parameters[ours].grad, official) < 1e-11, ours


def test_the_window_is_the_official_one():
    golden = golden_tensors("ops-brt-cell")
    leaves = {
        key: golden[f"win.{key}"].requires_grad_() for key in ("q", "k", "v", "bias", "scale")
    }
    q, k, v, bias, scale = leaves.values()
    outputs = []
    for i in range(10):
        # A bias of any kind: it is a matrix there.
        distances = 10 + i - torch.arange(20)
        visible = (distances >= 1) & (distances <= 10)
        outputs.append(
            attention_step(
                q[:, i : i + 1] * scale[:, None],
                k,
                v,
                visible.expand(2, -1),
                scale=1.0,
                sink_logits=torch.full((3,), -1000.0),
                slot_bias=(bias[:, :, i] * scale[:, None]).expand(2, -1, -1),
            )
        )
    y = torch.cat(outputs, dim=1)
    assert worst(y, golden["win.y"]) < 1e-12
    (y * golden["win.cotangent"]).sum().backward()
    for key, x in leaves.items():
        assert worst(x.grad, golden[f"win.grad_{key}"]) < 1e-12, key


@pytest.mark.parametrize("window", [10, 600])
def test_buckets_are_the_official_ones(window):
    official = golden_tensors("ops-brt-cell")[f"t5_bucket_W{window}"][0]
    # Query 0 is W tokens behind key 0; the authors' last W keys are not before it.
    assert torch.equal(distance_buckets(window, 32, 128), official[:window].flip(0))


def test_buckets_on_a_boundary():
    # exact * 16^(k / 16) is whole for k = 4, 8, 12: a rounding down would be another bucket.
    buckets = distance_buckets(300, 32, 256)
    assert [buckets[n - 1].item() for n in (15, 16, 31, 32, 64, 128, 255, 256, 300)] == [
        *(15, 16, 19, 20, 24, 28, 31, 31, 31)
    ]


def small_model(variant="default", seed=0, **fields):
    """A variant in float64 with random weights, all of them large enough to matter."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
    }
    sizes |= BlockRecurrentConfig.variants[variant]
    if (sizes | fields).get("position_embedding_type") != "alibi":
        sizes |= {"num_buckets": 8, "max_distance": 12}
    config = BlockRecurrentConfig(**sizes | {"sliding_window": 7} | fields)
    torch.manual_seed(seed)
    model = BlockRecurrentForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x += 0.3 * torch.randn_like(x)
            if name.endswith("scale"):
                x[0].neg_()  # its sign says nothing
    return model


class Definition:
    """The equations, dense, window by window, for one document: (logits, states by layer).

    Args:
        weights: by name.
        config: of the model.
    """

    def __init__(self, weights, config):
        self.p, self.c = weights, config

    def norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * weight

    def heads(self, x, name, is_unit=True):
        x = (x @ self.p[f"{name}.weight"].T).unflatten(-1, (self.c.num_attention_heads, -1))
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if is_unit else x

    def attention(self, q, k, v, scale, bias=0.0, mask=None, extra=True):
        score, scale = torch.einsum("thk,shk->hts", q, k), self.p[scale].abs()[:, None, None]
        is_scaled = self.c.position_embedding_type == "t5"
        score = (score + bias) * scale if is_scaled else score * scale + bias
        if mask is not None:
            score = score.masked_fill(~mask, -math.inf)
        exp = score.exp()
        p = exp / (exp.sum(-1, keepdim=True) + (math.exp(-1000) if extra else 0))
        return torch.einsum("hts,shv->thv", p, v)

    def bucket(self, distance):
        exact, count = self.c.num_buckets // 2, self.c.num_buckets
        if distance < exact:
            return distance
        part = math.log(distance / exact + 1.2e-7) / math.log(self.c.max_distance / exact)
        return min(exact + int(part * (count - exact)), count - 1)

    def gate(self, name, state, hidden, squash=False):
        y = hidden @ self.p[f"{name}.proj.weight"].T
        y = y.tanh() if squash else y
        if self.c.gate == "bias":
            g = self.p[f"{name}.bias"].sigmoid()
            return state * g + y * (1 - g)

        def linear(part):
            return hidden @ self.p[f"{name}.{part}.weight"].T + self.p[f"{name}.{part}.bias"]

        forget = (linear("keep_gate") + 1).sigmoid()
        if self.c.gate == "full":
            return state * forget + y * (1 - forget)
        return state * forget + y * (linear("input_gate") - 1).sigmoid()

    def read(self, cell, state):
        n = self.norm(state, self.p[f"{cell}.norm_weight"]) + self.p[f"{cell}.position"]
        return n, self.heads(n, f"{cell}.k_proj"), self.heads(n, f"{cell}.v_proj", False)

    def next_state(self, cell, state, k, v):
        n, rk, rv = self.read(cell, state)
        u1 = self.attention(self.heads(n, f"{cell}.q_proj"), rk, rv, f"{cell}.scale")
        u2 = self.attention(self.heads(n, f"{cell}.token_q_proj"), k, v, f"{cell}.token_scale")
        u = torch.cat([u1, u2], dim=1).flatten(1)
        if self.c.configuration == "single":
            hidden = (u @ self.p[f"{cell}.up_proj.weight"].T).relu()
            return self.gate(f"{cell}.mlp_out", state, hidden, squash=True)
        state = self.gate(f"{cell}.out", state, u)
        if self.c.configuration == "dual":
            normed = self.norm(state, self.p[f"{cell}.mlp_norm_weight"])
            hidden = (normed @ self.p[f"{cell}.up_proj.weight"].T).relu()
            state = self.gate(f"{cell}.mlp_out", state, hidden)
        return state

    def recall(self, q, scale, history, start):
        """What the queries of tokens `start` and on find in the keys and values of all before."""
        k, v = history
        size, segment = self.c.memory_size, self.c.memory_segment_length
        count = self.c.memory_neighbors
        results = []
        for n, own in enumerate(q, start):
            first = n // segment * segment
            past = list(range(max(first - size, 0), first))
            score = torch.einsum("hk,mhk->hm", own, k[past]).detach()
            heads = []
            for head in range(len(own)):
                if self.c.memory_selection == "exact":
                    best = sorted(range(len(past)), key=lambda i: -score[head, i])[:count]
                    chosen = [past[i] for i in best]
                else:
                    columns = [
                        [i for i, m in enumerate(past) if m % count == j] for j in range(count)
                    ]
                    best = [max(x, key=lambda i: score[head, i]) if x else None for x in columns]
                    chosen = [None if i is None else past[i] for i in best]
                if not chosen:
                    heads.append(torch.zeros_like(own[head]))
                    continue
                zero = torch.zeros_like(own[head])
                keys = torch.stack([zero if m is None else k[m, head].detach() for m in chosen])
                values = torch.stack([zero if m is None else v[m, head].detach() for m in chosen])
                weights = (keys @ own[head] * self.p[scale][head].abs()).softmax(0)
                heads.append(weights @ values)
            results.append(torch.stack(heads))
        return torch.stack(results)

    def __call__(self, ids):
        c, p, window = self.c, self.p, self.c.sliding_window
        zero = torch.zeros(window, c.num_attention_heads, c.head_dim, dtype=torch.float64)
        before = [(zero, zero)] * c.num_hidden_layers
        history = dict.fromkeys(c.memory_layers, (zero[:0], zero[:0]))
        states = {i: p[f"model.layers.{i}.mixer.cell.initial"] for i in c.recurrent_layers}
        i, j = torch.arange(window)[:, None] + window, torch.arange(2 * window)
        mask = (i - j >= 1) & (i - j <= window)
        buckets = torch.tensor([[self.bucket(max(x, 0)) for x in row] for row in (i - j).tolist()])
        # ALiBi's, of three heads: those of two, and the first between them.
        b = c.alibi_bias_max
        slopes = torch.tensor([2 ** (-b / 2), 2**-b, 2 ** (-b / 4)], dtype=torch.float64)
        logits = []
        for own in ids.split(window):
            x, length = p["model.embed_tokens.weight"][own], len(own)
            feedback = None
            if c.feedback:
                last = c.recurrent_layers[-1]
                feedback = self.read(f"model.layers.{last}.mixer.cell", states[last])[1:]
            for layer in range(c.num_hidden_layers):
                name = f"model.layers.{layer}"
                mixer = f"{name}.mixer"
                a = self.norm(x, p[f"{name}.mixer_norm.weight"])
                q, k = (self.heads(a, f"{mixer}.{part}_proj") for part in "qk")
                v = self.heads(a, f"{mixer}.v_proj", False)
                k2, v2 = (torch.cat(pair) for pair in zip(before[layer], (k, v)))
                if layer in c.memory_layers:
                    bias = 0.0
                elif c.position_embedding_type == "t5":
                    bias = p[f"{mixer}.relative_bias"][:, buckets[:length, : window + length]]
                else:
                    bias = -slopes[:, None, None] * (i - j)[:length, : window + length]
                seen = mask[:length, : window + length]
                y = self.attention(q, k2, v2, f"{mixer}.scale", bias, seen)
                if layer in c.memory_layers:
                    start = len(history[layer][0])
                    history[layer] = [torch.cat(pair) for pair in zip(history[layer], (k, v))]
                    found = self.recall(q, f"{mixer}.scale", history[layer], start)
                    g = p[f"{mixer}.memory.gate"].sigmoid()[:, None]
                    y = (1 - g) * y + g * found
                read = feedback
                if layer in states:
                    read = self.read(f"{mixer}.cell", states[layer])[1:]
                if read is not None:
                    q2 = self.heads(a, f"{mixer}.state_q_proj")
                    y = torch.cat([y, self.attention(q2, *read, f"{mixer}.state_scale")], dim=1)
                if layer in states and length == window:
                    states[layer] = self.next_state(f"{mixer}.cell", states[layer], k2, v2)
                before[layer] = k, v
                x = x + y.flatten(1) @ p[f"{mixer}.out_proj.weight"].T
                up = self.norm(x, p[f"{name}.mlp_norm.weight"]) @ p[f"{name}.mlp.up_proj.weight"].T
                x = x + up.relu() @ p[f"{name}.mlp.down_proj.weight"].T
            h = self.norm(x, p["model.norm.weight"])
            logits.append(h @ p["model.embed_tokens.weight"].T / c.hidden_size**0.5)
        return torch.cat(logits), states


# With several recurrent layers, the last is the one that others read.
ALIBI = {"position_embedding_type": "alibi"}
TWO_SOURCES = {"num_hidden_layers": 4, "recurrent_layers": [0, 2]}
# Comes round three times in 59 tokens, and segments do not divide it.
SMALL_MEMORY = {"memory_size": 12, "memory_neighbors": 4, "memory_segment_length": 5}
WITH_MEMORY = SMALL_MEMORY | {"memory_layers": [1]}


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        *((variant, {}) for variant in BlockRecurrentConfig.variants),
        ("memorizing", SMALL_MEMORY),
        ("memorizing", SMALL_MEMORY | {"memory_layers": [0, 1]}),
        # Columns in which nothing lies yet.
        ("memorizing", SMALL_MEMORY | {"memory_segment_length": 3, "memory_neighbors": 6}),
        ("memorizing-exact", SMALL_MEMORY),
        ("memorizing-exact", SMALL_MEMORY | {"memory_neighbors": 12}),
        ("lstm-dual", WITH_MEMORY),
        ("feedback", WITH_MEMORY | {"memory_layers": [2]}),
        ("alibi", WITH_MEMORY),
        ("feedback", TWO_SOURCES),
        ("feedback", ALIBI),
        ("lstm-dual", ALIBI | {"alibi_bias_max": 4}),
        ("transformer-xl", ALIBI),
    ],
)
def test_definition(variant, fields):
    model = small_model(variant, **fields)
    definition = Definition(dict(model.named_parameters()), model.config)
    ids = torch.randint(61, (2, 59), generator=torch.Generator().manual_seed(1))
    expected, states = zip(*(definition(row) for row in ids))
    expected = torch.stack(expected)
    for way in WAYS:
        logits, cache = run(model, ids, way)
        assert worst(logits, expected, relative=True) < 1e-9
        for layer in model.config.recurrent_layers:
            official = torch.stack([x[layer] for x in states])
            assert worst(cache.layers[layer].tensors["states_BMD"], official, True) < 1e-9
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    names, parameters = zip(*model.named_parameters())
    official = torch.autograd.grad((expected * weight).sum(), parameters)
    found = torch.autograd.grad((model(ids).logits * weight).sum(), parameters)
    for name, ours, theirs in zip(names, found, official, strict=True):
        assert worst(ours, theirs, relative=True) < 1e-9, name


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("default", {}),
        ("feedback", {}),
        ("two-recurrent-layers", {}),
        ("memorizing", SMALL_MEMORY),
        ("memorizing-exact", SMALL_MEMORY),
        ("feedback", WITH_MEMORY | {"memory_layers": [0]}),
    ],
)
def test_windows_are_counted_per_document(variant, fields):
    """In a batch whose rows are padded and whose documents begin in the middle of a pass."""
    model = small_model(variant, **fields)
    definition = Definition(dict(model.named_parameters()), model.config)
    # The last document of the last row begins after one that filled windows, in a later piece.
    rows = [(15, 3, 22), (1, 7, 8, 31), (44,), (20, 25)]
    width = 53
    ids = torch.randint(61, (4, width), generator=torch.Generator().manual_seed(1))
    mask, positions = torch.zeros(2, 4, width, dtype=torch.long)
    for row, (lengths, offset) in enumerate(zip(rows, (4, 0, 9, 1))):
        span = slice(offset, offset + sum(lengths))
        mask[row, span] = 1
        positions[row, span] = torch.cat([torch.arange(n) for n in lengths])
    for sizes in ([width], [20, 1, 32]):
        cache, logits = None, []
        with torch.no_grad():
            for start, piece in zip([0, *torch.tensor(sizes).cumsum(0)], ids.split(sizes, dim=1)):
                end = start + piece.shape[1]
                output = model(
                    piece,
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                logits.append(output.logits)
        logits = torch.cat(logits, dim=1)
        for row, lengths in enumerate(rows):
            visible = mask[row].bool()
            documents = ids[row, visible].split(lengths)
            expected, states = zip(*map(definition, documents))
            assert worst(logits[row, visible], torch.cat(expected), relative=True) < 1e-9
            for layer, official in states[-1].items():
                ours = cache.layers[layer].tensors["states_BMD"][row]
                assert worst(ours, official, relative=True) < 1e-9


@pytest.mark.parametrize("window", [1, 2, 59, 100])
def test_windows_of_other_lengths(window):
    for variant in ("default", "feedback", "transformer-xl"):
        model = small_model(variant, sliding_window=window)
        ids = torch.randint(61, (1, 59), generator=torch.Generator().manual_seed(1))
        expected, _ = Definition(dict(model.named_parameters()), model.config)(ids[0])
        for way in WAYS:
            assert worst(run(model, ids, way)[0][0], expected, relative=True) < 1e-9


def test_states_see_no_token_of_their_window_too_early():
    """Within a window tokens read one state; what the window changes shows in the next."""
    model = small_model(num_hidden_layers=1)
    window = model.config.sliding_window
    ids = torch.randint(61, (1, 3 * window), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 61
    with torch.no_grad():
        changed = (model(ids).logits != model(other).logits).any(-1)[0]
    # One layer: the first token is seen by the W after it, and then through the states alone.
    assert changed.tolist() == [True] * (1 + window) + [True] * (2 * window - 1)
    model.model.layers[0].mixer.cell.v_proj.weight.data.zero_()
    with torch.no_grad():
        changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.tolist() == [True] * (1 + window) + [False] * (2 * window - 1)


def test_hidden_states_with_and_without_feedback_in_one_process():
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    models = [small_model(variant) for variant in ("default", "feedback", "default")]
    for model in models:
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            alone = model(ids[:1, 9:], output_hidden_states=True).hidden_states
            picked = model(ids[:1, 9:], output_hidden_states=[-1]).hidden_states
        assert len(whole) == len(alone) == len(picked) == model.config.num_hidden_layers + 1
        for padded, expected in zip(whole, alone):
            assert worst(padded[:1, 9:], expected, relative=True) < 1e-9
        assert torch.equal(picked[-1], alone[-1]) and picked[1] is None


def meliad_source(folder, model, **fields):
    """A model as meliad's authors would have it, in a folder."""
    folder.mkdir()
    ours = model.state_dict()
    tensors = {
        theirs: (ours[name].mT if is_kernel else ours[name]).contiguous()
        for name, theirs, is_kernel in tensor_names(model.config)
    }
    save_file(tensors, folder / "model.safetensors")
    config = model.config
    theirs = {"window_length": config.sliding_window}
    if config.memory_layers:
        theirs |= {name: getattr(config, own) for name, own in MEMORY_FIELDS.items()}
    fields = theirs | fields
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    "variant",
    [x for x in BlockRecurrentConfig.variants if x not in ("alibi", "memorizing-exact")],
)
def test_every_variant_converts(variant, tmp_path):
    # Theirs have T5's usual distances.
    model = small_model(variant, num_buckets=32, max_distance=128)
    source = meliad_source(tmp_path / "source", model)
    convert("meliad", source, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    before, after = (settings(x.config) for x in (model, back))
    if not model.config.num_states:
        # What states would be like says nothing there.
        for name in ("gate", "configuration"):
            assert after.pop(name) == before.pop(name)
    assert before == after
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


GIN = """
WINDOW_LENGTH = 512
decoder_stack.DecoderStack:
  dstack_window_length = 0
transformer_layer.TransformerLayer:
  window_length = %WINDOW_LENGTH
  relative_position_type = "t5"   # or "fourier"
WINDOW_LENGTH = 7
"""
REFUSED = [
    ({"window_length": None}, "window_length = None, which is not of the right type"),
    ({"num_layers": 3}, "num_layers = 3, the weights have 2"),
    (
        {"recurrent_layer_indices": [-1]},
        r"recurrent_layer_indices = \[-1\], by the weights .*\[0\]",
    ),
    ({"sparse": True}, "does not know: sparse = True"),
    ({"gin": GIN, "window_length": 512}, "window_length = 7; our model computes 512"),
    (
        {"gin": GIN + "transformer_layer.TransformerLayer.relative_position_type = 'rotary'"},
        "relative_position_type = 'rotary'; our model computes 't5'",
    ),
    (
        {"gin": GIN + "transformer_base.MemTransformerBase.normalize_keys = False"},
        "normalize_keys = False; our model computes True",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused_in_one_line(fields, message, tmp_path):
    model = small_model(num_buckets=32, max_distance=128)
    source = meliad_source(tmp_path / "source", model, **fields)
    with pytest.raises(ValueError, match=message) as error:
        convert("meliad", source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_a_gin_text_that_fits(tmp_path):
    model = small_model(num_buckets=32, max_distance=128)
    fields = {"gin": GIN, "num_layers": 2, "recurrent_layer_indices": [-2]}
    convert("meliad", meliad_source(tmp_path / "source", model, **fields), tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recurrent_layers": [2]}, r"different layers of 2, got \[2\]"),
        ({"recurrent_layers": [-1, 1]}, r"different layers of 2, got \[1, 1\]"),
        ({"num_states": 0, "recurrent_layers": [0]}, "leave recurrent_layers out"),
        ({"num_states": 4, "recurrent_layers": []}, "leave recurrent_layers out"),
        ({"num_states": 0, "feedback": True}, "feedback needs a recurrent layer"),
        ({"gate": "gru"}, "gate is one of bias, full, lstm, got 'gru'"),
        ({"configuration": "triple"}, "configuration is one of skip, dual, single"),
        ({"sliding_window": 0}, "sliding_window is at least 1"),
        ({"max_distance": 16}, "max_distance above half of it"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        (ALIBI | {"num_buckets": 16}, "num_buckets is about position_embedding_type 't5', got 16"),
        (ALIBI | {"max_distance": 64}, "max_distance is about position_embedding_type 't5'"),
        ({"alibi_bias_max": 16}, "about position_embedding_type 'alibi', got 16 and 't5'"),
        (ALIBI | {"alibi_bias_max": 0}, "alibi_bias_max is a number above 0, got 0"),
        ({"num_attention_heads": 5, "hidden_size": 24}, "multiple of num_attention_heads"),
        ({"memory_layers": [2]}, r"different layers of 2, got \[2\]"),
        ({"memory_layers": [-1, 1]}, r"different layers of 2, got \[1, 1\]"),
        ({"memory_layers": [-2]}, r"states or a memory, got \[0\] in recurrent_layers and"),
        ({"memory_size": 64}, "memory_size is about memory_layers, got 64 without any"),
        ({"memory_selection": "exact"}, "memory_selection is about memory_layers"),
        ({"memory_layers": [1], "memory_selection": "faiss"}, "memory_selection"),
        ({"memory_layers": [1], "memory_size": 100}, "a multiple of memory_neighbors, got 100 and"),
        (
            {"memory_layers": [1], "memory_size": 100, "memory_selection": "exact"},
            "at least memory_neighbors, got 100 and 128",
        ),
        ({"memory_layers": [1], "memory_segment_length": 0}, "memory_segment_length is at least 1"),
    ],
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        BlockRecurrentConfig(num_hidden_layers=2, **fields)


def test_the_recurrent_layer_is_meliads():
    assert BlockRecurrentConfig(num_hidden_layers=12).recurrent_layers == [9]
    assert BlockRecurrentConfig(num_hidden_layers=12, num_states=0).recurrent_layers == []
