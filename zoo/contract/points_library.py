"""Points 5 and 6: what transformers' own code does with a model, from `generate` to the Hub."""

import copy
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from .compare import BOUNDS, relative
from .report import NotApplicable, first_line

NEW_TOKENS = 12
BOUND = BOUNDS[torch.float64]


def generation(subject, checks):
    """Point 5: `generate` in all its ways, and states that are saved, loaded, forked, reordered."""
    model = subject.model()
    ids = subject.ids(3, 9)
    with checks.case("greedy"):
        expected = _argmax_loop(subject, model, ids)
        checks.holds("= argmax loop", torch.equal(_generate(model, ids), expected))
    with checks.case("greedy"):
        found = _generate(model, ids, cache_implementation="static")
        checks.holds("with a static cache", torch.equal(found, expected))
    batch, mask, rows = _left_padded(subject)
    with checks.case("left-padded batch"):
        found = _generate(model, batch, attention_mask=mask)[:, batch.shape[1] :]
        alone = torch.cat([_generate(model, row)[:, row.shape[1] :] for row in rows])
        checks.holds("= rows alone", torch.equal(found, alone))
    with checks.case("3 beams"):
        beams = {"num_beams": 3, "num_return_sequences": 3, "attention_mask": mask}
        beams |= {"return_dict_in_generate": True, "output_scores": True}
        found, expected = (_generate(model, batch, use_cache=x, **beams) for x in (True, False))
        same = torch.equal(found.sequences, expected.sequences)
        checks.holds("= without a cache", same)
        scores = relative(found.sequences_scores, expected.sequences_scores)
        checks.below("scores", scores, BOUNDS[torch.float32])
    with checks.case("sampling"):
        found, expected = (
            _seeded(lambda x=x: _generate(model, ids, do_sample=True, top_k=20, use_cache=x))
            for x in (True, False)
        )
        checks.holds("with a seed = without a cache", torch.equal(found, expected))
    one = ids[:1]
    for name, settings in {
        "another model's drafts": {"assistant_model": subject.model(seed=1)},
        "drafts looked up in the prompt": {"prompt_lookup_num_tokens": 3},
    }.items():
        # A prompt that repeats itself, so that there are drafts to look up, right and wrong.
        prompt = one.repeat(1, 3)
        with checks.case(f"assisted by {name}"):
            # Who drafts gets no mask, and takes such a token for padding.
            no_padding = {"suppress_tokens": [0]}
            found = _generate(model, prompt, **settings, **no_padding)
            checks.holds("= greedy", torch.equal(found, _generate(model, prompt, **no_padding)))
    with checks.case("generate from inputs_embeds"):
        subject.require("inputs_embeds")
        embeds = model.get_input_embeddings()(ids).detach()
        found = model.generate(inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
        checks.holds("= from ids", torch.equal(found, _generate(model, ids)[:, ids.shape[1] :]))
    with checks.case("generate from a cache"):
        first = _generate(model, ids, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, subject.ids(3, 4, seed=2)], dim=1)
        found = _generate(model, longer, **{subject.cache_argument: subject.cache_of(first)})
        checks.holds("= from the start", torch.equal(found, _generate(model, longer)))
    with torch.no_grad():
        _states(subject, checks, model)


def _generate(model, ids, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
    settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **settings)


def _seeded(function):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function()


