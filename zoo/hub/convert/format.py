"""What a format file is made of: reading a foreign config and foreign weights to the last name."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from ..lazy import value_of
from ..messages import some

REQUIRED = object()
MAKE_A_TOKENIZER = (
    "make one of transformers that gives the ids it was trained on, and save_pretrained it to {dst}"
)


class Fields:
    """A foreign config, read field by field, so that what nobody read is noticed.

    Args:
        values: the file's content.
        file: its name, for messages.

    Attributes:
        notes: what was left out and why, for the report.
        is_rounded: whether weights had to be computed, so that not all are theirs bit for bit.
    """

    def __init__(self, values, file="config.json"):
        self.values = dict(values)
        self.file = file
        self.unread = set(values)
        self.notes = []
        self.is_rounded = False

    def take(self, name, default=REQUIRED, kind=object):
        """The value of a field; `default` where the format has one.

        Args:
            name: of the field.
            default: if it is missing.
            kind: a type to insist on, where the value is computed with.

        Raises:
            ValueError: the field is missing and has no default, or is not of its kind.
        """
        self.unread.discard(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.file} has no {name}, which this format needs.")
        if not isinstance(value, kind):
            raise ValueError(f"{self.file} has {name} = {value!r}, which is not of the right type.")
        return value

    def refuse(self, name, reason):
        """Raises a ValueError if a field is set: we do not compute what it asks for."""
        value = self.take(name, None)
        if value:
            raise ValueError(f"{self.file} has {name} = {value!r}: {reason}.")

    def drop(self, reason, *names):
        """Leaves out fields that do not change what the model computes, and notes the set ones."""
        values = {name: self.take(name, None) for name in names}
        listed = ", ".join(f"{name} = {value!r}" for name, value in values.items() if value)
        if listed:
            self.notes.append(f"left out {listed}: {reason}")

    def finish(self):
        """Raises a ValueError for fields nobody read that are set and could change the function."""
        known = _general_fields() if self.file == "config.json" else set()
        unknown = [name for name in self.unread - known if self.values[name]]
        if unknown:
            listed = some(f"{name} = {self.values[name]!r}" for name in sorted(unknown))
            raise ValueError(
                f"{self.file} has fields this converter does not know: {listed}; remove those that "
                "do not change what the model computes."
            )


def _general_fields():
    """What transformers may write into any config.json; none of it changes the function."""
    general = {"auto_map", "model_type", "torch_dtype", "_name_or_path", "is_decoder"}
    return general | set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict())


class Weights:
    """Tensors of one side, taken one by one, so that those nobody took are noticed.

    Args:
        tensors: by their own names.
        others: what else the file holds, by name.
    """

    def __init__(self, tensors, others=None):
        self.tensors = tensors
        self.others = others or {}
        self.untaken = set(tensors)
        self.missing = []

    def take(self, *names, change=None):
        """A tensor, or None, to be complained about in `finish`, if there is none of that name.

        Args:
            names: its name, or those of several that `change` makes one of.
            change: turns it into another.

        Raises:
            ValueError: `change` cannot: it is of another shape.
        """
        missing = [name for name in names if name not in self.tensors]
        self.missing += missing
        self.untaken -= set(names)
        if missing:
            return None
        tensors = [self.tensors[name] for name in names]
        if change is None:
            return tensors[0]
        try:
            return change(*tensors).contiguous()
        except (RuntimeError, IndexError):
            shapes = some(f"{name} of shape {list(x.shape)}" for name, x in zip(names, tensors))
            raise ValueError(
                f"{shapes} does not fit what else the checkpoint says; "
                "is this the right format, and whole?"
            ) from None

    def shape(self, name, dims=None):
        """The shape of a tensor that sizes follow from.

        Args:
            name: of the tensor.
            dims: how many dimensions it has.

        Raises:
            ValueError: it is missing or has another number of dimensions.
        """
        if name not in self.tensors:
            raise ValueError(f"the weights have no {name}, which this format needs.")
        shape = self.tensors[name].shape
        if dims is not None and len(shape) != dims:
            raise ValueError(f"{name} has {dims} dimensions, got {list(shape)}.")
        return shape

    def drop_constant(self, name, expected, absolute=0.0):
        """Leaves out a stored constant, if there is one, after checking that ours is the same.

        Args:
            name: theirs.
            expected: our value, in float64.
            absolute: rounding to allow for beside that of the tensor's dtype.

        Raises:
            ValueError: theirs is another.
        """
        if name not in self.tensors:
            return
        value = self.take(name)
        # Theirs was computed in float32, through a few roundings.
        relative = max(1e-5, 2 * torch.finfo(value.dtype).eps)
        same = value.shape == expected.shape and torch.allclose(
            value.double(), expected.double(), rtol=relative, atol=absolute
        )
        if not same:
            raise ValueError(
                f"{name} is {_start_of(value)}, but by the config it would be "
                f"{_start_of(expected)}; correct the config, or the weights are of another model."
            )

    def finish(self):
        """Raises a ValueError for tensors that are missing or that nobody took."""
        problems = []
        if self.missing:
            problems.append(f"the weights have no {some(self.missing)}")
        if self.untaken:
            problems.append(f"nothing uses {some(sorted(self.untaken))}")
        if problems:
            raise ValueError(
                f"weights and config do not fit: {'; '.join(problems)}; "
                "is this the right format and the right config?"
            )


def _start_of(x):
    first = ", ".join(f"{value:.6g}" for value in value_of(x).flatten()[:3].tolist())
    return f"{list(x.shape)} [{first}, ...]"


class Library(NamedTuple):
    """A library with classes of its own for models that we have too.

    Attributes:
        name: as its users know it.
        to_import: the package whose import makes its classes known to transformers; None: they are
            transformers' own.
        needs: what a folder for it needs, in words.
    """

    name: str
    to_import: str | None
    needs: str

    @property
    def possessive(self):
        """The name before what is the library's."""
        return f"{self.name}'" if self.name.endswith("s") else f"{self.name}'s"


