"""Streams longer than the window: what is read at which position, and what is written down."""

import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import streaming
from pretraining.building import load_tokenizer
from pretraining.corpus import load_corpus
from pretraining.measuring import attention_on_sinks, generate_stream, nats_by_position
from pretraining.recipe import Recipe, UsageError
from zoo.models.sliding_window import SlidingWindowConfig, SlidingWindowForCausalLM

WINDOW, SINKS = 8, 2


def tiny_model(num_sinks=SINKS, vocab_size=40):
    torch.manual_seed(0)
    config = SlidingWindowConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=WINDOW,
        num_sink_tokens=num_sinks,
    )
    model = SlidingWindowForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x += 0.5 * torch.randn_like(x)  # so that a distribution is not flat
    return model


class Bigrams:
    """A model that looks at one token, and remembers what it was asked.

    Attributes:
        calls: of each forward pass, its ids [B, T] and how many of its rows it had seen before.
    """

    def __init__(self, vocab_size):
        self.logits_VV = torch.randn(vocab_size, vocab_size)
        self.calls = []

    def __call__(self, ids_BT, past_key_values, use_cache):
        seen = past_key_values or 0
        self.calls.append((ids_BT, seen))
        cache = seen + ids_BT.shape[1]
        return SimpleNamespace(logits=self.logits_VV[ids_BT], past_key_values=cache)


