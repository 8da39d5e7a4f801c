"""A training step of a model of 340M parameters, beside fla's model with the same weights.

    python kernels/bench/gpu/training.py rwkv7 --output FILE.json
    python kernels/bench/gpu/training.py rwkv7 --tiny --device cpu      tests this script

Tokens per second of forward, backward and AdamW, in bfloat16 by autocast over float32 weights, as
the recipe trains; the most memory that is held; and the share of the device's rate for matrix
products (MFU), where a step is three times what `flops_per_token` says of a forward pass. fla's
model is made from ours by the converter's way back: the same parameters and mathematics, so the
same count of operations. Before it is timed its logits are compared with ours.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from zoo.hub.convert.format import Weights
from zoo.kernels.bench.gpu.checking import first_line, relative
from zoo.kernels.bench.gpu.failures import note
from zoo.kernels.bench.gpu.sources import fingerprint
from zoo.kernels.bench.gpu.timing import Cpu, Gpu, milliseconds
from zoo.kernels.bench.run import commit, setting_of

PARAMETERS = 340e6
BATCH, LENGTH, STEPS = 4, 4096, 8
WARM_UP = 3
# Logits of a few tokens, ours beside theirs: weights and activations of 8 bits, 24 layers.
LIMIT = 5e-2
FULL = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24}
TINY = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}


# Heads as the papers and fla's configs of this width have them; what fla's model can express.
# Beside each the module of its way to fla, or None: fla has no such model.
MODELS = {
    "retnet": ("fla_retnet", {"num_attention_heads": 4} | zoo.RetNetConfig.variants["fla"]),
    "rwkv6": ("fla_rwkv6", {"num_attention_heads": 16, "head_norm_eps": 1e-5}),
    "rwkv7": ("fla_rwkv7", {"num_attention_heads": 16, "removal_eps": 1e-6}),
    "gated_deltanet": (
        "fla_gated_deltanet",
        {"num_attention_heads": 6, "head_dim": 128, "value_head_dim": 256},
    ),
    "lightning": (None, {"num_attention_heads": 8}),
}
HEADS = {"num_attention_heads": 2}
TINY_HEADS = {
    "gated_deltanet": {"head_dim": 16, "value_head_dim": 32},
    "rwkv7": {"head_norm_eps": 32e-5},  # fla's: 1e-5 for each channel of a head
}


def config_of(name, is_tiny):
    """Our config of 340M parameters, by the width of its MLP; or of a tiny one."""
    fields = dict(MODELS[name][1])
    if is_tiny:
        fields |= TINY | HEADS | TINY_HEADS.get(name, {})
        return zoo.MODELS[name].config(**fields)

    def made(width):
        return zoo.MODELS[name].config(**fields, **FULL, intermediate_size=width)

    # Parameters are affine in that width.
    one, two = (parameters_of(name, made(width)) for width in (1024, 2048))
    return made(max(64, round((1024 + 1024 * (PARAMETERS - one) / (two - one)) / 64) * 64))


def parameters_of(name, config):
    with torch.device("meta"):
        return sum(p.numel() for p in zoo.MODELS[name].causal_lm(config).parameters())


def written_for_fla(name, model):
    """(fla's config as fields, its own tensors by name); None where fla has no such model."""
    module = MODELS[name][0]
    if module is None:
        return None
    way = importlib.import_module(f"zoo.hub.convert.{module}")
    values, _ = way.write_config(model.config)
    weights = Weights({name: x.detach().cpu().clone() for name, x in model.state_dict().items()})
    tensors = dict(way.write_weights(weights, model.config))
    weights.finish()
    return values, tensors


def peer_of(written):
    """fla's model of `written_for_fla`.

    Raises:
        LookupError: there is none, or fla is not installed.
    """
    if written is None:
        raise LookupError("fla has no such model")
    if importlib.util.find_spec("fla") is None:
        raise LookupError("flash-linear-attention is not installed")
    importlib.import_module("fla.models")  # makes its configs known to transformers
    values, tensors = written
    values = {name: x for name, x in values.items() if name != "architectures"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(tensors)
    return theirs


def flops_of_step(model, batch, length):
    """Operations of forward and backward over a batch: backward is twice forward."""
    return 3 * model.flops_per_token(length) * batch * length


def autocast(device):
    """As the recipe on a GPU; nothing on a CPU, where the script is tested."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def few_logits(model, ids, device):
    with torch.no_grad(), autocast(device):
        return model(ids[:1, :256], use_cache=False).logits.float()


def time_steps(device, model, ids, steps):
    """{"ms", "tokens_per_s", "peak_gb"} of a training step."""
    model.train()
    is_cuda = device.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=is_cuda)

    def step():
        with autocast(device.device):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(WARM_UP):
        loss = step()
    if not torch.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss.item()}")
    device.synchronize()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()

    def row():
        for _ in range(steps):
            step()

    seconds = device.elapsed(row, 0) / steps
    held = torch.cuda.max_memory_allocated() if is_cuda else 0
    return {
        "ms": milliseconds(seconds),
        "tokens_per_s": round(ids.numel() / seconds),
        "peak_gb": round(held / 1e9, 2),
    }


def measure(name, device, is_tiny, write, deadline=float("inf")):
    """Times our model, then fla's; `write` is given the entry after each."""
    torch.manual_seed(0)
    batch, length, steps = (2, 32, 1) if is_tiny else (BATCH, LENGTH, STEPS)
    model = zoo.MODELS[name].causal_lm(config_of(name, is_tiny)).to(device.device)
    ids = torch.randint(1, model.config.vocab_size - 1, (batch, length), device=device.device)
    rate, flops = device.ceilings()[1], flops_of_step(model, batch, length)
    entry = {
        "sources": fingerprint(),
        "commit": commit(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": [batch, length],
        "tflop": flops / 1e12,
        "matmul_tflops": round(rate / 1e12, 1),
        "by": {},
    }
    logits, written = few_logits(model, ids, device.device), written_for_fla(name, model)
    for who in ("ours", "fla"):
        try:
            if who == "fla":
                model = None  # its memory
                gc.collect()
                model = peer_of(written).to(device.device)
                error = relative(few_logits(model, ids, device.device), logits.double())
                if not error < LIMIT:
                    raise ArithmeticError(f"logits are {error:.2g} from ours")
            if time.perf_counter() > deadline:
                raise TimeoutError("out of time")
            figures = time_steps(device, model, ids, steps)
            figures["mfu"] = round(1000 * flops / figures["ms"] / rate, 3)
        except Exception as error:  # any failure of theirs or ours is a result, not the end
            figures = {"failed": first_line(error)}
            note(f"{name}, {who}: {figures['failed']}")
        entry["by"][who] = figures
        if who == "fla" and "ms" in figures and "ms" in entry["by"]["ours"]:
            figures["ratio"] = round(figures["ms"] / entry["by"]["ours"]["ms"], 2)
        write(entry)
    return entry


def keep(output, setting, name, entry):
    """Writes a model's entry into the file of all, which is begun anew for another setting."""
    old = json.loads(output.read_text()) if output.exists() else {}
    is_same = all(old.get(key) == value for key, value in setting.items())
    models = old["models"] if is_same else {}
    unfinished = output.with_suffix(".part")
    unfinished.write_text(
        json.dumps({**setting, "models": models | {name: entry}}, indent=1) + "\n"
    )
    unfinished.replace(output)


def lines_of(name, entry):
    """A model as lines of text."""
    head = f"{name}, {entry['parameters'] / 1e6:.0f}M, {entry['batch']}"
    return [f"{head}, {who}: {figures}" for who, figures in entry["by"].items()]


def main(arguments=None):
    """See the module docstring. The exit status: 1 if ours was not timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=300, help="no model is timed after them")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test this script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --tiny --device cpu tests the script.")
    deadline = time.perf_counter() + options.seconds
    device = Cpu() if options.device == "cpu" else Gpu(torch.device("cuda", 0))
    setting = setting_of(device)

    def write(entry):
        if options.output:
            keep(options.output, setting, options.name, entry)

    entry = measure(options.name, device, options.tiny, write, deadline)
    print("\n".join(lines_of(options.name, entry)), flush=True)
    return 0 if "ms" in entry["by"]["ours"] else 1


if __name__ == "__main__":
    sys.exit(main())
