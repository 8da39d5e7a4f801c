"""The model under test, seen only through what every Hugging Face causal LM offers.

A subject is a name in `zoo.MODELS`, a folder that `AutoModelForCausalLM` loads, or a class. Models
of the zoo and classes are built tiny; a folder is taken with its own size and weights.
"""

import copy
import importlib
import inspect
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from zoo import MODELS

from . import paper_initialization
from .report import BUDGET_SPENT, NotApplicable, OutOfTime, first_line
from .tiny import tiny_config

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
# "cache" is what transformers calls the first two from 5.24 on.
CACHE_ARGUMENTS = ("past_key_values", "cache", "cache_params", "state", "mems")


class Subject:
    """A model that can be built again and again with the same weights.

    Args:
        name: what the report calls it.
        build: seed -> a freshly initialised model.
        pretrained: a model whose weights are to be tested as they are; None: initialised ones,
            moved away from the special values of an initialisation.
        initialization: the statistics the paper's initialisation has, for point 10: parameter name
            pattern (as in fnmatch) -> (mean, standard deviation, "normal", "truncated", "uniform"
            or "constant"). None: not known.
    """

    def __init__(self, name, build, pretrained=None, initialization=None):
        self.name = name
        self.build = build
        self.deadline = None  # of time.perf_counter, after which nothing more is run
        self.pretrained = pretrained
        self._weights = pretrained if pretrained is not None else with_all_parts_active(build(0))
        self.config = self._weights.config
        self.vocab_size = self.config.get_text_config().vocab_size
        self.model_class = cls = type(self._weights)
        self.initialization = initialization
        self.arguments = set(inspect.signature(cls.forward).parameters)
        self.arguments |= set(inspect.signature(type(self._weights.base_model).forward).parameters)
        self.cache_argument = next((x for x in CACHE_ARGUMENTS if x in self.arguments), None)

    @property
    def num_parameters(self):
        """Of its weights."""
        return sum(x.numel() for x in self._weights.parameters())

    @property
    def is_ours(self):
        """Whether it is a model of the zoo, from here or from an exported folder."""
        return str(getattr(self.config, "model_type", "")).startswith("zoo_")

    @property
    def is_remote(self):
        """Whether its code came with its folder."""
        return self.model_class.__module__.startswith("transformers_modules")

    @property
    def can_generate(self):
        """Whether transformers' `generate` takes it."""
        return bool(self.model_class.can_generate())

    def check_time(self):
        """Raises OutOfTime after the deadline."""
        # What is being compiled has no clock.
        if self.deadline is None or torch.compiler.is_compiling():
            return
        if time.perf_counter() > self.deadline:
            raise OutOfTime(BUDGET_SPENT)

    def model(self, dtype=torch.float64, seed=0):
        """The model in eval mode; another seed gives other weights."""
        if seed == 0:
            model = copy.deepcopy(self._weights)
        else:
            model = with_all_parts_active(self.build(seed))
        model = model.to(dtype).eval()
        # Generation of a fixed length: what a checkpoint prefers is not what is tested here.
        model.generation_config = type(model.generation_config)(pad_token_id=0)
        return model

    def shaken(self):
        """Three float64 models whose weights all differ from `model()` by a float32's last bit."""
        for seed in range(3):
            model, noise = self.model(), generator(seed)
            with torch.no_grad():
                for weight in model.parameters():
                    random = torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
                    weight *= 1 + 2**-24 * random
            yield model

    def ids(self, *shape, seed=0):
        """Random token ids; 0 is left out, it pads."""
        return torch.randint(1, self.vocab_size, shape, generator=generator(seed))

    def accepts(self, argument):
        """Whether the model's forward names this argument."""
        return argument in self.arguments

    def require(self, argument):
        """Raises NotApplicable if the model's forward has no such argument."""
        if not self.accepts(argument):
            raise NotApplicable(f"its forward has no argument {argument}")

    def forward(self, model, input_ids=None, cache=None, mask=None, positions=None, **inputs):
        """One forward pass, in the names this model uses.

        Args:
            model: one of `model()`.
            input_ids: [B, T].
            cache: the cache to continue from.
            mask: attention_mask.
            positions: position_ids; left out if the model has no such argument.
            inputs: passed on; an argument the model does not name raises NotApplicable.
        """
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if cache is not None:
            inputs[self.cache_argument] = cache
        if mask is not None:
            inputs["attention_mask"] = mask
        if positions is not None and self.accepts("position_ids"):
            inputs["position_ids"] = positions
        for name in inputs:
            self.require(name)
        self.check_time()
        inputs.setdefault("use_cache", cache is not None)
        return model(**inputs)

    def empty_cache(self, model):
        """A cache before any token, made as `generate` makes it."""
        if self.cache_argument not in CACHE_ARGUMENTS[:3]:
            raise NotApplicable("its forward takes no Cache")
        return DynamicCache(config=model.config)

    def cache_of(self, output, given=None):
        """The cache in a model's output, or the given one if that was brought up to date."""
        cache = None if self.cache_argument is None else getattr(output, self.cache_argument, None)
        if cache is None and given is not None and cache_tensors(given):
            cache = given
        if cache is None:
            raise NotApplicable("its output holds no cache")
        return cache

    def run(self, model, ids, sizes=None, cache=None, mask=None, positions=None, **inputs):
        """Feeds a sequence in pieces of the given sizes, each continuing from the one before.

        Args:
            sizes: lengths of the pieces; None: everything at once.
            mask: [B, past + T]; each piece gets the columns up to its end.
            positions: [B, T]; each piece gets its own columns. So do the tensors in `inputs`.

        Returns:
            (logits of all positions, the cache at the end).
        """
        start, logits = 0, []
        past = 0 if mask is None else mask.shape[1] - ids.shape[1]
        for size in sizes or [ids.shape[1]]:
            end = start + size
            output = self.forward(
                model,
                ids[:, start:end],
                cache,
                None if mask is None else mask[:, : past + end],
                None if positions is None else positions[:, start:end],
                use_cache=True,
                **{name: x[:, start:end] for name, x in inputs.items()},
            )
            cache = self.cache_of(output, cache)
            logits.append(output.logits)
            start = end
        return torch.cat(logits, dim=1), cache


