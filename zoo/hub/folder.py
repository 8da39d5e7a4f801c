"""Model folders: reading weights, configs and tokenizers, with checks."""

import functools
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig

from .. import MODELS
from ..core.base import ZooConfig
from ..core.versions import current_name, renamed_weights
from .adapters import ADAPTER, CONFIG, WEIGHTS, base_of, check_base, has_adapter, merge
from .files import check_tokenizer_files
from .guard import check_file, check_numbers, check_pickle, empty_model, parse_json
from .lazy import are_equal, cast, value_of
from .messages import not_found, one_line, some
from .shards import has_shards, open_shards, shard_files
from .tensors import open_files

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
# Fields of `zoo.Architecture`: models with a whole set of weights that are no language models.
CLASSIFIERS = ("sequence_classifier", "token_classifier", "question_answerer")
DTYPES = ("float32", "bfloat16", "float16")  # that weights are written in, if asked


def read_json(path, allow_nan=False):
    """A JSON object from a file.

    Args:
        path: of the file.
        allow_nan: let it have NaN and Infinity, which are no JSON, for numbers.

    Raises:
        ValueError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = parse_json(path, allow_nan)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected it beside the weights.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def check_folder(folder):
    """Checks what the files of any model's folder claim, before a library believes it.

    Args:
        folder: of a model of whatever class.

    Raises:
        ValueError: a config that is none, or of sizes that no machine holds; an index that leads
            out of the folder; no file where there should be one; or weights that would unpack to
            far more than they are.
    """
    folder = Path(folder)
    path = folder / "config.json"
    # Others write Infinity for what has no limit.
    fields = read_json(path, allow_nan=True)
    check_numbers(fields, path)
    if not isinstance(fields.get("model_type", ""), str):
        raise ValueError(f"{path}: expected a name for model_type, got {fields['model_type']!r}.")
    for name in ("model.safetensors", "pytorch_model.bin"):
        check_file(folder / name)
        check_file(folder / f"{name}.index.json")
        if (folder / f"{name}.index.json").is_file():
            _shards(folder / f"{name}.index.json")
    for ending in PICKLES:
        for pickled in folder.glob(f"*{ending}"):
            check_pickle(pickled)


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
        check_file(src / name)
        check_file(src / f"{name}.index.json")
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
    odd = [place for place in weight_map.values() if not isinstance(place, str)]
    if odd:
        raise ValueError(
            f"{index} names {str(odd[0])[:80]} as a shard, which is no name of a file."
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{index} names the shard {name!r}, which is outside of its folder.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing; {index.name} names it as a shard.")
    return [index.parent / name for name in names]


def open_tensors(src, others=None):
    """Every tensor of a checkpoint by name, lazy: shapes and dtypes are known, values not yet read.

    Args:
        src: as `find_weights`, or the folder of a run's checkpoint in shards or of an adapter.
        others: a dict to fill with what is not a tensor, by name; None refuses such things.

    Raises:
        ValueError: nothing to read, damaged files, something that is not a tensor, or tensors
            that are quantised, sparse, complex or without values. Of damage within a shard it is
            raised when that is read.
    """
    if has_shards(src):
        return open_shards(src)
    if has_adapter(src):
        src, added = Path(src), Path(src) / ADAPTER / WEIGHTS
        config, manifest = read_json(src / ADAPTER / CONFIG), src / "checkpoint.json"
        base = base_of(src, config)
        known = read_json(manifest) if manifest.is_file() else {}
        check_base(src, weight_files(base), known)
        return merge(open_tensors(base), open_tensors(added), config, added)
    return open_files(find_weights(src), others)


def read_tensors(src, others=None):
    """Every tensor of a checkpoint by name, with its values; otherwise as `open_tensors`."""
    return {name: value_of(x) for name, x in open_tensors(src, others).items()}


def in_parts(src):
    """Whether a folder is a checkpoint that `read_tensors` reads and transformers does not."""
    return has_shards(src) or has_adapter(src)


def weight_files(src):
    """The files whose contents `read_tensors` gives, in a fixed order."""
    if has_shards(src):
        return shard_files(src)
    if has_adapter(src):
        config = read_json(Path(src) / ADAPTER / CONFIG)
        return [Path(src) / ADAPTER / WEIGHTS, *weight_files(base_of(src, config))]
    return find_weights(src)


def read_config(folder, classifiers=False):
    """The architecture and config of one of our checkpoints.

    Args:
        folder: holds config.json.
        classifiers: whether a model with one of `CLASSIFIERS` will do, beside a language model.

    Returns:
        (the `zoo.Architecture`, its config).

    Raises:
        ValueError: not a config of ours, or of a model with another head.
    """
    path = Path(folder) / "config.json"
    fields = read_json(path)
    by_type = {a.config.model_type: a for a in MODELS.values()}
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise ValueError(
            f"{path}: expected model_type {' or '.join(map(repr, by_type))}, got {model_type!r}; "
            "a foreign checkpoint goes through `zoo convert` first (`zoo convert --list`)."
        )
    architecture = by_type[model_type]
    wanted = architecture.causal_lm.__name__
    classes = fields.get("architectures") or [wanted]
    classes = classes if isinstance(classes, list) else [classes]
    known = [getattr(architecture, name).__name__ for name in CLASSIFIERS]
    if wanted not in classes and not (classifiers and set(known) & set(map(str, classes))):
        others = f" or a classifier ({', '.join(known)})" if classifiers else ""
        raise ValueError(
            f"{path}: expected a language model ({wanted}){others}, got {some(classes)}."
        )
    if fields.get("quantization_config"):
        raise ValueError(
            f"{path} has a quantization_config: the weights are quantised; "
            "give the checkpoint they were made from."
        )
    check_numbers(fields, path)
    try:
        return architecture, architecture.config.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def head_of(architecture, config):
    """Which of an architecture's classes a config is of: "causal_lm", or one of `CLASSIFIERS`."""
    names = config.architectures or []
    heads = {getattr(architecture, name).__name__: name for name in CLASSIFIERS}
    return next((heads[name] for name in names if name in heads), "causal_lm")


