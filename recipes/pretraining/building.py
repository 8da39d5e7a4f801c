"""From a recipe to a tokenizer and a model, fresh or from a checkpoint."""

import dataclasses
import typing
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import zoo
from tasks import load
from zoo.hub.folder import current_names, in_parts, read_tensors, settings

from .finding import did_you_mean, hub_answers, is_path
from .recipe import UsageError, nearest

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIAL_TOKENS = ("pad", "bos", "eos")
logging.disable_progress_bar()  # a bar for every file written would break the run's own line


def load_tokenizer(name, trust_remote_code=None):
    """A tokenizer from a folder, a folder of the repository, or the Hub.

    Args:
        name: of it.
        trust_remote_code: whether code that comes with it may be run; None: a terminal is asked.

    Raises:
        UsageError: there is none of that name.
    """
    path = Path(name).expanduser()
    folders = [folder for folder in (path, REPOSITORY / name) if folder.is_dir()]
    hint = "" if folders else did_you_mean(name) or did_you_mean(name, REPOSITORY)
    online = True
    if not folders and (is_path(name) or path.is_file()):
        what = "a file, not a folder" if path.is_file() else "no such folder"
        raise UsageError(f"no tokenizer at {name}: {what}; give a folder or a Hub id.{hint}")
    try:
        online = bool(folders) or hub_answers(name, "model")
        options = {"local_files_only": not online, "trust_remote_code": trust_remote_code}
        return AutoTokenizer.from_pretrained(*folders[:1] or [name], **options)
    except Exception as error:  # of transformers, of tokenizers, of whoever wrote the files
        reason = str(error).strip().split("\n")[0]
        if folders:
            files = ", ".join(sorted(file.name for file in folders[0].iterdir())[:9])
            hint = f" The folder holds {files or 'nothing'}."
        elif not online:
            reason = "the Hub cannot be reached, and nothing of that name is in its cache here."
        raise UsageError(f"no tokenizer at {name}: {reason}{hint}") from None


def tokenizer_of(recipe):
    """The tokenizer that a recipe names; of a task, one whose words are the numbers of its ids."""
    if not recipe.task:
        return load_tokenizer(recipe.tokenizer)
    words = {str(number): number for number in range(load(recipe.task).vocab_size)}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def vocabulary_size(tokenizer):
    """How many embeddings the tokenizer needs: its ids may have gaps, its length counts tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def _may_list_none(kinds):
    """Whether None may stand in a list of a field of these types."""
    lists = (typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list)
    return any(type(None) in typing.get_args(kind) for kind in lists)


def build_config(recipe, tokenizer, base=None):
    """The config of the recipe's model; vocabulary and special tokens default to the tokenizer's.

    Args:
        recipe: its model table says what is not a default.
        tokenizer: of the run.
        base: a config whose fields stand where the recipe has none; None: the architecture's.

    Raises:
        UsageError: no such architecture, a field it does not have, a vocabulary too small.
    """
    if recipe.architecture not in zoo.MODELS:
        raise UsageError(
            f"unknown architecture {recipe.architecture!r}: "
            f"{nearest(recipe.architecture, zoo.MODELS)}"
        )
    architecture = zoo.MODELS[recipe.architecture]
    types = {field.name: field.type for field in dataclasses.fields(architecture.config)}
    model = dict(recipe.model)
    for key, value in model.items():
        if key not in types:
            raise UsageError(
                f"unknown key {'model.' + key!r} for {recipe.architecture}: {nearest(key, types)}"
            )
        if types[key] is float and type(value) is int:  # TOML's 0 is not its 0.0
            model[key] = float(value)
        kinds = typing.get_args(types[key])
        if value == "none" and type(None) in kinds:  # which TOML cannot say
            model[key] = None
        elif isinstance(value, list) and _may_list_none(kinds):
            model[key] = [None if x == "none" else x for x in value]
    inherited = settings(base) if base else {}
    for key, value in model.items():
        if isinstance(value, dict) and inherited.get(key):  # such as the base of a rotation
            model[key] = {**inherited[key], **value}
    needed = vocabulary_size(tokenizer)
    vocab_size = model.setdefault("vocab_size", inherited.get("vocab_size", needed))
    if type(vocab_size) is int and vocab_size < needed:
        remedy = "leave it out to take the tokenizer's."
        if base:
            remedy = f"say --tokenizer with the one of the weights in {recipe.init_from}."
        raise UsageError(
            f"model.vocab_size must be at least {needed}, the size of the tokenizer "
            f"{recipe.tokenizer or 'of the task'}, got {vocab_size}; {remedy}"
        )
    special = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_TOKENS
    }
    try:
        return architecture.config(**{**inherited, **special, **model})
    except Exception as error:  # a strict config raises errors of huggingface_hub and of its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"the model table does not fit {recipe.architecture}: {reason}") from error


def build_model(recipe, config, folder=None):
    """The recipe's model with fresh weights, the same for the same seed, or with a folder's.

    Raises:
        UsageError: the folder's weights are not those of the model.
    """
    set_seed(recipe.seed)
    model_class = zoo.MODELS[recipe.architecture].causal_lm
    if folder is None:
        model = model_class(config)
    else:
        model, loaded = _load(
            model_class,
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below, with the others
            output_loading_info=True,
        )
        _check_loaded(folder, loaded)
        for role in SPECIAL_TOKENS:  # those of the tokenizer that it is trained with
            name = f"{role}_token_id"
            setattr(model.generation_config, name, getattr(config, name))
    model.train()
    if hasattr(model, "loss_chunk_size"):
        model.loss_chunk_size = recipe.loss_chunk_size or None
    model.z_loss = recipe.z_loss
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.base_model.replay_segment_length = recipe.replay_segment_length or None
    return model


def _load(model_class, folder, **options):
    try:
        if in_parts(folder):
            weights = current_names(folder, read_tensors(folder))
            return model_class.from_pretrained(None, state_dict=weights, **options)
        return model_class.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the weights in {folder} cannot be read: {reason}") from None


def _check_loaded(folder, loaded):
    """Refuses a folder from which a weight was not loaded, or not all of it."""
    wrong = {
        "missing": sorted(loaded["missing_keys"]),
        "unknown": sorted(loaded["unexpected_keys"]),
        "of another shape": sorted(name for name, *_ in loaded["mismatched_keys"]),
    }
    said = [f"{len(names)} {what}, as {names[0]}" for what, names in wrong.items() if names]
    if said or loaded["error_msgs"]:
        raise UsageError(
            f"the weights in {folder} are not those of its model "
            f"({'; '.join(said or loaded['error_msgs'])}); take others, or begin again without."
        )


def parameter_groups(model, recipe):
    """The optimizer's groups, as model and recipe want them: weight decay, factors on the rate.

    Raises:
        UsageError: the recipe names parameters that there are not.
    """
    try:
        groups = model.optimizer_groups(recipe.learning_rate_scales)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [
        {
            "params": group["params"],
            "weight_decay": recipe.weight_decay if group["decays"] else 0.0,
            "lr": recipe.learning_rate * group["lr_scale"],
            "lr_scale": group["lr_scale"],
        }
        for group in groups
    ]