TRANSFORMERS = Library("transformers", None, "torch and transformers, and no code but theirs")
FLA = Library(
    "flash-linear-attention",
    "fla",
    "`pip install flash-linear-attention` and `import fla`, a GPU for its kernels, and no code but "
    "theirs",
)
# Where several have a class for an architecture, the first is chosen.
LIBRARIES = (TRANSFORMERS, FLA)


class Format(NamedTuple):
    """A foreign checkpoint format.

    Attributes:
        name: as on the command line.
        title: one line about it.
        recognizes: (config file as a dict, tensor names) -> whether it is one of this format.
        expects: what `recognizes` looks for, in words.
        read_config: (Fields, Weights) -> our config.
        read_weights: (Weights, our config) -> pairs of our name and the tensor.
        config_file: name of the config beside the weights; None: all follows from the weights.
        library: whose own class loads it; None: no class that a package brings, or not exactly.
        find_weights: (SRC) -> the file to read, where others may lie beside it; None: there is one.
        architecture: for the way back, a key of `zoo.MODELS`; None: there is no way back.
        write_config: (our config) -> (their config file as a dict, notes for the report).
        write_weights: (Weights of ours, our config) -> pairs of their name and the tensor.
        weight_file: name of the one file of weights to write; None: transformers' names, in shards.
        tokenizer: how to get its tokenizer to {dst}, a folder, where none lies beside the weights.
        left_out: our settings without a field there that do not change what a model computes.
    """

    name: str
    title: str
    recognizes: Callable
    expects: str
    read_config: Callable
    read_weights: Callable
    config_file: str | None = "config.json"
    library: Library | None = None
    find_weights: Callable | None = None
    architecture: str | None = None
    write_config: Callable | None = None
    write_weights: Callable | None = None
    weight_file: str | None = None
    tokenizer: str = (
        "copy the tokenizer's files of its page on the Hub (tokenizer.json, tokenizer.model, ...) "
        "to {dst}"
    )
    left_out: tuple[str, ...] = ()


def refuse_beyond(config, known, whose):
    """Raises a ValueError for a setting that a foreign model has nothing for.

    Args:
        config: ours.
        known: names of the settings that it has; others are as by default in what it holds.
        whose: its owner, as in "transformers'".
    """
    for field in fields(config):
        value = getattr(config, field.name, None)
        is_own = field.name not in PreTrainedConfig.__dataclass_fields__
        if is_own and field.name not in known and value != field.default:
            raise ValueError(f"{field.name} is {value!r}: {whose} model has none.")


def refuse_other(config, fixed, whose):
    """Raises a ValueError for a setting that a foreign model has in one way alone.

    Args:
        config: ours.
        fixed: our field -> what it is there.
        whose: its owner, as in "transformers'".
    """
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}: {whose} model has {value!r} at all times."
            )


def check_transformers_activation(config):
    """Raises a ValueError if transformers has no activation of our hidden_act's name."""
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act is {config.hidden_act!r}: transformers has none of the name.")


def split_tensor(weights, name, changes):
    """Parts of one of their tensors, lazy as it is; as many None if there is none of that name.

    Args:
        weights: theirs.
        name: of the tensor.
        changes: for each part, what cuts it out.
    """
    if name not in weights.tensors:
        return [weights.take(name)] + [None] * (len(changes) - 1)
    return [weights.take(name, change=change) for change in changes]


def read_by_name(weights, config, names, changes):
    """Pairs of our name and their tensor, where each of ours is one of theirs.

    Args:
        weights: theirs.
        config: ours.
        names: pairs of our name and theirs.
        changes: our name, or its last part -> what turns theirs into ours.
    """
    for ours, theirs in names:
        if _is_left_out(ours, config) and theirs not in weights.tensors:
            continue
        yield ours, weights.take(theirs, change=_change_of(ours, changes))


def write_by_name(weights, config, names, changes):
    """Pairs of their name and our tensor; the way back of `read_by_name`."""
    for ours, theirs in names:
        if not _is_left_out(ours, config):
            yield theirs, weights.take(ours, change=_change_of(ours, changes))


def _change_of(ours, changes):
    return changes.get(ours, changes.get(ours.rpartition(".")[-1]))


def llama_names(config):
    """Our name and transformers' of each tensor of a Llama, or of a Mistral or Gemma."""
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        yield f"{name}.weight", f"{name}.weight"
    parts = {
        "mixer_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mixer.q_proj": "self_attn.q_proj",
        "mixer.k_proj": "self_attn.k_proj",
        "mixer.v_proj": "self_attn.v_proj",
        "mixer.out_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            yield f"model.layers.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight"


def read_llama(weights, config, names=llama_names, changes=None):
    """`read_by_name` of a model with a Llama's tensors, or those and more.

    Args:
        weights: theirs.
        config: ours.
        names: of a config, pairs of our name and theirs.
        changes: as there; None: none.
    """
    for layer in range(config.num_hidden_layers):
        # Older transformers stored what follows from the config.
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        if name in weights.tensors:
            weights.take(name)
    return read_by_name(weights, config, names(config), changes or {})


def write_llama(weights, config):
    """`write_by_name` of a Llama's tensors."""
    return write_by_name(weights, config, llama_names(config), {})


def _is_left_out(ours, config):
    return ours == "lm_head.weight" and config.tie_word_embeddings
