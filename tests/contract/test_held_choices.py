"""Models that choose some of many: compared where their choices agree, and the choices counted."""

import pytest
import torch

from zoo import MODELS
from zoo.contract import Subject, run
from zoo.contract.held_choices import HeldChoices, choices_in
from zoo.contract.subject import TINY
from zoo.core.choice import Choice

RetNetForCausalLM = MODELS["retnet"].causal_lm
HEADS, LENGTH = 64, 41


class TakesOneOfTwo(RetNetForCausalLM):
    """Every token takes one of two vectors per head, by scores that feel how long the pass is.

    They do so by rounding alone. One token has two scores in one head that are the same but for
    1e-9.
    """

    faults = 0.0

    def __init__(self, config):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        score_VH2 = torch.randn(config.vocab_size, HEADS, 2, generator=generator).double()
        score_VH2[7, 3] = torch.tensor([1.0 + 1e-9, 1.0], dtype=torch.float64)
        self.register_buffer("score", score_VH2, persistent=False)
        self.value = torch.nn.Parameter(torch.randn(HEADS, 2, config.hidden_size))
        self.choice = Choice()

    def forward(self, input_ids, past_key_values=None, **kwargs):
        length = input_ids.shape[1]
        clock = torch.arange(length) + (past_key_values.get_seq_length() if past_key_values else 0)
        score = self.score[input_ids]
        rounding = torch.finfo(score.dtype).eps * (length < LENGTH)
        index = (score + torch.tensor([0.0, rounding], dtype=score.dtype)).argmax(-1)
        if length == 1:
            index = torch.where(torch.rand(index.shape) < self.faults, 1 - index, index)
        rows = torch.arange(len(input_ids))[:, None]
        index = self.choice(index[..., None], lambda: (rows, clock))[..., 0]
        embeds = self.get_input_embeddings()(input_ids)
        embeds = embeds + 0.03 * self.value[torch.arange(HEADS), index].sum(2)
        return super().forward(inputs_embeds=embeds, past_key_values=past_key_values, **kwargs)


class Unseen(torch.nn.Module):
    """What a choice is not let through."""

    def forward(self, index, where):
        return index


class TakesItUnseen(TakesOneOfTwo):
    """The same without a place to look at the choice."""

    def __init__(self, config):
        super().__init__(config)
        self.choice = Unseen()


class SearchesBadly(TakesOneOfTwo):
    """A step of a single token takes the other one in a case of fifty, in float32."""

    @property
    def faults(self):
        return 0.02 if self.score.dtype == torch.float32 else 0.0


def subject(cls):
    config = MODELS["retnet"].config(**TINY)

    def build(seed):
        torch.manual_seed(seed)
        return cls(config)

    result = Subject(cls.__name__, build)
    exact = TakesOneOfTwo(config).score
    ids = result.ids(2, LENGTH)
    ids[0, 20] = 7
    result.ids = lambda *shape, seed=0: ids[: shape[0], : shape[1]]
    model = result.model

    def with_scores(dtype=torch.float64, seed=0):
        # Those in float32 are what is left of these.
        built = model(dtype, seed)
        built.score = exact.to(dtype)
        return built

    result.model = with_scores
    return result


@pytest.fixture(autouse=True)
def fewer_pieces(monkeypatch):
    """Point 1 in the pieces that this is about."""
    pieces = {"token by token": (1,), "in pieces of 13": (13,)}
    monkeypatch.setattr("zoo.contract.points_sequence.PIECES", pieces)
    monkeypatch.setattr("zoo.contract.points_sequence.LENGTHS", (1, LENGTH))


def failed(cls):
    return [check.name for check in run(subject(cls), [1]).failed()]


def test_results_are_compared_where_the_choices_agree():
    assert failed(TakesOneOfTwo) == []


def test_a_choice_that_nobody_sees_fails_by_its_ties():
    names = failed(TakesItUnseen)
    assert names and all("fp32" in name for name in names)


def test_a_wrong_search_shows_though_others_choose_for_it():
    names = failed(SearchesBadly)
    ways = "token by token", "token by token, no gradients"
    assert names == [f"{way}, fp32: share of choices made otherwise" for way in ways]


@pytest.mark.parametrize("sizes", [(LENGTH,), (1,), (20, 21)])
def test_what_is_held_is_what_is_chosen(sizes):
    """However the text is cut."""
    one = subject(TakesOneOfTwo)
    model, ids = one.model(), one.ids(2, LENGTH)
    held = HeldChoices(model, lambda model: one.forward(model, ids))
    assert list(choices_in(model)) == ["choice"]
    (table,) = held.tables.values()
    assert table.shape == (2, LENGTH, HEADS, 1) and (table >= 0).all()
    held.tables["choice"] = 1 - table
    pieces = LENGTH // sizes[0] * [sizes[0]] if len(sizes) == 1 else list(sizes)
    with torch.no_grad():
        expected = one.run(model, ids)[0]
        with held.given_to(model):
            other = one.run(model, ids, pieces)[0]
        assert held.share_made_otherwise() == 1.0
        assert (other - expected).abs().max() > 1e-4
        held.tables["choice"] = table
        with held.given_to(model):
            same = one.run(model, ids, pieces)[0]
    assert held.share_made_otherwise() == 0.0 and (same - expected).abs().max() < 1e-12