def with_all_parts_active(model):
    """Adds noise to all weights, so that no part is hidden by an initialisation at 0 or 1."""
    noise = generator(1)
    with torch.no_grad():
        for weight in model.parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 100
            weight += torch.randn(weight.shape, generator=noise) * 0.5 * fan_in**-0.5
    return model


def generator(seed):
    """A random generator of its own, so that no check depends on those before it."""
    return torch.Generator().manual_seed(seed)


def cache_tensors(cache):
    """Every tensor a live cache holds, but single numbers, by its path; of any class of cache."""
    found, seen = {}, set()

    def visit(path, value):
        if isinstance(value, torch.Tensor):
            if value.ndim:
                found[path] = value
        elif isinstance(value, (dict, list, tuple)) or hasattr(value, "__dict__"):
            if id(value) in seen or isinstance(value, (type, nn.Module, PretrainedConfig)):
                return
            seen.add(id(value))
            if isinstance(value, (list, tuple)):
                value = dict(enumerate(value))
            elif not isinstance(value, dict):
                value = vars(value)
            for name, child in value.items():
                visit(f"{path}.{name}" if path else str(name), child)

    visit("", cache)
    return found


def held_bytes(tensors):
    """Bytes of memory that tensors keep: those of what they are views of, each counted once."""
    storages = (x.untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def state_tensors(cache):
    """The tensors of a cache that has one state per row, of a size that no length enters.

    Raises:
        NotApplicable: the cache holds keys and values, one per column.
    """
    tensors = cache_tensors(cache)
    if any(path.endswith((".keys", ".values")) for path in tensors):
        raise NotApplicable("its cache grows with the columns, padding included")
    return tensors


def variants_of(name):
    """The settings of a zoo model that are worth checking: name -> fields of its config."""
    return getattr(MODELS[name].config, "variants", None) or {"default": {}}


def zoo_subject(name, variant=None, **fields):
    """A model of the zoo, tiny.

    Args:
        name: its name in `zoo.MODELS`.
        variant: one of its config's `variants`; None: the first.
        fields: of its config, where they are to be others.

    Raises:
        ValueError: no such variant.
    """
    architecture, variants = MODELS[name], variants_of(name)
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ValueError(f"{name} has the variants {', '.join(variants)}, got {variant!r}.")

    def build(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return architecture.causal_lm(
                architecture.config(**{**TINY, **variants[variant], **fields})
            )

    subject = Subject(f"{name}, {variant}", build)
    if name in paper_initialization.TABLES:
        subject.initialization = paper_initialization.TABLES[name](subject.config)
    return subject


def class_subject(path):
    """A class of transformers by its name, or `package.module:ClassName`; its config made small.

    Raises:
        ValueError: no such class, or its config cannot be made small.
    """
    module, _, name = path.rpartition(":")
    cls = getattr(importlib.import_module(module or "transformers"), name)
    if getattr(cls, "config_class", None) is None:
        raise ValueError(f"expected a class of models with a config_class, got {path}.")
    config = tiny_config(cls.config_class)

    def build(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(copy.deepcopy(config))

    subject = Subject(path, build)
    try:
        with torch.no_grad():
            subject.model(torch.float32)(input_ids=subject.ids(1, 2))
    except Exception as error:
        # Of sizes that do not fit together, as likely as not: no verdict follows from that.
        raise ValueError(
            f"{path} does not run with the small sizes chosen here ({first_line(error)}); save a "
            "model of the size you want with save_pretrained and give its folder."
        ) from error
    return subject


def folder_subject(folder, trust_remote_code=False, name=None, **settings):
    """A checkpoint in a folder, with its own weights.

    Args:
        folder: that `AutoModelForCausalLM` loads, or a name on the Hub.
        trust_remote_code: whether code that lies in it may be run.
        name: what the report calls it; None: as the folder.
        settings: for `from_pretrained`.

    Raises:
        ValueError: it does not load, or not whole: what lacks its weights would be made up.
    """
    if Path(folder).is_dir():
        from zoo.hub.folder import check_folder

        check_folder(folder)
    settings |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        pretrained, info = AutoModelForCausalLM.from_pretrained(folder, **settings)
    except Exception as error:  # each kind of model, and of damage, has its own
        raise ValueError(f"{folder} does not load: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder} has no weights for {missing[0]} and {len(missing) - 1} more; what is judged "
            "would be random numbers."
        )

    def build(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return type(pretrained)(copy.deepcopy(pretrained.config))

    return Subject(name or str(folder), build, pretrained)


def hub_subject(name, trust_remote_code=False):
    """A checkpoint on the Hugging Face Hub: OWNER/NAME, with @REVISION where need be.

    Raises:
        ValueError: there is none that can be read; the message says why.
    """
    from zoo.hub.download import NAME, fetch

    if not trust_remote_code:
        return folder_subject(fetch(name), name=name)
    # Code comes with transformers' own download alone.
    match = NAME.fullmatch(name)
    if match is None or match["file"]:
        raise ValueError(f"expected OWNER/NAME or OWNER/NAME@REVISION on the Hub, got {name!r}.")
    return folder_subject(match["repository"], True, name, revision=match["revision"])


def find_subject(model, variant=None, trust_remote_code=False):
    """The subject a command line names.

    Args:
        model: a name in `zoo.MODELS`, a folder, a class of transformers by its name,
            `package.module:ClassName`, or OWNER/NAME on the Hub.
        variant: for a model of the zoo.
        trust_remote_code: whether code that lies in the folder may be run.

    Raises:
        ValueError: it is none of these.
    """
    if model in MODELS:
        return zoo_subject(model, variant)
    if variant is not None:
        raise ValueError(f"only models of the zoo have variants, got {model!r} with {variant!r}.")
    if (Path(model) / "config.json").is_file():
        return folder_subject(model, trust_remote_code)
    if ":" in model or hasattr(transformers, model):
        return class_subject(model)
    if Path(model).is_dir():  # which says what it lacks
        return folder_subject(model, trust_remote_code)
    if not Path(model).exists() and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return hub_subject(model, trust_remote_code)
    raise ValueError(
        f"expected a model of the zoo ({', '.join(MODELS)}), a folder with a config.json, a class "
        "of transformers such as LlamaForCausalLM, package.module:Class, or OWNER/NAME on the Hub, "
        f"got {model!r}."
    )
