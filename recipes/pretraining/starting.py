"""Where a run's first weights come from: drawn afresh, or those of another model (`init_from`)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from zoo.hub.folder import read_config, settings, weight_files
from zoo.hub.origin import origin_of_checkpoint

from .building import build_config
from .caching import file_hashes
from .checkpointing import list_checkpoints
from .finding import did_you_mean, hub_answers, is_path
from .lora import check_lora
from .recipe import UsageError

# Weights of the same shapes are read otherwise with another number of heads.
READS_WEIGHTS = frozenset({"num_attention_heads", "num_key_value_heads", "num_key_heads"})


@dataclass
class Beginning:
    """What a run begins with, or goes on with.

    Attributes:
        config: of the model.
        folder: holds its weights; None: they are drawn.
        record: of `init_from`, for run.json and checkpoints; None without it.
    """

    config: object
    folder: Path | None = None
    record: dict | None = None


def beginning(recipe, tokenizer, checkpoint, cache_dir):
    """Finds what a run begins with: its own checkpoint, else `init_from`, else nothing.

    Args:
        recipe: of the run.
        tokenizer: of the run.
        checkpoint: what is continued; it holds all that was taken from `init_from`, unless there
            are adapters, which lie on those weights.
        cache_dir: where hashes of large files are remembered.

    Returns:
        A `Beginning`.

    Raises:
        UsageError: there are no such weights, or they are not those of the recipe's model.
    """
    if checkpoint.folder and not recipe.lora:
        _, config = _read_config(checkpoint.folder)
        return Beginning(config, checkpoint.folder, checkpoint.manifest.get("init_from"))
    check_lora(recipe)
    if not recipe.init_from:
        return Beginning(build_config(recipe, tokenizer))
    config, folder, changed = config_of_source(recipe, tokenizer)
    files = _weight_files(folder)
    hashes = file_hashes(files, cache_dir)
    begun = checkpoint.manifest.get("init_from")
    record = {
        "source": recipe.init_from,
        "sha256": {file.name: value for file, value in zip(files, hashes)},
        "changed": changed,
    }
    if not Path(recipe.init_from).expanduser().is_dir():  # of the Hub, whose cache names revisions
        record |= {"base_model": recipe.init_from, "revision": folder.name}
    origin = origin_of_checkpoint(folder)
    for name in ("license", "license_name", "license_link", "base_model"):
        if getattr(origin, name):
            record.setdefault(name, getattr(origin, name))
    if begun and begun["sha256"] != record["sha256"]:
        raise UsageError(
            f"init_from: the weights in {recipe.init_from} are others than those that the adapter "
            f"in {checkpoint.folder} was trained on; put them back."
        )
    return Beginning(config, folder, record)


def config_of_source(recipe, tokenizer):
    """The config of `init_from` with what the recipe's model table changes of it.

    Returns:
        (the config, the folder, descriptions "field: old -> new").

    Raises:
        UsageError: no such folder, another architecture or tokenizer, a change that makes other
            weights of it.
    """
    folder = _find_folder(recipe.init_from)
    architecture, old = _read_config(folder)
    if architecture.name != recipe.architecture:
        raise UsageError(
            f"init_from: {recipe.init_from} holds a model of the architecture "
            f"{architecture.name!r}, the recipe says {recipe.architecture!r}; say --architecture "
            f"{architecture.name}, or take other weights."
        )
    _check_tokenizer(folder, tokenizer, recipe)
    config = build_config(recipe, tokenizer, old)
    before, after = settings(old), settings(config)
    changed = [name for name in after if name in recipe.model and after[name] != before[name]]
    described = [f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed]
    other = _shapes(architecture, config).items() ^ _shapes(architecture, old).items()
    if other or READS_WEIGHTS & {*changed}:
        what = f" ({min(name for name, _ in other)} would be another)" if other else ""
        raise UsageError(
            f"init_from: with {'; '.join(described)} the weights in {recipe.init_from} mean "
            f"nothing{what}; leave out of the model table what made them, and keep what may "
            "change: windows, rope_parameters, dropout and the like."
        )
    return config, folder, described


def _shapes(architecture, config):
    """The shape of each weight of a model, without memory for one."""
    with torch.device("meta"):
        model = architecture.causal_lm(config)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _find_folder(name):
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    hint = did_you_mean(name)
    if path.is_file() or is_path(name):
        what = "a file, not a folder" if path.is_file() else "no such folder"
        raise UsageError(f"init_from: {name} is {what}; give a folder or a Hub id.{hint}")
    online = True
    try:
        online = hub_answers(name, "model")
        # No code: the model is zoo's.
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.md"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not online))
    except UsageError as error:
        raise UsageError(f"init_from: {error}{hint}") from None
    except Exception as error:  # of the Hub's client and of the network
        reason = " ".join(str(error).split())
        if not online:
            reason = "the Hub cannot be reached, and nothing of that name is in its cache here."
        raise UsageError(f"init_from: no model {name}: {reason}{hint}") from None


def _read_config(folder):
    try:
        return read_config(folder)
    except ValueError as error:
        raise UsageError(f"no weights to begin with: {error}{_instead(folder)}") from None


def _weight_files(folder):
    try:
        return weight_files(folder)
    except ValueError as error:
        raise UsageError(f"no weights to begin with: {error}{_instead(folder)}") from None


def _instead(folder):
    """For a run that is not finished: where its weights are."""
    checkpoints = list_checkpoints(folder)
    return f" Its newest checkpoint is {checkpoints[-1][1]}." if checkpoints else ""


def _check_tokenizer(folder, tokenizer, recipe):
    """Refuses a tokenizer whose ids are not those that the weights were trained on."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    try:
        known = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except Exception:  # code of its own, which is not run; without it there is nothing to compare
        print(f"init_from: the tokenizer in {folder} does not load, so it is not compared")
        return
    ours = tokenizer.get_vocab()
    for token, number in known.items():
        if ours.get(token) != number:
            raise UsageError(
                f"init_from: the token {token!r} is {number} for the weights in "
                f"{recipe.init_from} and {ours.get(token)} for the tokenizer {recipe.tokenizer}; "
                f"say --tokenizer {recipe.init_from}, or one that adds to it."
            )
