"""Model folders: reading weights, configs and tokenizers, with checks."""

import json
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from .. import MODELS
from ..core.base import ZooConfig
from .adapters import ADAPTER, CONFIG, WEIGHTS, base_of, check_base, has_adapter, merge
from .shards import SHARDS, has_shards, read_shards

# Names of a training run's other files, which share a weight file's extension.
NOT_WEIGHTS = (
    "training_args",
    "training_state",
    "carried_state",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
)
PICKLES = (".bin", ".pt", ".pth")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# What can be computed with, or is none of the model's own weights, as a counter is.
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
PLAIN_DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def one_line(error):
    """An exception's message on one line, for a message of our own."""
    # @strict puts the message of a validator on a second line, after a sentence about itself.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError):
        lines = [
            line.removeprefix("ValueError: ").removeprefix("TypeError: ") for line in lines[1:]
        ]
    return " ".join(lines)


def some(names, limit=4):
    """The first few of many names, for a message."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + rest


def not_found(path, expected="folder or file"):
    """An error about a path that leads nowhere, with what to do if a model on the Hub was meant."""
    hint = ""
    if HUB_ID.fullmatch(str(path)):
        name = Path(path).name
        hint = f"; a model on the Hub comes first to here: hf download {path} --local-dir {name}"
    return ValueError(f"{path}: no such {expected}{hint}.")


def read_json(path):
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected it beside the weights.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def find_weights(src):
    """The weight files of a folder, in order of preference safetensors, then pickles.

    Args:
        src: a folder, or a weight file, or the index of a sharded one.

    Returns:
        Paths that together hold every tensor.

    Raises:
        ValueError: there are none, or it is not clear which.
    """
    src = Path(src)
    if src.is_file():
        return _shards(src) if src.name.endswith(".index.json") else [src]
    if not src.is_dir():
        raise not_found(src)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (src / f"{name}.index.json").is_file() and (src / name).is_file():
            # transformers would load the one file, whichever is newer.
            raise ValueError(
                f"{src} holds {name} and {name}.index.json, which are two models' weights; "
                "remove those you do not mean."
            )
        if (src / f"{name}.index.json").is_file():
            return _shards(src / f"{name}.index.json")
        if (src / name).is_file():
            return [src / name]
        # A format's weights may have any name, as long as there is one file of them.
        endings = (".safetensors",) if name.endswith(".safetensors") else PICKLES
        files = [p for p in sorted(src.iterdir()) if p.suffix in endings and p.is_file()]
        files = [p for p in files if not p.name.startswith(NOT_WEIGHTS)]
        if len(files) > 1:
            raise ValueError(
                f"{src} holds several weight files ({some(p.name for p in files)}) and no index; "
                "pass the file you mean."
            )
        if files:
            return files
    raise ValueError(
        f"{src}: expected weights (.safetensors, .bin, .pt or .pth), found none; "
        "pass the folder or the file that holds them."
    )


def _shards(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an index with a weight_map, got none.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}, which is outside of its folder.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing; {index.name} names it as a shard.")
    return [index.parent / name for name in names]


def read_tensors(src, others=None):
    """Every tensor of a checkpoint by name. Code in pickled files is never run.

    Args:
        src: as `find_weights`, or the folder of a run's checkpoint in shards or of an adapter.
        others: a dict to fill with what is not a tensor, by name; None refuses such things.

    Raises:
        ValueError: nothing to read, damaged files, something that is not a tensor, or tensors
            that are quantised, sparse, complex or without values.
    """
    if has_shards(src):
        return read_shards(src)
    if has_adapter(src):
        src, added = Path(src), Path(src) / ADAPTER / WEIGHTS
        config, manifest = read_json(src / ADAPTER / CONFIG), src / "checkpoint.json"
        base = base_of(src, config)
        known = read_json(manifest) if manifest.is_file() else {}
        check_base(src, weight_files(base), known)
        return merge(read_tensors(base), read_tensors(added), config, added)
    tensors = {}
    for path in find_weights(src):
        if path.suffix == ".safetensors":
            found = _load_safetensors(path)
        else:
            found = _load_pickle(path, others)
        for tensor, x in found.items():
            if what := _what_is_odd(x):
                raise ValueError(f"{path}: {tensor} is {what}; save the weights as plain floats.")
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{path} holds {some(twice)}, which another shard holds too.")
        tensors |= found
    return tensors


def in_parts(src):
    """Whether a folder is a checkpoint that `read_tensors` reads and transformers does not."""
    return has_shards(src) or has_adapter(src)


def weight_files(src):
    """The files whose contents `read_tensors` gives, in a fixed order."""
    if has_shards(src):
        return sorted(path for path in (Path(src) / SHARDS).iterdir() if path.is_file())
    if has_adapter(src):
        config = read_json(Path(src) / ADAPTER / CONFIG)
        return [Path(src) / ADAPTER / WEIGHTS, *weight_files(base_of(src, config))]
    return find_weights(src)


def _what_is_odd(x):
    """Why a tensor is no plain one, in words, or None."""
    if x.is_meta:
        return "on the meta device, so it has no values"
    if x.is_quantized or x.dtype not in PLAIN_DTYPES:
        kind = "complex" if x.is_complex() else "quantised"
        return f"{kind} ({str(x.dtype).removeprefix('torch.')})"
    if x.layout != torch.strided or x.is_nested:
        return f"sparse or nested ({str(x.layout).removeprefix('torch.')})"
    return None


def _load_safetensors(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
        remedy = "it is damaged or not fully downloaded: get it again."
        if "dtype" in reason.lower():
            remedy = "save the weights as plain floats."
        raise ValueError(
            f"{path} is not a readable safetensors file ({reason}); {remedy}"
        ) from None


def _load_pickle(path, others):
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError, KeyError):
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and a pickle that runs code is not "
            "opened; save its state_dict() alone, best as safetensors."
        ) from None
    # Trainers put the weights beside other things.
    for name in ("model", "state_dict", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
            tensors = tensors[name]
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(tensors).__name__}.")
    tensors = dict(tensors)
    strange = {name: x for name, x in tensors.items() if not torch.is_tensor(x)}
    if strange and others is None:
        names = some(sorted(map(str, strange)))
        raise ValueError(f"{path}: expected tensors only, but {names} is something else.")
    for name in strange:
        others[name] = tensors.pop(name)
    # A pickle may hold views of one storage, which safetensors cannot.
    for name, x in tensors.items():
        if _what_is_odd(x) is None:
            tensors[name] = x.clone(memory_format=torch.contiguous_format)
    return tensors


def read_config(folder):
    """The architecture and config of one of our checkpoints.

    Args:
        folder: holds config.json.

    Returns:
        (the `zoo.Architecture`, its config).

    Raises:
        ValueError: not a config of ours.
    """
    path = Path(folder) / "config.json"
    fields = read_json(path)
    by_type = {a.config.model_type: a for a in MODELS.values()}
    model_type = fields.get("model_type")
    if model_type not in by_type:
        raise ValueError(
            f"{path}: expected model_type {' or '.join(map(repr, by_type))}, got {model_type!r}; "
            "a foreign checkpoint goes through `zoo convert` first (`zoo convert --list`)."
        )
    architecture = by_type[model_type]
    wanted = architecture.causal_lm.__name__
    classes = fields.get("architectures") or [wanted]
    if wanted not in classes:
        raise ValueError(f"{path}: expected a language model ({wanted}), got {some(classes)}.")
    if fields.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config: the weights are quantised; "
            "give the checkpoint they were made from."
        )
    try:
        return architecture, architecture.config.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def settings(config):
    """The fields of one of our configs that say what the model is, by name, in order."""
    classes = [c for c in type(config).__mro__ if issubclass(c, ZooConfig)]
    own = set().union(*(vars(c).get("__annotations__", {}) for c in classes))
    values = config.to_dict()
    return {n: values[n] for n in type(config).__dataclass_fields__ if n in own & set(values)}


def build_model(architecture, config, tensors, source):
    """The language model around given weights, without a copy of them.

    Args:
        architecture: a `zoo.Architecture`.
        config: its config.
        tensors: weights by our names. Of tied weights the embedding is enough.
        source: where they come from, for messages.

    Returns:
        A model whose parameters are the tensors, in the one dtype that holds all of them exactly.
        Constants of the mathematics have no values: save it, do not run it.

    Raises:
        ValueError: names or shapes that do not fit the config.
    """
    padding = config.pad_token_id
    if padding is not None and not 0 <= padding < config.vocab_size:
        raise ValueError(
            f"{source}: pad_token_id is below vocab_size = {config.vocab_size}, got {padding}; "
            "correct config.json, or set it to null."
        )
    with torch.device("meta"):
        model = architecture.causal_lm(config)
    expected = model.state_dict()
    tied = model._tied_weights_keys if config.tie_word_embeddings else {}
    tensors = dict(tensors)
    for alias, original in tied.items():
        copy = tensors.pop(alias, None)
        if copy is not None and original in tensors and not torch.equal(copy, tensors[original]):
            raise ValueError(
                f"{source}: the config ties {alias} to {original}, but the two differ; "
                "set tie_word_embeddings to false."
            )
        del expected[alias]
    problems = []
    missing, unknown = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing:
        problems.append(f"no {some(missing)}")
    if unknown:
        problems.append(f"no place for {some(unknown)}")
    for name in sorted(expected.keys() & tensors):
        if tensors[name].shape != expected[name].shape:
            shapes = [list(x.shape) for x in (expected[name], tensors[name])]
            problems.append(f"{name} is {shapes[0]} by the config, {shapes[1]} in the file")
        elif not tensors[name].is_floating_point():
            problems.append(f"{name} is {tensors[name].dtype}, not a float (quantised?)")
    if problems:
        raise ValueError(f"{source}: weights and config do not fit: {some(problems, 3)}.")
    dtype = None
    for x in tensors.values():
        dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model


def load_tokenizer(folder):
    """The tokenizer in a folder.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer has its own ways to fail
        raise ValueError(
            f"the tokenizer does not load ({type(error).__name__}: {one_line(error)[:200]}); "
            "replace or remove its files."
        ) from None


def check_tokenizer(tokenizer, vocab_size):
    """Raises a ValueError if a tokenizer has ids that the model does not know."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer has {size} ids, the model's vocab_size is {vocab_size}; "
            "use the tokenizer the model was trained with."
        )


def read_generation_config(folder):
    """What generation_config.json in a folder says, or None if there is none.

    Raises:
        ValueError: it is damaged or contradicts itself.
    """
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    fields = read_json(Path(folder) / "generation_config.json")
    try:
        config = GenerationConfig.from_dict(fields)
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/generation_config.json: {one_line(error)}") from None
    return config
