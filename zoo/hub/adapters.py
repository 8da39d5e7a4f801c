"""Reads the weights of a training run's checkpoint that holds an adapter alone, as `[lora]` makes.

What is added to a matrix W is alpha / r B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
peft merges the same into a model; here there are tensors and nothing runs.
"""

from pathlib import Path

from .curve import is_number
from .files import file_hash, read_fields
from .lazy import value_of

ADAPTER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft's names begin with
# Settings of peft's under which the sum is another one.
OTHERS = ("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out")
OTHERS += ("rank_pattern", "alpha_pattern", "layer_replication")


def has_adapter(folder):
    """Whether a folder is a checkpoint of an adapter, without the weights that it lies on."""
    folder = Path(folder)
    names = "model.safetensors", "model.safetensors.index.json"
    is_whole = any((folder / name).is_file() for name in names)
    return (folder / ADAPTER / WEIGHTS).is_file() and not is_whole


def base_of(folder, config):
    """The folder of the weights that an adapter lies on.

    Args:
        folder: of the checkpoint, for messages.
        config: of the adapter.

    Raises:
        ValueError: it is not there.
    """
    name = str(config.get("base_model_name_or_path"))
    base = Path(name).expanduser()
    if not base.is_dir():
        raise ValueError(
            f"{folder} holds an adapter on the weights of {name}, which is no folder here; run "
            f"this where it is, or put it there (Hub: hf download {name} --local-dir {name})."
        )
    _check_end(folder, base)
    return base


def _check_end(folder, base):
    """Refuses adapters that lie on one another in a circle, without weights below them."""
    seen = {Path(folder).resolve()}
    while has_adapter(base):
        if base.resolve() in seen:
            raise ValueError(f"{folder} holds an adapter on {base}, which in the end is on itself.")
        seen.add(base.resolve())
        base = Path(str(read_fields(base / ADAPTER / CONFIG).get("base_model_name_or_path")))


def check_base(folder, files, manifest):
    """Refuses weights which are others than those that an adapter was trained on.

    Args:
        folder: of the checkpoint, for messages.
        files: of the weights.
        manifest: what checkpoint.json says, which knows their hashes; {} without one.

    Raises:
        ValueError: a file is missing or another.
    """
    there, begun = {path.name: path for path in files}, manifest.get("init_from") or {}
    hashes = begun.get("sha256") or {} if isinstance(begun, dict) else begun
    if not isinstance(hashes, dict):
        raise ValueError(f"{folder}/checkpoint.json has init_from of no kind that a run writes.")
    for name, expected in hashes.items():
        if name not in there or file_hash(there[name]) != expected:
            raise ValueError(
                f"{folder} holds an adapter on other weights than there are now ({name} is not "
                "the file that it was trained on); put that back."
            )


def merge(tensors, adapter, config, source):
    """Weights with what an adapter adds to them.

    Args:
        tensors: of the model that it lies on, by our names.
        adapter: tensors as peft names them.
        config: of the adapter.
        source: where it comes from, for messages.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: an adapter of another kind, or of another model.
    """
    found = [name for name in OTHERS if config.get(name)]
    if config.get("peft_type") != "LORA" or found:
        kind = ", ".join(found) or config.get("peft_type")
        raise ValueError(
            f"{source}: expected a plain LoRA adapter, got {kind}; merge it with peft's "
            "merge_and_unload(), save that, and pass its folder."
        )
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not is_number(alpha) or not is_number(rank) or rank <= 0:
        raise ValueError(
            f"{source}: expected numbers for lora_alpha and r in {CONFIG}, got {alpha!r} and "
            f"{rank!r}."
        )
    merged, scale = dict(tensors), alpha / rank
    for name, x in adapter.items():
        own = name.removeprefix(PREFIX)
        if own.endswith(".lora_B.weight"):
            continue
        if own.endswith(".lora_A.weight"):
            own = own.replace(".lora_A.", ".")
            b = adapter.get(name.replace(".lora_A.", ".lora_B."))
            if b is None or b.dim() != 2 or x.dim() != 2 or b.shape[1] != x.shape[0]:
                raise ValueError(f"{source}: {name} has no counterpart of its rank.")
            delta = b @ x * scale
            fits = own in tensors and tensors[own].shape == delta.shape
            x = tensors[own] + delta.to(tensors[own].dtype) if fits else delta
        if own not in tensors and config.get("ensure_weight_tying") and _is_a_copy(name, adapter):
            continue  # of embeddings that are tied, which a model's file has once
        if own not in tensors or tensors[own].shape != x.shape:
            raise ValueError(f"{source}: the adapter's {name} has no place in the model's weights.")
        merged[own] = x
    return merged


def _is_a_copy(name, adapter):
    """Whether an adapter holds a tensor under a second name."""
    x = adapter[name]
    same = (y for other, y in adapter.items() if other != name and y.shape == x.shape)
    return any(value_of(x).equal(value_of(y)) for y in same)
