"""Loads exports as users do, and compares what they compute. Run in a process of its own.

    python load_exports.py MODE EXPORTS

Of EXPORTS, a folder that freeze.py's `write_exports` made, every model is loaded

    bare        by its own code, where zoo, triton and fla are not to be had
    by-id       the same by its name on the Hub, from huggingface_hub's cache
    zoo         by an installed zoo
    fla-before  by its own code, after fla
    fla-after   by its own code, before and after fla

and computed in float64. Standard output ends in a line of JSON; under "models", by name:

    hash    of the logits, bit for bit
    error   the largest difference of a logit from the recorded one, in parts of the largest
    greedy  whether `generate` chooses the recorded tokens
    again   whether the model, saved and loaded, has the same weights bit for bit

or, in place of these,

    failed  what went wrong, in a line
"""

import hashlib
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

# What an exported folder does without.
OPTIONAL = ("zoo", "triton", "fla")
OWNER, COMMIT = "frozen", "0123456789" * 4
RECORDED = "recorded.safetensors"
# Recorded logits are rounded to float32: half of 2^-23 of each. What two builds of PyTorch differ
# by in float64 is a millionth of that.
ERROR = 2**-24 * 1.001


def digest(x):
    """A short hash of a tensor's bits."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def find(auto, folder, mode, **options):
    """Loads a model the way that a mode says."""
    import torch

    options |= {"dtype": torch.float64, "trust_remote_code": mode != "zoo"}
    model = auto.from_pretrained(folder, **options).eval()
    assert type(model).__module__.startswith("zoo." if mode == "zoo" else "transformers_modules.")
    return model


def check(folder, mode, work, recorded):
    """The figures of one model."""
    import torch
    from transformers import AutoModelForCausalLM

    source = f"{OWNER}/{folder.name}" if mode == "by-id" else folder
    inputs = {name: recorded[name] for name in ("input_ids", "attention_mask")}
    is_text = inputs["attention_mask"].bool()
    with torch.no_grad():
        model = find(AutoModelForCausalLM, source, mode)
        logits = model(**inputs).logits[is_text]
        if mode == "fla-after":
            import fla  # noqa: F401

            later = find(AutoModelForCausalLM, source, mode)
            for other in (model, later):
                assert torch.equal(other(**inputs).logits[is_text], logits)
        new = recorded[f"{folder.name}.greedy"]
        options = {"max_new_tokens": new.shape[1], "do_sample": False, "eos_token_id": None}
        greedy = model.generate(**inputs, **options)[:, -new.shape[1] :]
        model.save_pretrained(work / folder.name)
        again = find(AutoModelForCausalLM, work / folder.name, mode).state_dict()
    expected = recorded[f"{folder.name}.logits"].double()
    return {
        "hash": digest(logits),
        "error": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "greedy": torch.equal(greedy, new),
        "again": all(torch.equal(x, again[name]) for name, x in model.state_dict().items()),
    }


def try_check(folder, *arguments):
    """The same, or {"failed": why}."""
    try:
        return check(folder, *arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def put_into_cache(exports):
    """Lays exports as huggingface_hub keeps downloaded repositories."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in exports:
        cached = Path(HF_HUB_CACHE) / f"models--{OWNER}--{folder.name}"
        shutil.copytree(folder, cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)


def main(mode, exports):
    """Returns what the JSON holds."""
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    if mode in ("bare", "by-id"):
        for name in found:
            sys.modules[name] = None
    elif mode == "zoo":
        import zoo  # noqa: F401
    elif mode == "fla-before":
        import fla  # noqa: F401
    import huggingface_hub
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    folders = sorted(path.parent for path in exports.glob("*/config.json"))
    if mode == "by-id":
        put_into_cache(folders)
    recorded = load_file(exports / RECORDED)
    with tempfile.TemporaryDirectory() as work:
        models = {x.name: try_check(x, mode, Path(work), recorded) for x in folders}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "found": found,
        "models": models,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
