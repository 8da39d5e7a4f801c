"""Landmark attention against its authors' code for LLaMA.

In the first layer the landmarks of all blocks are one embedding: blocks that are no longer among
the last K have the same score, bit for bit, and which of them the authors' code reads is what
torch.topk happens to give. Here the first are read; the goldens of retrieval are compared with
their choice in the place of ours, and then agree in all layers.
"""

import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from ways import run, worst

from zoo import LandmarkConfig
from zoo.hub.convert import convert, convert_back
from zoo.hub.convert.format import llama_names
from zoo.hub.convert.landmark_llama import FORMAT
from zoo.layers import landmark_softmax

GOLDEN = "landmark-llama"
BLOCK = 6
WAYS = ("whole", "chunks", "token by token", "left padding", "packed")
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "block_length": 5,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "ours"
    convert(GOLDEN, golden_folder(GOLDEN), folder)
    return folder


@pytest.fixture(scope="module")
def load(converted):
    def load(**fields):
        return AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float64, **fields).eval()

    return load


def text_of(golden):
    """The ids without landmarks, and where they stand with them."""
    is_text = golden["input_ids"][0] != 63
    return golden["input_ids"][:, is_text], is_text.nonzero()[:, 0]


@torch.no_grad()
def logits_of(model, ids, way):
    if way == "packed":
        lengths = torch.tensor([ids.shape[1]] * len(ids))
        bounds = pad(lengths.cumsum(0), (1, 0))
        return model(ids.reshape(1, -1), cu_seq_lens_q=bounds).logits.view(*ids.shape, -1)
    if way == "chunks":
        cache, logits = None, []
        for chunk in ids.split([1, 7, 25, 3, 10], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        return torch.cat(logits, dim=1)
    return run(model, ids, way)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("landmarks_predict", [True, False])
def test_all_blocks(load, way, landmarks_predict):
    golden = golden_tensors(GOLDEN)
    ids, place = text_of(golden)
    if landmarks_predict:
        place = place + (place % (BLOCK + 1) == BLOCK - 1)
    logits = logits_of(load(landmark_predicts_next=landmarks_predict), ids, way)
    assert worst(logits, golden["logits_f64"][:, place]) < 1e-9


def as_topk_takes_them(scores_BGRQM, block_BQ, count, has_ties):
    """The authors' choice: torch.topk of the scores of just so many blocks as come before."""
    chosen = scores_BGRQM.new_zeros(*scores_BGRQM.shape[:-1], count, dtype=torch.long)
    for row, blocks in enumerate(block_BQ.expand(len(scores_BGRQM), -1).tolist()):
        for query, block in enumerate(blocks):
            best = scores_BGRQM[row, :, :, query, :block].topk(min(block, count)).indices
            chosen[row, :, :, query, : best.shape[-1]] = best
    return chosen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3])
def test_retrieval(load, monkeypatch, count, way):
    monkeypatch.setattr(landmark_softmax, "choose", as_topk_takes_them)
    golden = golden_tensors(GOLDEN)
    ids, place = text_of(golden)
    model = load(landmark_predicts_next=False, retrieved_blocks=count)
    logits = logits_of(model, ids, way)
    assert worst(logits, golden[f"logits_top{count}_f64"][:, place]) < 1e-9


@pytest.mark.parametrize("count", [1, 3])
def test_our_choice_is_the_same_in_all_ways(load, count):
    ids, _ = text_of(golden_tensors(GOLDEN))
    model = load(retrieved_blocks=count)
    expected = logits_of(model, ids, "whole")
    for way in WAYS[1:]:
        assert worst(logits_of(model, ids, way), expected) < 1e-12


def test_retrieving_all_is_training(load):
    ids, _ = text_of(golden_tensors(GOLDEN))
    expected = logits_of(load(), ids, "whole")
    assert worst(logits_of(load(retrieved_blocks=7), ids, "whole"), expected) < 1e-12
    assert worst(logits_of(load(retrieved_blocks=6), ids, "whole"), expected) > 1e-3


