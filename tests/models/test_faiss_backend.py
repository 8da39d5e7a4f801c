"""The chosen keys of a memory by faiss: all that is exact, its recall where it is not, refusals."""

import copy
import sys

import pytest
import torch
from test_focused_attention import ids_of, make

from zoo.kernels.faiss_backend import recall_of, search_with_faiss

faiss = pytest.importorskip("faiss")
TOP_K = {"memory_top_k": 5}


def decode(model, ids, prompt=20):
    """Logits of what follows a prompt, token by token."""
    with torch.no_grad():
        cache, logits = model(ids[:, :prompt], use_cache=True).past_key_values, []
        for column in ids[:, prompt:].split(1, dim=1):
            output = model(column, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_an_exact_index_is_exact_search():
    """From any length of memory on, for another text after it, and for rows that change places."""
    model = make(**TOP_K)
    texts = [torch.cat(ids_of(70, 70, seed=seed)) for seed in (1, 2)]
    expected = [decode(model, ids) for ids in texts]
    search_with_faiss(model, "Flat", least=30, measures_recall=True)
    for ids, logits in zip((texts[0], texts[1]), expected, strict=True):
        assert (decode(model, ids) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert recall_of(model) == 1.0
    indices = [layer.mixer.index for layer in model.model.layers]
    assert [x.built for x in indices] == [2 * 4, 2 * 4]  # rows and heads of keys, for each text
    assert all(index.ntotal == 66 for x in indices for index, _ in x.indices.values())
    # Beams: a row goes on from another's state.
    with torch.no_grad():
        cache = model(texts[1][:, :40], use_cache=True).past_key_values
        model(texts[1][:, 40:41], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(texts[1][:, 41:42], past_key_values=cache).logits
        search_with_faiss(model, None)
        cache = model(texts[1][:, :41].flip(0)[:, :41], use_cache=True).past_key_values
    assert [layer.mixer.index for layer in model.model.layers] == [None, None]
    with torch.no_grad():
        wanted = model(texts[1][:, 41:42], past_key_values=cache).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["HNSW16", "IVF4,Flat"])
def test_recall_is_what_an_index_costs(name):
    """Scores and values are the state's: with all of the choice found, nothing is lost."""
    model, (ids,) = make(memory_layers=[1], **TOP_K), ids_of(330)
    expected = decode(model, ids, 300)
    search_with_faiss(model, name, least=100, measures_recall=True)
    found = decode(model, ids, 300)
    recall = recall_of(model)
    print(f"{name}: recall {recall:.3f}")
    assert 0.3 < recall <= 1.0
    if recall == 1.0:
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    again = copy.deepcopy(model)  # with an index of its own, which is empty
    assert torch.equal(decode(again, ids, 300), found)


def test_refusals(monkeypatch):
    model = make(**TOP_K)
    for what in (make(), make(memory_windows=2, **TOP_K), make(memory_layers=[])):
        with pytest.raises(ValueError, match="memory_top_k chooses"):
            search_with_faiss(what, "Flat")
    with pytest.raises(ValueError, match="faiss makes no index 'Flut' on cpu"):
        search_with_faiss(model, "Flut")
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        search_with_faiss(model, "Flat", device="tpu")
    with pytest.raises(ValueError, match="no recall was measured"):
        recall_of(model)
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(ValueError, match="built for processors alone"):
            search_with_faiss(model, "Flat", device="cuda")
    assert all(layer.mixer.index is None for layer in model.model.layers)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="faiss is not installed") as error:
        search_with_faiss(model, "Flat")
    assert "\n" not in str(error.value)
