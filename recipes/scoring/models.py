"""Any causal language model with its tokenizer, from a folder or the Hub."""

import importlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import zoo  # noqa: F401  transformers learns of its architectures
from pretraining.building import load_tokenizer
from pretraining.checkpointing import list_checkpoints
from pretraining.finding import did_you_mean, hub_answers, is_path
from pretraining.recipe import Recipe, UsageError
from zoo.hub.files import is_tokenizer, read_fields
from zoo.hub.folder import in_parts, read_config, read_tensors
from zoo.hub.origin import RECIPE_ROWS, origin_of_checkpoint

# Of a table of learned positions, in transformers' models and in ours.
TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb)$")


@dataclass
class Subject:
    """A model that is evaluated.

    Attributes:
        name: as it was called.
        model: in eval mode, on its device.
        tokenizer: of transformers; None: its tokens are no text's.
        record: what its run wrote into run.json or checkpoint.json; {} of no run.
    """

    name: str
    model: nn.Module
    tokenizer: object
    record: dict

    @property
    def recipe(self):
        """The recipe of the run that trained it, or None."""
        known = {entry.name for entry in fields(Recipe)}
        values = self.record.get("recipe")
        return Recipe(**{k: v for k, v in values.items() if k in known}) if values else None

    @property
    def num_positions(self):
        """How many positions a table of learned ones has; None without one."""
        tables = [
            module.num_embeddings
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and TABLE.search(name)
        ]
        # A table may have a few rows more than there are positions.
        return min([*tables, self.declared_length or tables[0]]) if tables else None

    @property
    def trained_length(self):
        """Tokens per window in training, where a run or an export says it, else None."""
        if self.recipe:
            return self.recipe.sequence_length
        rows = dict(origin_of_checkpoint(self.name).training) if Path(self.name).is_dir() else {}
        said = rows.get(RECIPE_ROWS["sequence_length"], "")
        return int(said) if said.isdigit() else None

    @property
    def declared_length(self):
        """The longest text that the config names, else None."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def described(self):
        """What it is, for the record."""
        parameters = {id(p): p.numel() for p in self.model.parameters()}
        embeddings = {
            id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)
        }
        return {
            "model": self.name,
            "class": type(self.model).__name__,
            "model_type": self.model.config.model_type,
            "parameters": sum(parameters.values()),
            "parameters_without_embeddings": sum(
                count for key, count in parameters.items() if key not in embeddings
            ),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "trained_length": self.trained_length,
            "declared_length": self.declared_length,
        }


def load_subject(name, device, dtype="auto", trust_remote_code=False, tokenizer=""):
    """Loads a model and its tokenizer.

    Args:
        name: a folder (of a run, a checkpoint, an export, any that transformers loads) or a Hub id.
        device: where it goes, as torch calls it.
        dtype: as torch calls it; "auto": as the weights are.
        trust_remote_code: whether code that comes with the model may be run.
        tokenizer: another one's folder or Hub id; '': the model's own.

    Raises:
        UsageError: there is no such model or tokenizer, or it does not fit together.
    """
    name = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    online = _find(name)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not online}
    logging.set_verbosity_error()  # what matters of its warnings is refused below
    try:
        config = AutoConfig.from_pretrained(name, **options)
        given = {"config": config, "dtype": dtype, "output_loading_info": True}
        if in_parts(name):
            model_class = read_config(name)[0].causal_lm
            model, loaded = model_class.from_pretrained(
                None, state_dict=read_tensors(name), **given
            )
        else:
            model, loaded = AutoModelForCausalLM.from_pretrained(name, **given, **options)
    except Exception as error:  # of transformers, of safetensors, of code that came with the model
        raise UsageError(f"no model at {name}: {_reason(error, name, online)}") from None
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UsageError(
            f"the weights at {name} lack {len(missing)} that a {type(model).__name__} has, as "
            f"{missing[0]}, which would be drawn at random; take a whole model."
        )
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"no device {device!r} here: {reason}; choose another --device.") from None
    record = read_fields(Path(name) / "run.json") or read_fields(Path(name) / "checkpoint.json")
    found = None
    if tokenizer or not (record.get("recipe") or {}).get("task"):
        if not tokenizer and Path(name).is_dir() and not any(map(is_tokenizer, _files(name))):
            raise UsageError(
                f"no tokenizer at {name}: the folder holds {', '.join(_files(name)[:9])}; say "
                "where it is with --tokenizer."
            )
        found = load_tokenizer(tokenizer or name, trust_remote_code)
    return Subject(name, model.eval(), found, record)


def _files(name):
    return sorted(path.name for path in Path(name).iterdir())


def _find(name):
    """Refuses what cannot be a model; returns whether the Hub is to be asked."""
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return False
        checkpoints = list_checkpoints(path)
        hint = f" Its newest checkpoint is {checkpoints[-1][1]}." if checkpoints else ""
        held = ", ".join(_files(name)[:9]) or "nothing"
        raise UsageError(
            f"no model at {name}: a model's folder has a config.json, this one holds {held}.{hint}"
        )
    hint = did_you_mean(name)
    if path.is_file() or is_path(name):
        what = "a file, not a folder" if path.is_file() else "no such folder"
        raise UsageError(f"no model at {name}: {what}; give a folder or a Hub id.{hint}")
    try:
        return hub_answers(name, "model")
    except UsageError as error:
        raise UsageError(f"no model at {name}: {error}{hint}") from None


def _reason(error, name, online):
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "code comes with it; say --trust_remote_code if you trust whoever wrote it."
    if not online and not Path(name).is_dir():
        return "the Hub cannot be reached, and nothing of that name is in its cache here."
    if isinstance(error, json.JSONDecodeError):
        return f"its config.json is not JSON ({text})."
    return text[:300]


def import_all(names):
    """Imports modules that make their models known to transformers.

    Raises:
        UsageError: there is no such module, or it does not import.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--import {name}: {error}; install it, or leave it out.") from None


def find_device(name):
    """A device by name; '': an accelerator if there is one.

    Raises:
        UsageError: torch knows no such device.
    """
    if not name:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is cpu, cuda, cuda:1, mps ..., got {name!r}.") from None