def test_pieces_of_queries_change_nothing(load, monkeypatch):
    """Scores a few at a time, and again in backward."""
    ids, _ = text_of(golden_tensors(GOLDEN))
    for fields in ({}, {"retrieved_blocks": 2}):
        results = []
        for most in (1 << 23, 3000):
            monkeypatch.setattr(landmark_softmax, "MOST_SCORES", most)
            model = load(**fields)
            logits = model(ids).logits
            logits.square().mean().backward()
            results.append([logits, *(p.grad for p in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert worst(one, other, relative=True) < 1e-10


def test_there_and_back(converted, tmp_path):
    report = convert_back(GOLDEN, converted, tmp_path / "back")
    assert not report.notes
    theirs = golden_tensors(GOLDEN, "model")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], x) for name, x in theirs.items())
    values = json.loads((tmp_path / "back/config.json").read_text())
    expected = json.loads((golden_folder(GOLDEN) / "config.json").read_text())
    del expected["train_context_length"]
    assert expected.items() <= values.items()


def test_what_is_no_whole_model_is_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden_folder(GOLDEN), source)
    (source / "checksum_psum.txt").write_text("1.0")
    with pytest.raises(ValueError, match="checksum_psum.txt, as a difference .* weight_diff.py"):
        convert(GOLDEN, source, tmp_path / "ours")
    (source / "checksum_psum.txt").unlink()
    tensors = golden_tensors(GOLDEN, "model")
    tensors["model.norm.weight"] *= 1e-3
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is near 0, as a difference"):
        convert(GOLDEN, source, tmp_path / "ours")


def test_what_theirs_has_not_is_not_written():
    for fields, words in (
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"gated_mlp": False}, "gated_mlp is False"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters is"),
    ):
        with pytest.raises(ValueError, match=words):
            FORMAT.write_config(LandmarkConfig(**SMALL, **fields))
    _, notes = FORMAT.write_config(LandmarkConfig(**SMALL, retrieved_blocks=3))
    assert "pass cache_top_k = 3" in notes[0]


def test_loss_and_gradients_are_the_authors(load):
    """Landmarks are targets too, of the mean over all that is predicted."""
    golden, theirs = golden_tensors(GOLDEN), golden_tensors(GOLDEN, "grads")
    ids, _ = text_of(golden)
    model = load()
    model.include_landmark_in_loss = True
    loss = model(ids, labels=ids).loss
    assert worst(loss, golden["loss_f64"]) < 1e-6  # transformers' loss is in float32
    loss.backward()
    names = {theirs: ours for ours, theirs in llama_names(model.config)}
    assert names.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert worst(model.get_parameter(names[name]).grad, expected, relative=True) < 1e-5, name


def test_landmarks_are_targets_where_that_can_be(load):
    ids, _ = text_of(golden_tensors(GOLDEN))
    model = load(landmark_predicts_next=False)
    model.include_landmark_in_loss = True
    with pytest.raises(ValueError, match="needs landmark_predicts_next = True"):
        model(ids, labels=ids)
    model = load()
    model.include_landmark_in_loss, model.z_loss = True, 0.1
    with pytest.raises(ValueError, match="no z-loss, got .* z_loss = 0.1"):
        model(ids, labels=ids)
    # A document that ends with its block has no target behind it, and padding none.
    model.z_loss = 0.0
    whole = model(ids[:, :12], labels=ids[:, :12]).loss
    padded, mask = pad(ids[:, :12], (3, 2)), pad(torch.ones_like(ids[:, :12]), (3, 2))
    labels = torch.where(mask.bool(), padded, -100)
    labels[:, 3] = -100  # nothing predicts it
    found = model(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, whole)
    model.include_landmark_in_loss = False
    plain = model(ids[:, :12], labels=ids[:, :12]).loss
    assert abs(plain - whole) > 1e-4
