"""Adapters of low rank on frozen weights (`[lora]`), through peft.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; with embeddings and norms trained too it is what
LongLoRA does to make contexts longer (Chen et al. 2023, https://arxiv.org/abs/2309.12307). The
weights below are those of `init_from`, which checkpoints do not repeat.
"""

import copy
import math
import warnings
from dataclasses import dataclass, field, fields

from torch import nn

from .recipe import UsageError, nearest
from .zero import is_zero

ADAPTER = "adapter"  # the folder of it in that of a run or checkpoint


@dataclass
class Lora:
    """What the table may say."""

    rank: int = 8
    alpha: float = 16.0  # what is added is multiplied with alpha / rank
    dropout: float = 0.0
    target_modules: list = field(default_factory=list)  # names' ends; empty: all of the mixers
    train_embeddings_and_norms: bool = False
    modules_to_save: list = field(default_factory=list)  # ends of others' names, trained whole too


def check_lora(recipe):
    """The recipe's table as a `Lora`, or None without one.

    Raises:
        UsageError: an unknown key, a value that cannot be, no weights to adapt.
    """
    if not recipe.lora:
        return None
    known = {entry.name: entry for entry in fields(Lora)}
    for key, value in recipe.lora.items():
        if key not in known:
            raise UsageError(f"unknown key {'lora.' + key!r}: {nearest(key, known)}")
        kind = known[key].type
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"lora.{key} is of type {kind.__name__}, got {value!r}.")
        if kind is list and not all(type(item) is str for item in value):
            raise UsageError(f"lora.{key} is a list of strings, got {value!r}.")
    lora = Lora(**recipe.lora)
    if lora.rank < 1 or not 0 < lora.alpha < math.inf or not 0 <= lora.dropout < 1:
        raise UsageError(
            "lora.rank is at least 1, lora.alpha above 0 and lora.dropout in [0, 1), got "
            f"{lora.rank}, {lora.alpha} and {lora.dropout}."
        )
    if not recipe.init_from:
        raise UsageError(
            "[lora] adapts the weights of another model; say which with init_from, or leave it out."
        )
    if recipe.ema_decay:
        raise UsageError("ema_decay averages whole models, got [lora] too; leave out one of them.")
    return lora


def adapt(model, recipe, folder=None, accelerator=None):
    """The model with adapters as the recipe says, or as it is without [lora].

    Args:
        model: the language model, with the weights of `init_from`.
        recipe: of the run.
        folder: of a checkpoint, whose adapter is taken up; None: a fresh one, which adds nothing.
        accelerator: of the run.

    Raises:
        UsageError: peft is not installed, or there are no such modules.
    """
    lora = check_lora(recipe)
    if lora is None:
        return model
    whole = _trained_whole(model, lora)
    linear = [
        f"{path}.{name}"
        for path, mixer in _mixers(model)
        for name, module in mixer.named_modules()
        if isinstance(module, nn.Linear) and not _is_in(f"{path}.{name}", whole)
    ]
    if accelerator and (accelerator.is_fsdp2 or is_zero(accelerator)):
        raise UsageError(
            "[lora] is for weights that each process has whole, got FSDP or DeepSpeed; launch with "
            "recipes/accelerate/ddp.yaml."
        )
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise UsageError(
            "[lora] needs peft; run: pip install 'longzoo[lora]', or peft itself"
        ) from None
    # peft asks the model what transformers has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    if folder:
        return PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True).train()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or linear,
        modules_to_save=whole or None,
        ensure_weight_tying=model.config.tie_word_embeddings and _embeddings(model) in whole,
    )
    try:
        adapted = get_peft_model(model, config).train()
    except ValueError as error:
        raise UsageError(f"[lora]: {' '.join(str(error).split())}") from None
    config.base_model_name_or_path = recipe.init_from  # as it was said, not where the file lies
    return adapted


def _mixers(model):
    return [(name, x) for name, x in model.named_modules() if name.rpartition(".")[2] == "mixer"]


def _trained_whole(model, lora):
    """Names of the modules that are trained as they are, none of them inside of another.

    Raises:
        UsageError: there is no such module, or an adapter would lie in one.
    """
    modules = {name: x for name, x in model.named_modules() if name and [*x.parameters()]}
    named = {name: _ending(modules, name) for name in lora.modules_to_save}
    found = {name for names in named.values() for name in names}
    for said, names in named.items():
        if not names:
            ends = {name.rpartition(".")[2] for name in modules}
            raise UsageError(
                f"lora.modules_to_save: no module's name ends in {said!r}: {nearest(said, ends)}"
            )
    for said in lora.target_modules:
        both = [name for name in _ending(modules, said) if _is_in(name, found)]
        if both:
            raise UsageError(
                f"lora.target_modules and lora.modules_to_save both say {both[0]}, which is "
                "trained either through an adapter or whole; leave it out of one of them."
            )
    kinds = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    if lora.train_embeddings_and_norms:
        found |= {name for name in modules if isinstance(modules[name], kinds)}
    if model.config.tie_word_embeddings and "lm_head" in found:  # the same weights, once
        found = found - {"lm_head"} | {_embeddings(model)}
    outer = {name: name.rpartition(".")[0] for name in found}
    return sorted(name for name in found if not _is_in(outer[name], found))


def _embeddings(model):
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def _ending(names, end):
    return [name for name in names if f".{name}".endswith(f".{end}")]


def _is_in(name, modules):
    """Whether a module is one of these or inside of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def save_adapter(model, folder):
    """Writes config and adapter of a model, beside each other as checkpoints have them."""
    model.get_base_model().config.save_pretrained(folder)
    _save(model, folder / ADAPTER)


def save_merged(model, folder):
    """Writes a model with what the adapter adds in its weights, and the adapter beside it."""
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    _save(model, folder / ADAPTER)


def _save(model, folder):
    # Embeddings are in the adapter where they are trained; peft would ask the Hub about others.
    model.save_pretrained(folder, save_embedding_layers=False)
