"""Layers with a memory of earlier segments against their definition, token by token in Python."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from zoo import LongLlamaConfig, LongLlamaForCausalLM
from zoo.layers import focused_pass
from zoo.layers.chosen_keys import choose, indices_of
from zoo.layers.cross_batch import train_across_batch
from zoo.layers.focused_attention import FocusedAttention

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.5,
    "memory_layers": [0, 1],
}
OPTIONS = {
    "all": {},
    "a ring": {"memory_windows": 2},
    "top-k": {"memory_top_k": 3},
    "a ring and top-k": {"memory_windows": 2, "memory_top_k": 3},
}


def make(length=6, **options):
    torch.manual_seed(0)
    config = LongLlamaConfig(**SIZES | {"segment_length": length} | options)
    return LongLlamaForCausalLM(config).double().eval()


def ids_of(*lengths, seed=1):
    torch.manual_seed(seed)
    return [torch.randint(1, 50, (1, length)) for length in lengths]


def defined(self, x_BTD, sequence, state, rotation, table):
    """FocusedAttention.forward as its docstring has it, for one document."""
    q_THK, k_TGK, v_TGV = (x[0] for x in self.project(x_BTD))
    cos, sin = (x[:, 0] for x in table)

    def turned(x_K, clock):
        a, b = x_K.chunk(2)
        c, s = cos[clock % self.length], sin[clock % self.length]
        return torch.cat([a * c - b * s, b * c + a * s])

    rows = []
    for n in range(len(q_THK)):
        begin = n // self.length * self.length
        oldest = 0 if self.windows is None else max(0, begin - self.windows * self.length)
        heads = []
        for head in range(self.num_heads):
            group, q_K = head // (self.num_heads // self.num_groups), turned(q_THK[n, head], n)
            far = [(q_K @ k_TGK[m, group] * self.scale, m) for m in range(oldest, begin)]
            if self.top_k is not None:
                far = sorted(far, key=lambda pair: -pair[0].item())[: self.top_k]
            near = [(q_K @ turned(k_TGK[m, group], m) * self.scale, m) for m in range(begin, n + 1)]
            scores, numbers = zip(*far, *near)
            heads.append(torch.stack(scores).softmax(0) @ v_TGV[list(numbers), group])
        rows.append(torch.cat(heads))
    return self.out_proj(torch.stack(rows)[None]), state


@pytest.fixture
def expected(monkeypatch):
    """(model, documents) -> the logits of each, by the definition."""

    def expected(model, documents):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(FocusedAttention, "forward", defined)
            return [model(ids, use_cache=False).logits[0] for ids in documents]

    return expected


def close(found, expected):
    return (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("queries", [4, 16, 256])  # of a call: parts of segments, and several
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_definition(options, queries, expected, monkeypatch):
    """Rows whole and in pieces, at different clocks, and a stream that goes on from a state."""
    monkeypatch.setattr(focused_pass, "MASKED_QUERIES", queries)
    model, documents = make(**OPTIONS[options]), ids_of(41, 29, 17, 5)
    whole = expected(model, documents)
    for ids, logits in zip(documents, whole, strict=True):
        assert close(model(ids, use_cache=False).logits[0], logits)
        cache, found = None, []
        for piece in ids.split(7, dim=1):  # ends inside of segments, and takes up to three
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
        assert close(torch.cat(found), logits)
    # Padded on the left: each row is at a clock of its own from the second piece on.
    width = documents[0].shape[1]
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, width - document.shape[1] :], mask[row, width - document.shape[1] :] = document, 1
    cache, found, start = None, [], 0
    for size in (13, 19, 8, 1):
        columns = slice(start, start + size)
        output = model(
            ids[:, columns], mask[:, : start + size], past_key_values=cache, use_cache=True
        )
        cache, start = output.past_key_values, start + size
        found.append(output.logits)
    found = torch.cat(found, dim=1)
    for row, logits in enumerate(whole):
        assert close(found[row, width - len(logits) :], logits)
    # Packed: the second piece goes on in the middle of a document, and begins two.
    stream = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    cache, found = None, []
    for columns in (slice(27), slice(27, 75), slice(75, None)):
        piece = {"input_ids": stream[:, columns], "position_ids": positions[:, columns]}
        output = model(**piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    assert close(torch.cat(found), torch.cat(whole))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_definition(options, monkeypatch):
    model, (ids,) = make(**OPTIONS[options]), ids_of(33)
    found = torch.autograd.grad(model(ids).logits.square().sum(), [*model.parameters()])
    monkeypatch.setattr(FocusedAttention, "forward", defined)
    wanted = torch.autograd.grad(
        model(ids, use_cache=False).logits.square().sum(), [*model.parameters()]
    )
    assert all(close(x, y) for x, y in zip(found, wanted, strict=True))


@torch.no_grad()
def test_no_mask_where_rows_are_equally_far(monkeypatch):
    """One call for each segment, causal at the lower right, of the keys there are and no others."""
    monkeypatch.setattr(focused_pass, "MASKED_QUERIES", 1)
    sizes = []

    def note(self, q_NQHK, k_NSGK, v_NSGV):
        sizes.append((q_NQHK.shape[1], k_NSGK.shape[1]))
        return q_NQHK

    monkeypatch.setattr(focused_pass.FocusedPass, "attend_causally", note)
    model, (ids,) = make(memory_layers=[1]), ids_of(40)
    cache = model(ids[:, :16], use_cache=True).past_key_values
    model(ids[:, 16:], past_key_values=cache)
    assert sizes == [(6, 6), (6, 12), (6, 18), (2, 18), (6, 24), (6, 30), (6, 36), (6, 42)]
    sizes.clear()
    model = make(memory_layers=[1], memory_windows=1)
    cache = model(ids[:, :16], use_cache=True).past_key_values
    model(ids[:, 16:], past_key_values=cache)
    assert sizes == [(6, 6), (6, 12), (6, 12), (2, 12), (6, 12), (6, 12), (6, 12), (6, 12)]


def test_of_equal_scores_the_first_are_chosen():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0, 1.0], [-torch.inf, 5.0, *[-torch.inf] * 4]])
    chosen = [choose(scores, count) for count in (2, 4, 5, 9)]
    numbers = [indices_of(x, 5).tolist() for x in chosen]
    assert numbers[0] == [[0, 2, -1, -1, -1], [1, -1, -1, -1, -1]]
    assert numbers[1] == [[0, 2, 3, 4, -1], [1, -1, -1, -1, -1]]
    assert numbers[2] == [[0, 1, 2, 3, 4], [1, -1, -1, -1, -1]]
    assert numbers[3] == [[0, 1, 2, 3, 4], [1, -1, -1, -1, -1]]  # as many as are asked for


def test_bytes_by_formula():
    """2 T G K of a layer with a memory, 2 L G K of one without, a ring 2 (C + 1) L G K."""
    (ids,) = ids_of(40)
    for options, tokens in (({}, 40), ({"memory_windows": 2}, 18)):
        model = make(memory_layers=[1], **options)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        held = [sum(x.nbytes for x in layer.tensors.values()) for layer in cache.layers]
        assert held == [2 * 6 * 2 * 8 * 8, 2 * tokens * 2 * 8 * 8]
        assert model.state_size(40) == sum(held)
        assert model.has_constant_state == bool(options)


def test_crossbatch_is_training_alone():
    """Without negatives it is the model; with them rows hear of each other, and not afterwards."""
    model, ids = make(), torch.cat(ids_of(24, 24))
    alone, changed = model(ids).logits, ids.clone()
    changed[0] = ids[0].flip(0)
    train_across_batch(model, 3)
    assert torch.equal(model(ids).logits, alone)  # in use
    model.train()
    trained, other = model(ids).logits, model(changed).logits
    assert close(trained[0], alone[0])  # the first row has nothing before it, and 3 windows of 4
    assert not close(trained[1], alone[1])
    assert not torch.equal(trained[1], other[1])
    train_across_batch(model, 1, stepping=False)
    short = ids[:1, :12]
    assert close(model(short).logits, model.eval()(short).logits)
    with pytest.raises(ValueError, match="takes whole texts"):
        model.train()(ids, past_key_values=model(ids[:, :2], use_cache=True).past_key_values)
    train_across_batch(model, None)
    assert close(model(ids).logits, alone)
    for reach, what in ((0, model), (1, make(memory_layers=[]))):
        with pytest.raises(ValueError, match="cross_batch_range"):
            train_across_batch(what, reach)


REFUSED = {
    "a layer that is not there": ({"memory_layers": [2]}, "from 0 to 1"),
    "a layer twice": ({"memory_layers": [1, 1]}, "different"),
    "no windows": ({"memory_windows": 0}, "at least 1"),
    "no keys": ({"memory_top_k": 0}, "at least 1"),
    "no segment": ({"segment_length": 0}, "at least 1"),
    "a ring of nothing": ({"memory_layers": [], "memory_windows": 2}, "leave them out"),
    "odd heads": ({"head_dim": 7}, "even"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        LongLlamaConfig(**SIZES | fields)