@pytest.mark.parametrize("piece", [1, 4, 5, 100])
def test_each_bin_reads_the_whole_text_once(piece):
    model = Bigrams(31)
    nats_by_position(model, torch.arange(31), width=6, num_positions=48, rows=2, piece=piece)
    reads, streams = Counter(), {}
    for ids_BT, seen in model.calls:
        streams[seen] = torch.cat([streams[seen], ids_BT]) if seen in streams else ids_BT
    stream_BT = torch.cat([streams[seen] for seen in sorted(streams)], dim=1)
    assert stream_BT.shape == (5, 48)
    assert stream_BT[:, 0].tolist() == [0, 6, 12, 18, 24]
    assert torch.equal(stream_BT[:, 1:], (stream_BT[:, :-1] + 1) % 30)  # the last token is left out
    for row in stream_BT.tolist():
        reads.update((position // 6, token) for position, token in enumerate(row))
    assert reads == {(bin, token): 1 for bin in range(8) for token in range(30)}


def test_a_model_without_memory_finds_all_bins_equal():
    model, ids = Bigrams(40), torch.randint(40, (200,))
    nats = nats_by_position(model, ids, width=25, num_positions=300, piece=13)
    assert torch.equal(nats, nats[:1].expand(12))
    expected = cross_entropy(model.logits_VV[ids].double(), ids.roll(-1))
    assert nats[0].item() == pytest.approx(expected.item(), rel=1e-6)  # of float32 logits


def test_pieces_give_the_loss_of_one_pass():
    model, ids = tiny_model().double(), torch.randint(40, (24,))
    found = nats_by_position(model, ids, 6, 60, rows=3, piece=7)
    index_BT = (6 * torch.arange(4)[:, None] + torch.arange(61)) % 24
    whole_BT, targets_BT = ids[index_BT[:, :-1]], ids[index_BT[:, 1:]]
    with torch.no_grad():
        logits = model(whole_BT, use_cache=False).logits
    nats_BT = cross_entropy(logits.mT, targets_BT, reduction="none")
    expected = nats_BT.unflatten(1, (10, 6)).mean((0, 2))
    assert (found - expected).abs().max() < 1e-12  # float64


def test_the_state_keeps_its_size_while_generating():
    model = tiny_model()
    ids, records = generate_stream(model, 3, 150, seed=1)
    assert len(ids) == 150 and records[-1]["tokens"] == 150
    assert {1, 10, 100} <= {record["tokens"] for record in records}
    assert {record["state_bytes"] for record in records} == {model.state_size()}
    stream = torch.tensor([3, *ids])
    with torch.no_grad():
        logits = model(stream[None, :-1], use_cache=False).logits[0]
    before = 0
    for record in records:
        part = slice(before, record["tokens"])
        nats = cross_entropy(logits[part], stream[1:][part]).item()
        # The model is float32, run in another order.
        assert record["nats_per_token"] == pytest.approx(nats, rel=1e-4)
        assert record["largest_logit"] == pytest.approx(logits[part].abs().max().item(), rel=1e-4)
        before = record["tokens"]
    assert generate_stream(model, 3, 150, seed=1)[0] == ids
    assert generate_stream(model, 3, 150, seed=2)[0] != ids


def test_equal_attention_gives_sinks_their_number():
    model, ids = tiny_model(), torch.randint(40, (100,))
    before = model(ids[None]).logits
    shares = attention_on_sinks(model, ids)
    assert torch.tensor(shares).shape == (2, 2) and shares[0][0] != shares[0][1]
    assert torch.equal(model(ids[None]).logits, before)
    assert not any("attend" in vars(layer.mixer) for layer in model.model.layers)
    for layer in model.model.layers:
        layer.mixer.q_proj.weight.data.zero_()
    expected = SINKS / (SINKS + WINDOW)
    assert torch.tensor(attention_on_sinks(model, ids)) == pytest.approx(expected, rel=1e-5)


def test_a_logit_that_is_no_number_is_seen():
    model = tiny_model()

    def broken(ids_BT, past_key_values, use_cache):
        output = model(ids_BT, past_key_values=past_key_values, use_cache=use_cache)
        seen = output.past_key_values.get_seq_length()
        # Not where a token could be drawn from it, which torch would refuse by itself.
        output.logits[..., 0] = -math.inf if seen == 7 else output.logits[..., 0]
        return output

    records = generate_stream(broken, 3, 20, seed=1)[1]
    finite = {r["tokens"]: math.isfinite(r["largest_logit"]) for r in records}
    assert not finite[7] and finite[6] and finite[8]


@pytest.fixture
def run(tmp_path):
    """The folder of a run that pretrain.py could have left."""
    tokenizer = load_tokenizer("tokenizers/byte")
    (tmp_path / "text.txt").write_text("".join(f"line {n} of {n * n}\n" for n in range(400)))
    recipe = Recipe(
        "run",
        "sliding_window",
        data=str(tmp_path / "text.txt"),
        held_out=0.5,
        output_dir=str(tmp_path),
    )
    corpus = load_corpus(recipe, tokenizer, tmp_path / ".corpus")
    folder = tmp_path / "run"
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"recipe": vars(recipe), "corpus": corpus.record, "results": {"step": 5}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


SMALL = "--text 1000 --width 100 --positions 300 --near 100 --far 200 --generate 50".split()


def test_what_is_written(run, tmp_path):
    streaming.start([str(run), *SMALL, "--beside", str(run), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/streaming.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out/streaming.json").read_text()
    assert str(tmp_path) not in text.replace(str(tmp_path / "text.txt"), "")
    result = json.loads(text)
    curves = result["curves"]
    assert curves["sinks"] == curves["beside"]
    sinks, evicted = (curves[name]["early"]["perplexity"] for name in ("sinks", "evicted"))
    # Bins of half a window: while it fills, nothing has been evicted.
    assert sinks[:2] == pytest.approx(evicted[:2], rel=1e-6) and sinks[2:] != evicted[2:]
    late = curves["sinks"]["late"]
    assert len(late["perplexity"]) == 3 and late["width"] == 100
    ratio = late["perplexity"][2] / late["perplexity"][1]
    assert curves["sinks"]["compared"]["ratio"] == pytest.approx(ratio)
    bits = math.log2(late["perplexity"][1]) * 1.002  # a boundary more than bytes, at each end
    assert late["bits_per_byte"][1] == pytest.approx(bits, rel=2e-3)
    assert result["token"] == "byte" and result["text_tokens"] == 1000
    assert result["generation"]["is_finite"]
    assert {r["state_bytes"] for r in result["generation"]["records"]} == {
        result["generation"]["state_size"]
    }


def message(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["streaming.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        streaming.main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1
    return errors


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    def error(*arguments):
        return message(capsys, monkeypatch, *arguments)

    assert "expected a finished run" in error(tmp_path)
    assert "make the streams longer" in error(run, *SMALL, "--far", 300)
    assert "at least one token" in error(run, *SMALL, "--generate", 0)
    assert "multiple of the bin's width" in error(run, *SMALL, "--positions", 301)
    assert "at least two bins" in error(run, *SMALL, "--text", 199)
    record = json.loads((run / "run.json").read_text())
    record["corpus"]["sha256"] = "0"
    (run / "run.json").write_text(json.dumps(record))
    assert "not the text" in error(run, *SMALL)
    tiny_model(0, vocab_size=259).save_pretrained(run)
    assert "has no sinks" in error(run, *SMALL)
    with pytest.raises(UsageError, match="multiple"):
        nats_by_position(Bigrams(3), torch.arange(3), 0, 4)
