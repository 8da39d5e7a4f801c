"""Parallel context windows: joined caches have the authors' numbers, and those of a masked pass."""

import json
import shutil

import pytest
import torch
from goldens import golden_folder, golden_tensors
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from zoo.hub.convert import convert

NAME = "pcw-llama"


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """The golden's model in float64: its Llama is Mistral without a window."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(golden_folder(NAME), folder / "theirs")
    fields = json.loads((folder / "theirs" / "config.json").read_text())
    fields = {k: x for k, x in fields.items() if k not in ("bos", "next_token", "windows")}
    fields |= {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4}
    (folder / "theirs" / "config.json").write_text(json.dumps(fields))
    for name in ("golden.safetensors", "meta.json"):
        (folder / "theirs" / name).unlink()
    convert("hf-mistral", folder / "theirs", folder / "ours")
    return AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float64).eval()


@torch.no_grad()
def windows_and_task(model, windows, task, indentation="left", **options):
    """The joined cache of windows [1, len], and the output of the task after it."""
    longest = max(ids.shape[1] for ids in windows)
    caches = []
    for ids in windows:
        positions = torch.arange(ids.shape[1])[None]
        if indentation == "right":
            positions = positions + longest - ids.shape[1]
        caches.append(model(ids, position_ids=positions, use_cache=True).past_key_values)
    joined = model.join_states(caches, **options)
    return model(task, past_key_values=joined, use_cache=True)


@pytest.mark.parametrize("indentation", ["left", "right"])
def test_the_authors_numbers(golden_model, indentation):
    golden = golden_tensors(NAME)
    config = json.loads((golden_folder(NAME) / "config.json").read_text())
    windows = [golden[f"window{index}_ids"] for index in range(3)]
    output = windows_and_task(golden_model, windows, golden["task_ids"], indentation)
    assert (output.logits - golden[f"logits_{indentation}_f64"]).abs().max() < 1e-9
    cache = output.past_key_values
    keys_BSHK = cache.layers[1].tensors["keys_BWHK"]
    official_BHSK = golden[f"keys_layer1_{indentation}_f64"]
    # transformers 4.30 turned keys in an order of channels that is ours, too.
    assert (keys_BSHK.transpose(1, 2) - official_BHSK).abs().max() < 1e-9
    with torch.no_grad():
        step = golden_model(torch.tensor([[config["next_token"]]]), past_key_values=cache)
    assert (step.logits - golden[f"next_logits_{indentation}_f64"]).abs().max() < 1e-9


@pytest.fixture(scope="module")
def official_and_ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    config = MistralConfig(
        vocab_size=71,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=12,
        sliding_window=None,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    official = MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    official.save_pretrained(folder / "theirs")
    convert("hf-mistral", folder / "theirs", folder / "ours")
    return official, AutoModelForCausalLM.from_pretrained(folder / "ours").eval()


@pytest.mark.parametrize("indentation", ["left", "right"])
@pytest.mark.parametrize("num_start_tokens", [0, 1, 2])
def test_one_pass_with_a_mask(official_and_ours, indentation, num_start_tokens):
    """For clones without the goldens: the definition, by transformers' own Mistral."""
    official, ours = official_and_ours
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(3, 71, (1, size), generator=generator) for size in (5, 9, 9, 3)]
    for ids in windows:
        ids[0, :2] = torch.tensor([1, 2])
    task = torch.randint(3, 71, (1, 7), generator=generator)
    text = torch.cat([*windows, task], dim=1)
    sizes, longest = [ids.shape[1] for ids in windows], 9
    window = torch.repeat_interleave(torch.arange(5), torch.tensor([*sizes, 7]))
    ends = [longest - size if indentation == "right" else 0 for size in sizes]
    positions = [torch.arange(size) + end for size, end in zip(sizes, ends, strict=True)]
    places = torch.cat([torch.arange(size) for size in (*sizes, 7)])
    order = torch.arange(len(window))
    visible = order[:, None] >= order
    is_dropped = (places < num_start_tokens) & (window != 1)  # the first of the longest
    of_task = (window == 4)[:, None] & (~is_dropped | (window == 4))
    visible &= (window[:, None] == window) | of_task
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        expected = official(
            text,
            attention_mask=mask,
            position_ids=torch.cat([*positions, torch.arange(7) + longest])[None],
        ).logits[:, -7:]
    options = {"num_start_tokens": num_start_tokens}
    found = windows_and_task(ours, windows, task, indentation, **options).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
