"""Native exports in flash-linear-attention's own classes, on a CPU. Run by hand, where fla is.

    pip install flash-linear-attention==0.6.0
    python tests/hub/fla_native.py [--record]

Each of our models is exported, loaded by fla's class and compared: in one long pass (fla's chunked
kernels), in short ones and token by token from its cache (its recurrent ones), and generating. Each
class's own model, saved by fla, is converted and compared the same way. Triton's interpreter runs
fla's kernels, for some minutes.

--record writes fla_classes.json: config fields, tensors and logits of these classes, which
test_fla_native.py compares with where there is no fla. Without, the record is checked.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")

import torch
from triton.runtime.autotuner import Autotuner

# The first of a kernel's settings: without a GPU there is nothing to time.
Autotuner._bench = lambda self, *args, config, **kwargs: [0.0] * 3

import fla
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

import zoo
from zoo.hub.convert import convert
from zoo.hub.convert.formats import native_format
from zoo.hub.export import export

sys.path.insert(0, str(Path(__file__).parent))
from fla_models import (
    CONFIGS,
    IDS,
    RECORD,
    random_model,
    shape_in_words,
    weights_of,
)


class Index(int):
    """What a loop in a kernel counts with: the interpreter's are plain ints, without `to`."""

    def to(self, dtype):
        return self


def indices(*bounds):
    return map(Index, range(*map(int, bounds)))


for module in [m for n, m in sys.modules.items() if n.startswith("fla.ops.")]:
    module.range = indices

BOUND = 1e-5  # float32 in another order, relative to the largest logit
LENGTH = 70  # fla takes its chunked kernels from 64 or 65 tokens on


@torch.no_grad()
def differences(theirs, ours):
    """Between logits of two models, relative to the largest, by way of running fla's.

    "chunked" is of one long pass; "itself" how far fla's own are apart, between that and passes
    through its recurrent kernels.
    """
    ids = torch.randint(theirs.config.vocab_size, (2, LENGTH))
    expected, chunked = ours(ids).logits, theirs(ids).logits
    pieces, cache = [], None
    for piece in ids.split([40, 3, *[1] * 3, LENGTH - 46], dim=1):
        output = theirs(piece, past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
        cache = output.past_key_values
    recurrent, scale = torch.cat(pieces, dim=1), expected.abs().max()
    pairs = {
        "recurrent": (recurrent, expected),
        "chunked": (chunked, expected),
        "itself": (chunked, recurrent),
    }
    return {way: ((a - b).abs().max() / scale).item() for way, (a, b) in pairs.items()}


def is_same(found):
    """Whether differences are no more than rounding; fla's chunked kernels round more."""
    return found["recurrent"] < BOUND and found["chunked"] < BOUND + found["itself"]


def greedy(model):
    """The tokens that a model goes on with."""
    # Were the padding's id in the prompt, generate() would mask it there.
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(torch.tensor(IDS), **options).tolist()


def their_model(architecture, values):
    """fla's own model of a config, with the weights of `weights_of`."""
    model = AutoModelForCausalLM.from_config(fla_config(architecture, values)).eval()
    shapes = {name: shape_in_words(x) for name, x in model.state_dict().items()}
    weights = weights_of(shapes, model.config.tie_word_embeddings)
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unknown
    return model


def fla_config(architecture, values):
    """fla's config of fields of a config.json."""
    values = {n: v for n, v in values.items() if n not in ("architectures", "dtype")}
    name = native_format(architecture).expects.split("'")[1]
    (config_class,) = (
        getattr(fla.models, n)
        for n in dir(fla.models)
        if n.endswith("Config") and getattr(getattr(fla.models, n), "model_type", None) == name
    )
    return config_class(**{n: v for n, v in values.items() if n != "model_type"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    records, failed = {}, []
    for name, (architecture, fields) in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            ours = random_model(architecture, fields)
            ours.save_pretrained(folder / "checkpoint")
            exported = export(folder / "checkpoint", folder / "native", format="native")
            theirs = AutoModelForCausalLM.from_pretrained(folder / "native").eval()
            assert type(theirs).__module__.startswith("fla."), type(theirs)
            assert type(theirs).__name__ == exported.model_class
            there = differences(theirs, ours)
            same_text = greedy(theirs) == greedy(ours)

            values = json.loads((folder / "native" / "config.json").read_text())
            own = their_model(architecture, values)
            own.save_pretrained(folder / "theirs")
            with torch.no_grad():
                last_logits = own(torch.tensor(IDS)).logits[0, -1].tolist()
            convert(native_format(architecture).name, folder / "theirs", folder / "back")
            converted = zoo.MODELS[architecture].causal_lm.from_pretrained(folder / "back")
            back = differences(own, converted.eval())
        failed += [name] * (not (is_same(there) and is_same(back) and same_text))
        general = set(PreTrainedConfig().to_dict())
        records[name] = {
            "class": type(theirs).__name__,
            "fields": {n: v for n, v in sorted(own.config.to_dict().items()) if n not in general},
            "logits": [float(f"{x:.6g}") for x in last_logits],
            "shapes": {n: shape_in_words(x) for n, x in sorted(theirs.state_dict().items())},
        }
        figures = [", ".join(f"{way} {x:.1e}" for way, x in d.items()) for d in (there, back)]
        print(f"{name}: ours in fla: {figures[0]}; fla's in ours: {figures[1]}", flush=True)
    version = metadata.version("flash-linear-attention")
    record = {"flash-linear-attention": version, "models": records}
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    if arguments.record:
        RECORD.write_text(text, encoding="utf-8")
    recorded = RECORD.read_text(encoding="utf-8")
    print(f"more than rounding: {', '.join(failed) or 'none'}")
    print(f"{RECORD.name} {'agrees' if recorded == text else 'DIFFERS: run with --record'}")
    return 1 if failed or recorded != text else 0


if __name__ == "__main__":
    sys.exit(main())
