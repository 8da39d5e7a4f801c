"""Other people's programs for a CPU: the package `rwkv`, and llama.cpp through llama-cpp-python.

They get the weights of a model of ours, in their own files, and are timed only if their logits are
ours. They read one text at a time and are not trained. None is a dependency; who has them not is
told how to get them.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from .contenders import MISTRAL, Contender
from .tasks import tokens

NEEDS = {"rwkv package": ("rwkv", "pip install rwkv")}
NEEDS["llama.cpp"] = ("llama_cpp", "pip install llama-cpp-python gguf (compiles for minutes)")
TWINS = {
    "rwkv package RWKV-4": "rwkv4",
    "rwkv package RWKV-7": "rwkv7",
    "llama.cpp RWKV-7": "rwkv7",
    "llama.cpp Mistral": MISTRAL,
}
# How far logits may be off the largest: float32 in another order; bfloat16's 8 bits, each layer.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def missing(name):
    """None, or a line that says how to install what a peer needs."""
    package = next(x for x in NEEDS if name.startswith(x))
    module, command = NEEDS[package]
    if importlib.util.find_spec(module) is None:
        return f"{name} is left out: it is not installed ({command})."
    return None


# Our name of a tensor in a layer -> the RWKV authors' (zoo/hub/convert/rwkv_pth.py reads them).
RWKV = {
    "mixer_norm.": "ln1.",
    "mlp_norm.": "ln2.",
    "mixer.head_norm.": "att.ln_x.",
    "mixer.r_proj.": "att.receptance.",
    "mixer.k_proj.": "att.key.",
    "mixer.v_proj.": "att.value.",
    "mixer.out_proj.": "att.output.",
    "mixer.mix_": "att.time_mix_",
    "mixer.time_": "att.time_",
    "mixer.decay.": "att.w",
    "mixer.rate.": "att.a",
    "mixer.residual.": "att.v",
    "mixer.gate.": "att.g",
    "mixer.k_": "att.k_",
    "mixer.r_k": "att.r_k",
    "mlp.k_proj.": "ffn.key.",
    "mlp.v_proj.": "ffn.value.",
    "mlp.r_proj.": "ffn.receptance.",
    "mlp.mix_": "ffn.time_mix_",
    "mlp.mu_k": "ffn.x_k",
}
PARTS = {"a": "1", "b": "2", "bias": "0"}  # of a low-rank adapter


def authors_tensors(model):
    """A model of ours, RWKV-4 or 7, under the authors' names."""
    found = {}
    outside = {"embed_tokens.": "emb.", "embed_norm.": "blocks.0.ln0.", "norm.": "ln_out."}
    for name, x in model.state_dict().items():
        name = name.removeprefix("model.")
        if not name.startswith("layers."):
            ours = next((key for key in outside if name.startswith(key)), None)
            name = name.replace(ours, outside[ours]) if ours else name.replace("lm_head", "head")
            found[name] = x
            continue
        _, layer, name = name.split(".", 2)
        there = f"blocks.{layer}."
        if name == "mixer.mu":
            found |= {f"{there}att.x_{key}": row[None, None] for key, row in zip("rwkvag", x)}
            continue
        prefix = next(key for key in RWKV if name.startswith(key))
        theirs, rest = RWKV[prefix], name.removeprefix(prefix)
        if prefix in ("mixer.decay.", "mixer.rate.", "mixer.residual.", "mixer.gate."):
            rest = PARTS[rest]
        is_mix = "mix_" in theirs or theirs == "ffn.x_k" or rest in ("0", "k", "a")
        found[f"{there}{theirs}{rest}"] = x[None, None] if is_mix and x.ndim == 1 else x
    # The first layer's residual is there, and not used.
    if "blocks.1.att.v0" in found:
        for i in range(3):
            found[f"blocks.0.att.v{i}"] = torch.zeros_like(found[f"blocks.1.att.v{i}"])
    return found


@contextlib.contextmanager
def silence():
    """The package prints what it loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def rwkv_module(version):
    """The package's module for a version: it decides when it is imported which it knows."""
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # which it reads later, too
    sys.modules.pop("rwkv.model", None)
    with silence(), mock.patch.dict(os.environ, {"RWKV_V7_ON": str(int(version == 7))}):
        return importlib.import_module("rwkv.model")


class Peer:
    """What takes one text: as a `Contender`, without batches, `generate` and training."""

    has_batches = can_generate = can_train = is_ours = is_compiled = False

    def __init__(self, name, size, twin=None):
        self.name, self.size = name, size
        self.twin = twin or Contender(TWINS[name], size)
        self.mlp, self.parameters = self.twin.mlp, self.twin.parameters
        self.folder = tempfile.TemporaryDirectory()

    def to(self, dtype):
        """Loads the weights in this dtype, and compares logits with ours.

        Raises:
            RuntimeError: they differ.
        """
        self.load(Path(self.folder.name), dtype)
        ids = tokens(self.size, 24)
        with torch.inference_mode():
            expected = self.twin.model(ids, logits_to_keep=1).logits.flatten().float()
        found = self.logits(ids)
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        if not off < BOUNDS[dtype]:
            raise RuntimeError(f"logits differ by {off:.1e} of the largest from our model's")

    def prompt(self, ids_1T, rows):
        return self.read(ids_1T)

    def flops(self, length, is_training):
        return self.twin.flops(length, is_training)

    def decode_bytes(self, length, rows, cache):
        return self.twin.decode_bytes(length, rows)


class RwkvPackage(Peer):
    """The authors' inference package, with TorchScript as it comes."""

    def load(self, folder, dtype):
        version = int(self.name[-1])
        path = folder / "model"
        torch.save(authors_tensors(self.twin.model), f"{path}.pth")
        kind = rwkv_module(version).RWKV
        strategy = "cpu fp32" if dtype == torch.float32 else "cpu bf16"
        with silence():
            self.package = kind(model=str(path), strategy=strategy)
        Path(f"{path}.pth").unlink()

    def logits(self, ids_1T):
        return self.package.forward(ids_1T[0].tolist(), None)[0].float().flatten()

    def read(self, ids_1T, state=None):
        return self.package.forward(ids_1T[0].tolist(), state)[1]


def peer(name, size, twin=None):
    """The peer of that name."""
    if name.startswith("rwkv"):
        return RwkvPackage(name, size, twin)
    from .gguf_files import LlamaCpp

    return LlamaCpp(name, size, twin)
