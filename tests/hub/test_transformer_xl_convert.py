"""Transformer-XL's two layouts: what their files hold beside, and what would be another model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import random_weights
from transformers import AutoModelForCausalLM
from txl_shapes import CONFIGS, shapes, tied

from zoo.hub.convert import convert, convert_back

FREQUENCIES = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)


def source(format, folder, tensors=None, **fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[format] | fields))
    save_file(random_weights(shapes(format)) | (tensors or {}), folder / "model.safetensors")
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("format", CONFIGS)
def test_a_whole_state_dict(format, tmp_path):
    """With what is tied twice, and frequencies that follow from the config, in a pickle."""
    theirs = source(format, tmp_path / "plain")
    weights = load_file(theirs / "model.safetensors")
    whole = weights | {name: weights[same] for name, same in tied(format).items()}
    before = "transformer." if format == "transfo-xl-hf" else ""
    whole[f"{before}pos_emb.inv_freq"] = FREQUENCIES
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/config.json").write_text((theirs / "config.json").read_text())
    torch.save(whole, tmp_path / "whole" / "pytorch_model.bin")
    convert(format, theirs, tmp_path / "a")
    convert(format, tmp_path / "whole", tmp_path / "b")
    expected = load_file(tmp_path / "a/model.safetensors")
    found = load_file(tmp_path / "b/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    convert_back(format, tmp_path / "a", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) for name, x in weights.items())
    for name in tied(format):
        damaged = {name: whole[name] + 1}
        folder = source(format, tmp_path / f"damaged {name}", damaged)
        with pytest.raises(ValueError, match="the two differ"):
            convert(format, folder, tmp_path / "c")


def test_clusters_of_the_authors_loss_are_the_other_way_round(tmp_path):
    """Their log p of cluster i comes from entry -i of the head: the last one is the first's."""
    weights = load_file(source("transformer-xl", tmp_path / "theirs") / "model.safetensors")
    convert("transformer-xl", tmp_path / "theirs", tmp_path / "ours")
    model, ids = loaded(tmp_path / "ours"), torch.arange(19)[None]
    with torch.no_grad():
        hidden = model.model(ids)[0][0]
        found = model(ids).logits[0]
    weights = {name: x.double() for name, x in weights.items()}
    table, bias = weights["word_emb.emb_layers.0.weight"], weights["crit.out_layers.0.bias"]
    words = hidden @ table.T + bias
    entries = hidden @ weights["crit.cluster_weight"].T + weights["crit.cluster_bias"]
    head = torch.cat([words[:, :4], entries], dim=1).log_softmax(-1)
    parts = [head[:, :4]]
    for i, (start, after) in enumerate(((4, 9), (9, 19)), 1):
        parts.append(head[:, -i, None] + words[:, start:after].log_softmax(-1))
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=1e-10, atol=1e-10)


REFUSED = [
    ("transfo-xl-hf", {"attn_type": 2}, "attn_type = 2: only 0 is"),
    ("transfo-xl-hf", {"sample_softmax": 100}, "sample_softmax, which approximates"),
    ("transfo-xl-hf", {"ext_len": 4}, "ext_len = 4: an extended context"),
    ("transfo-xl-hf", {"same_length": False, "tgt_len": None}, "no tgt_len: what a token sees"),
    ("transfo-xl-hf", {"tie_projs": [True, True, True]}, "nothing uses crit.out_projs.0|differ"),
    ("transfo-xl-hf", {"div_val": 4}, "does not fit|by the config"),
    ("transfo-xl-hf", {"cutoffs": [9, 4]}, "cutoffs grow"),
    ("transfo-xl-hf", {"num_labels_of": 3}, "does not know: num_labels_of"),
    ("transfo-xl-hf", {"untie_r": False}, "have no transformer.r_w_bias"),
    ("transformer-xl", {"cutoffs": [4]}, "by the config"),
    ("transformer-xl", {"attn_type": 1}, "attn_type = 1: only 0 is"),
    ("transformer-xl", {"n_head": 3}, "does not fit|by the config"),
    ("transformer-xl", {"d_embed": 8}, "have no word_emb.emb_projs.0"),
]


@pytest.mark.parametrize(("format", "fields", "message"), REFUSED)
def test_refused_in_one_line(format, fields, message, tmp_path):
    theirs = source(format, tmp_path / "theirs", **fields)
    with pytest.raises(ValueError, match=message) as error:
        convert(format, theirs, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_what_the_other_layout_has_not(tmp_path):
    for format, message in (
        ("transfo-xl-hf", "zero_memory is True: the authors' model has False"),
        ("transformer-xl", "zero_memory is False: transformers' model has True"),
    ):
        source(format, tmp_path / format)
        convert(format, tmp_path / format, tmp_path / "ours", overwrite=True)
        (other,) = CONFIGS.keys() - {format}
        with pytest.raises(ValueError, match=message):
            convert_back(other, tmp_path / "ours", tmp_path / "back")
