"""Held-out loss of the same targets from contexts of several lengths."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401
from pretraining import comparing
from pretraining.comparing import bits_per_byte_by_context
from pretraining.corpus import Tokens
from pretraining.recipe import Recipe, UsageError

LENGTHS = [16, 4, 8]


class OneOf:
    """An accelerator of one process of several."""

    device = torch.device("cpu")

    def __init__(self, rank=0, world=1):
        self.process_index, self.num_processes = rank, world

    def unwrap_model(self, model, **options):
        return model

    def reduce(self, tensor, how):
        return tensor.clamp(min=1)  # nothing may be left to this one


def watched(monkeypatch, rank=0, world=1, packing="concat", num_tokens=100):
    """What a process scores: (input ids, positions, targets) by length of the windows."""
    seen = {length: [] for length in LENGTHS}

    def look(model, inputs, targets):
        positions = inputs.get("position_ids", torch.zeros_like(inputs["input_ids"]))
        rows = zip(inputs["input_ids"].tolist(), positions.tolist(), targets.tolist())
        seen[inputs["input_ids"].shape[1]].append(list(rows))
        return torch.full(targets.shape, 2.0)

    monkeypatch.setattr(comparing, "target_nats", look)
    tokens = Tokens(np.arange(num_tokens, dtype=np.uint16), np.array([0, 10, 27]), 50)
    nobody = SimpleNamespace(eval=lambda: None, train=lambda: None)
    options = nobody, tokens, LENGTHS, 32, packing
    return seen, bits_per_byte_by_context(OneOf(rank, world), *options)


def test_the_targets_are_the_same_for_every_length(monkeypatch):
    seen, found = watched(monkeypatch)
    # The last 4 of each window of 16, of which six fit into 99 targets.
    expected = [list(range(end - 3, end + 1)) for end in range(16, 97, 16)]
    for length in LENGTHS:
        rows = [row for batch in seen[length] for row in batch]
        assert [targets for _, _, targets in rows] == expected
        for ids, _, targets in rows:
            assert ids == list(range(targets[-1] - length, targets[-1]))
        assert max(len(batch) for batch in seen[length]) == min(6, 32 // length)
    # Every target has 2 nats, and 99 of them stand for 50 bytes.
    assert found == pytest.approx(dict.fromkeys(LENGTHS, 2 / np.log(2) * 99 / 50))
    assert list(found) == LENGTHS


@pytest.mark.parametrize("num_tokens", [17, 65, 100])
def test_processes_share_the_targets(monkeypatch, num_tokens):
    whole, _ = watched(monkeypatch, num_tokens=num_tokens)
    parts = [watched(monkeypatch, rank, 2, num_tokens=num_tokens)[0] for rank in (0, 1)]
    for length in LENGTHS:
        assert len(parts[0][length]) == len(parts[1][length])  # as many rounds, for shards
        rows = [row for part in parts for batch in part[length] for row in batch]
        scored = [row for row in rows if row[2] != [-100] * 4]
        assert sorted(scored) == [row for batch in whole[length] for row in batch]


def test_documents_are_kept_apart_as_in_training(monkeypatch):
    seen, _ = watched(monkeypatch, packing="documents")
    (first, second), *_ = seen[16]
    assert first[1] == [*range(10), *range(6)]
    assert second[1] == [*range(11), *range(5)]


def test_of_a_run(in_process, workshop):
    options = ["--steps", "26", "--eval_every", "0", "--eval_contexts", "[8, 64]"]
    assert in_process(*options).returncode == 0
    folder = workshop.folder / "tiny"
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    (cache,) = (workshop.folder / "c").glob("*/corpus.json")
    record = json.loads(cache.read_text())["held_out"]
    ids = torch.from_numpy(np.fromfile(cache.parent / "held_out.bin", np.uint16).astype("int64"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for length in (8, 64):
        nats = []
        for end in range(64, len(ids), 64):
            with torch.no_grad():
                log_p = model(ids[None, end - length : end]).logits[0].log_softmax(-1)
            nats += (-log_p[-8:].gather(1, ids[end - 7 : end + 1, None])).flatten().tolist()
        bits = np.mean(nats) / np.log(2) * (record["tokens"] - 1) / record["bytes"]
        assert line[f"bits_per_byte_in_context/{length}"] == pytest.approx(bits, rel=1e-5)
    assert in_process("--resume", *options[:-1], "[8]").returncode == 0  # it is free to change
    result = in_process("--name", "long", *options[:-1], "[8, 2000]")
    assert result.returncode == 2 and not (workshop.folder / "long/metrics.jsonl").exists()
    assert "eval_contexts are at most 10" in result.stderr and "got 2000" in result.stderr


def test_lengths_that_a_model_does_not_have():
    table = SimpleNamespace(num_embeddings=32)
    model = SimpleNamespace(base_model=SimpleNamespace(embed_positions=table))
    for key in ("eval_lengths", "eval_contexts"):
        recipe = Recipe("x", "longnet", **{key: [8, 64]})
        with pytest.raises(UsageError, match=f"{key} are at most 32 tokens, the .* got 64"):
            comparing.check_lengths(recipe, model, None)
        with pytest.raises(UsageError, match=rf"{key} are numbers of tokens, got \[0\]"):
            Recipe("x", "longnet", **{key: [0]})