def _argmax_loop(subject, model, ids):
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = subject.forward(model, ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def _left_padded(subject):
    rows = [subject.ids(1, length, seed=length) for length in (3, 14, 9)]
    width = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    batch = torch.cat([pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return batch, mask, rows


def _states(subject, checks, model):
    ids, more = subject.ids(3, 20), subject.ids(3, 6, seed=2)

    def start():
        return subject.run(model, ids)[1]

    def on(cache, tokens=more):
        return subject.run(model, tokens, cache=cache)[0]

    with checks.case("state"):
        expected = on(start())
        other = subject.ids(3, 6, seed=3)
        expected_other = on(start(), other)
    rows = torch.tensor([2, 0, 0])
    for name, change, selected in (
        ("reorder_cache", lambda cache: cache.reorder_cache(rows), rows),
        ("batch_select_indices", lambda cache: cache.batch_select_indices(rows[:2]), rows[:2]),
        (
            "batch_repeat_interleave",
            lambda cache: cache.batch_repeat_interleave(2),
            torch.arange(3).repeat_interleave(2),
        ),
    ):
        with checks.case("state"), checks.case(name):
            cache = start()
            change(cache)
            checks.below("", relative(on(cache, more[selected]), expected[selected]), BOUND)
    with checks.case("state"), checks.case("forked"):
        cache = start()
        fork = copy.deepcopy(cache) if not _is_zoo(cache) else _state_module().fork_state(cache)
        checks.below("the one run on", relative(on(cache), expected), 0)
        checks.below("the other, elsewhere", relative(on(fork, other), expected_other), 0)
    with (
        checks.case("state"),
        checks.case("saved and loaded"),
        tempfile.TemporaryDirectory() as tmp,
    ):
        cache = start()
        if not _is_zoo(cache):
            raise NotApplicable("its cache has no file format")
        path = Path(tmp) / "state.safetensors"
        _state_module().save_state(cache, path)
        loaded = _state_module().load_state(path, model.config)
        checks.below("run on", relative(on(loaded), expected), 0)
        length = ids.shape[1] + more.shape[1]
        checks.holds("length", loaded.get_seq_length() == length)
    with checks.case("state"), checks.case("taken back by crop"):
        cache = start()
        cache.activate_past_recording()
        on(cache, other)
        on(cache, other[:, :1])
        # Back to inside the piece before the last: its first two tokens stay.
        cache.crop(ids.shape[1] + 2 - cache.get_seq_length())
        checks.holds("length", cache.get_seq_length() == ids.shape[1] + 2)
        whole, _ = subject.run(model, torch.cat([ids, other[:, :2], more], dim=1))
        checks.below("run on", relative(on(cache), whole[:, -more.shape[1] :]), BOUND)


def _state_module():
    return importlib.import_module("zoo.core.state")


def _is_zoo(cache):
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(isinstance(x, _state_module().StateLayer) for x in layers)


def files(subject, checks):
    """Point 6: what is saved comes back, here, under other heads and where there is no zoo."""
    model = subject.model()
    ids = subject.ids(2, 70)
    with torch.no_grad(), tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "saved"
        model.save_pretrained(folder)
        logits = subject.forward(model, ids).logits
        with checks.case("AutoConfig"):
            same = AutoConfig.from_pretrained(folder).to_diff_dict() == model.config.to_diff_dict()
            checks.holds("the same config", same)
        with checks.case("AutoModelForCausalLM"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, output_loading_info=True
            )
            wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
            checks.below("weights missing, unexpected or misshapen", len(wrong), 0)
            found = subject.forward(aligned(loaded), ids).logits
            checks.holds("logits, bit for bit", torch.equal(found, logits))
        base = model.base_model(ids)[0]
        for auto in (AutoModel, AutoModelForSequenceClassification):
            with checks.case(auto.__name__):
                try:
                    loaded = auto.from_pretrained(folder, dtype=torch.float64)
                except ValueError as error:
                    raise NotApplicable(first_line(error)) from None
                found = aligned(loaded).base_model(ids)[0]
                checks.holds("hidden states, bit for bit", torch.equal(found, base))
        with checks.case("exported folder without zoo"):
            _exported(subject, checks, model, folder, Path(tmp), ids[:1])
    with torch.no_grad(), checks.case("tied weights"):
        _tied(subject, checks, model, ids)
    with torch.no_grad(), checks.case("resize_token_embeddings"):
        _resized(subject, checks, subject.model(), ids, logits)


def aligned(model):
    """A model read from a file, in eval mode, its weights moved to memory of their own.

    Inside the file's memory they may lie at odd addresses, where products round differently.
    """
    return copy.deepcopy(model).eval()


_LOAD_WITHOUT_ZOO = """
import sys
sys.modules["zoo"] = None  # so that importing it fails, installed or not
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, inputs, outputs = sys.argv[1:]
load = {"trust_remote_code": True, "dtype": torch.float64}
AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
ids = load_file(inputs)["ids"]
with torch.no_grad():
    hidden = AutoModel.from_pretrained(folder, **load)(ids)[0]
    found = {"logits": model(ids).logits, "hidden": hidden}
found |= {f"weights.{name}": x.clone() for name, x in model.state_dict().items()}
settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
found["generated"] = model.generate(ids, max_new_tokens=12, **settings)
save_file(found, outputs)
"""


def _exported(subject, checks, model, folder, tmp, ids):
    """Exports, then loads in a process where `import zoo` fails."""
    if type(model).__module__.split(".")[0] != "zoo":
        raise NotApplicable("a model of another library")
    try:
        export = importlib.import_module("zoo.hub.export").export
    except ModuleNotFoundError as error:
        raise NotApplicable(f"no module {error.name}") from None
    export(folder, tmp / "exported")
    save_file({"ids": ids}, tmp / "ids.safetensors")
    arguments = [tmp / "exported", tmp / "ids.safetensors", tmp / "found.safetensors"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", _LOAD_WITHOUT_ZOO, *map(str, arguments)],
        cwd=tmp,
        env=environment | {"HF_MODULES_CACHE": str(tmp / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    found = load_file(tmp / "found.safetensors")
    weights = model.state_dict()
    same = all(torch.equal(found.get(f"weights.{name}"), x) for name, x in weights.items())
    checks.holds("weights, bit for bit", same)
    # Another process may round matrix products differently, by where its memory happens to lie.
    logits = subject.forward(model, ids).logits
    checks.below("logits", relative(found["logits"], logits), BOUND)
    checks.below("AutoModel", relative(found["hidden"], model.base_model(ids)[0]), BOUND)
    checks.holds("generate", torch.equal(found["generated"], _generate(model, ids)))


def _tied(subject, checks, model, ids):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    tied = _seeded(lambda: type(model)(config)).to(torch.float64).eval()
    if tied.get_output_embeddings() is None:
        raise NotApplicable("it has no output embeddings")

    def is_tied(x):
        return x.get_output_embeddings().weight is x.get_input_embeddings().weight

    checks.holds("one tensor", is_tied(tied))
    with tempfile.TemporaryDirectory() as tmp:
        tied.save_pretrained(tmp)
        stored = sum(len(load_file(path)) for path in Path(tmp).glob("*.safetensors"))
        checks.holds("stored once", stored == len(list(tied.parameters())), str(stored))
        loaded = aligned(type(model).from_pretrained(tmp, dtype=torch.float64))
    checks.holds("one tensor after loading", is_tied(loaded))
    same = torch.equal(subject.forward(loaded, ids).logits, subject.forward(tied, ids).logits)
    checks.holds("logits after loading, bit for bit", same)


def _resized(subject, checks, model, ids, logits):
    if model.get_output_embeddings() is None:
        raise NotApplicable("it has no output embeddings")
    more = 7
    model.resize_token_embeddings(subject.vocab_size + more, mean_resizing=False)
    found = subject.forward(model, ids).logits
    checks.holds("logits for the new tokens", found.shape[-1] == subject.vocab_size + more)
    checks.below("logits for the old ones", relative(found[..., :-more], logits), BOUND)
    ids = ids.clone()
    ids[:, 3] = subject.vocab_size + more - 1
    logits = subject.forward(model, ids).logits
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        loaded = aligned(type(model).from_pretrained(tmp, dtype=torch.float64))
    checks.holds("saved and loaded", torch.equal(subject.forward(loaded, ids).logits, logits))