def current_names(folder, tensors):
    """Weights of one of our checkpoints by the names that they have in this version.

    Args:
        folder: holds config.json, which says of which version it is.
        tensors: its weights by name.
    """
    fields = read_json(Path(folder) / "config.json")
    renamed = renamed_weights(fields, fields.get("model_type"))
    return {current_name(name, renamed): x for name, x in tensors.items()}


def settings(config):
    """The fields of one of our configs that say what the model is, by name, in order."""
    classes = [c for c in type(config).__mro__ if issubclass(c, ZooConfig)]
    own = set().union(*(vars(c).get("__annotations__", {}) for c in classes))
    values = config.to_dict()
    return {n: values[n] for n in type(config).__dataclass_fields__ if n in own & set(values)}


def build_model(architecture, config, tensors, source, dtype=None):
    """The outline of the model that given weights make, and the weights it is to have.

    Args:
        architecture: a `zoo.Architecture`.
        config: its config.
        tensors: weights by our names, lazy or not. Of tied weights the embedding is enough.
        source: where they come from, for messages.
        dtype: that they are rounded to. None: the one that holds all of them exactly.

    Returns:
        (the model on the meta device, name -> tensor, in the order and the dtype of the model, lazy
        as they came. Of tied weights the embedding alone). If a number is too large for the
        dtype, reading its tensor raises a ValueError.

    Raises:
        ValueError: names or shapes that do not fit the config.
    """
    padding = config.pad_token_id
    if padding is not None and not 0 <= padding < config.vocab_size:
        raise ValueError(
            f"{source}: pad_token_id is below vocab_size = {config.vocab_size}, got {padding}; "
            "correct config.json, or set it to null."
        )
    model_class = getattr(architecture, head_of(architecture, config))
    model = empty_model(model_class, config, source, len(tensors))
    expected = model.state_dict()
    # A head that is not tied to the embedding names nothing here.
    tied = (config.tie_word_embeddings and model._tied_weights_keys) or {}
    tensors = dict(tensors)
    for alias, original in tied.items():
        copy = tensors.pop(alias, None)
        if copy is not None and original in tensors and not are_equal(copy, tensors[original]):
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
    dtype = dtype or common_dtype(tensors.values())
    model.to(dtype).tie_weights()
    return model, {name: cast(tensors[name], dtype, f"{source}: {name}") for name in expected}


def find_dtype(name):
    """The dtype of a name that weights may be written in, or None of None.

    Raises:
        ValueError: another name.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {', '.join(DTYPES)} or none, as in the source; got {name!r}.")
    return None if name is None else getattr(torch, name)


def rounding(tensors, dtype):
    """Which dtypes lose digits in another one, in words ("from float32 to bfloat16"), or None.

    Args:
        tensors: of any dtypes.
        dtype: that they are written in; None loses nothing.
    """
    wide = {x.dtype for x in tensors if dtype and torch.promote_types(x.dtype, dtype) != dtype}
    if not wide:
        return None
    names = sorted(str(dtype).removeprefix("torch.") for dtype in wide)
    return f"from {' and '.join(names)} to {str(dtype).removeprefix('torch.')}"


def common_dtype(tensors):
    """The dtype that holds the numbers of all of some tensors exactly."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def load_tokenizer(folder):
    """The tokenizer in a folder.

    Raises:
        ValueError: it cannot be loaded, or needs code of its own, which is never run.
    """
    check_tokenizer_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
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
    check_file(Path(folder) / "generation_config.json")
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    fields = read_json(Path(folder) / "generation_config.json")
    try:
        config = GenerationConfig.from_dict(fields)
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/generation_config.json: {one_line(error)}") from None
    return config
