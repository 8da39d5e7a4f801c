"""What all architectures share: config, decoder, language model with its loss.

An architecture subclasses these, names its mixer and MLP, and says what differs. The decoder is
the usual one: embed, blocks of (norm, mixer, norm, MLP) around a residual stream, norm. A mixer is

    forward(x_BTD, sequence, state, **inputs) -> (y_BTD, state)

with the documents' boundaries and positions in `sequence` (zoo/core/sequence.py), the state as an
argument and a result (zoo/core/state.py), and what `ZooModel.mixer_inputs` computes once for all
layers.
"""

import difflib
import fnmatch
import functools
import itertools
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_loss import can_take_gradient_at_once, chunked_cross_entropy, is_plain_linear
from .flops import linear_flops
from .generation import StateGeneration
from .joining import join_states
from .length_limit import LengthLimit, unlimited_is_none
from .onednn import run_by_onednn
from .parallel import check_slice, open_slice
from .replay import replay
from .sequence import Sequence, restarting_positions
from .state import (
    CACHE,
    CACHE_NAMES,
    FORMER_LAYER_TYPES,
    LAYERS,
    Inputs,
    State,
    StateLayer,
    new_cache,
    one_cache,
    put_together,
    state_size,
    take_apart,
)
from .turns import run_in_turn, run_stack_in_turn, run_together
from .versions import FORMAT_VERSION, current_fields, renamed_weights
from .wire import settle

LOSS_IGNORES = -100

logger = logging.get_logger(__name__)


@strict
class ZooConfig(PreTrainedConfig):
    """The fields every architecture has.

    Args:
        vocab_size: number of token ids.
        hidden_size: width D of the residual stream.
        intermediate_size: width F of the MLP; None lets the architecture choose.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads H.
        tie_word_embeddings: whether the output projection is the embedding.
        use_cache: whether a forward pass returns the state.

    Raises:
        ValueError: an unknown field, a value of the wrong type or out of range.
    """

    keys_to_ignore_at_inference = list(CACHE_NAMES)

    # The cache layer and the attention pattern of each block; accelerate reads these names to
    # refuse splitting a sequence over devices, which would restart a recurrent state in silence.
    layer_type: ClassVar[str] = StateLayer._layer_type
    # What to do for layers of several kinds, said to whoever asks for them by layer_types.
    hybrids: ClassVar[str] = (
        "leave them out: its layers are all of one kind, and LightningConfig(softmax_layers=...) "
        "has layers of two."
    )
    # Settings worth testing beside the default: name -> fields.
    variants: ClassVar[dict[str, dict]] = {}

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __init_subclass__(cls, *args, **kwargs):
        super().__init_subclass__(*args, **kwargs)
        # The fields are made of the class's attributes, this one too, by now.
        if "max_position_embeddings" in cls.__dataclass_fields__:
            cls.max_position_embeddings = LengthLimit()

    def __post_init__(self, **kwargs):
        version = kwargs.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{type(self).__name__} takes the fields of format version {FORMAT_VERSION}, got "
                f"those of {version!r}; from_pretrained and from_dict read earlier ones."
            )
        layer_types = kwargs.pop("layer_types", None)
        for name in self._unknown(kwargs):
            known = sorted(field.name for field in fields(self))
            nearest = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "leave it out."
            raise ValueError(f"{type(self).__name__} has no field {name!r}; {remedy}")
        super().__post_init__(**kwargs)
        if layer_types is not None:
            self.layer_types = layer_types

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """A config from the fields of a config.json, of this format version or an earlier one.

        Args:
            config_dict: the fields.
            kwargs: fields of this version that take their places, and transformers' own options.

        Raises:
            ValueError: fields of a later version, or of a model that this one does not have.
        """
        result = super().from_dict(current_fields(config_dict, cls.model_type), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.validate()  # transformers sets kwargs one by one after it checked the rest
        return result

    def standardize_rope_params(self):
        """As transformers does, which asks for a limit of length whether or not it needs one."""
        with unlimited_is_none(self):
            super().standardize_rope_params()

    @property
    def layer_types(self):
        """The cache layer and attention pattern of each block, which follow from the other fields.

        Not written to config.json: transformers reads that with classes that know its own alone. A
        file that has them loads if they are those of the architecture.
        """
        return [self.layer_type] * self.num_hidden_layers

    @layer_types.setter
    def layer_types(self, value):
        if [FORMER_LAYER_TYPES.get(name, name) for name in value] != self.layer_types:
            raise ValueError(
                f"layer_types follow from the other fields of {type(self).__name__}, which make "
                f"{_in_runs(self.layer_types)}, got {_in_runs(value)}; {self.hybrids}"
            )

    @property
    def state_is_list_of_tokens(self):
        """Whether all layers keep tokens that may lie in any order: what `join_states` takes."""
        return False

    def to_dict(self):
        """The fields as JSON has them, to be saved.

        An attribute that somebody set and that is no field stays out, with a warning: a config.json
        with it would not load.
        """
        values = super().to_dict() | {"format_version": FORMAT_VERSION}
        for name in self._unknown(values):
            logger.warning_once(
                f"{type(self).__name__} has no field {name!r}: this attribute is not saved."
            )
            del values[name]
        return values

    def _unknown(self, names):
        """Those of the names that neither this class nor transformers has a use for."""
        known = {field.name for field in fields(self)} | _TRANSFORMERS_KEYWORDS
        return [name for name in names if not name.startswith("_") and name not in known]

    def validate_architecture(self):
        """Checks relations between fields; subclasses add theirs."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is below vocab_size {self.vocab_size}, got {self.pad_token_id}; "
                "change one of them, or leave pad_token_id out."
            )

    def validate_layer_type(self):
        """Nothing: transformers would want names of its own."""

    def validate_rope(self):
        """Nothing: `check_rope_parameters` does it, and refuses where transformers warns."""


def _in_runs(names):
    """Names in a row, for a message: 3 x a, 1 x b."""
    groups = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return ", ".join(f"{count} x {name}" for name, count in groups) or "none"


def check_head_dim(config):
    """Raises a ValueError if the width of a head is neither given nor a whole share."""
    if config.head_dim is None:
        raise ValueError(
            "hidden_size is a multiple of num_attention_heads, got "
            f"{config.hidden_size} and {config.num_attention_heads}; change one of them, or give "
            "head_dim."
        )


def check_activation(name, value):
    """Raises a ValueError if a field does not name one of transformers' activations."""
    if value not in ACT2FN:
        raise ValueError(
            f"{name} is one of transformers' activations ({', '.join(sorted(ACT2FN))}), "
            f"got {value!r}."
        )


# What transformers itself, or a saved config.json, passes beside the declared fields.
_TRANSFORMERS_KEYWORDS = frozenset(GenerationConfig._get_default_generation_params()) | {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "format_version",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
}


# Arguments of `from_pretrained` that say which file of a repository is meant, and how to get it.
_OF_DOWNLOADS = (
    "_commit_hash",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class Constant(nn.Module):
    """A tensor the mathematics fixes (decays, angles): never trained, never rounded.

    Kept in float64 whatever dtype the model is moved to: bf16 has too few digits for a decay close
    to 1, and float32 too few for the angle of the millionth position. Not saved: it follows from
    the config.

    Args:
        compute: returns the tensor, in float64. A function of a module, or a `functools.partial` of
            one, so that a model can be pickled.
    """

    def __init__(self, compute):
        super().__init__()
        self.compute = compute
        self.register_buffer("value", compute().double(), persistent=False)

    def reset(self):
        """Computes the value again, for a model that was built without memory."""
        with torch.device("cpu"):
            value = self.compute()
        init.copy_(self.value, value.to(self.value.device, self.value.dtype))

    def _apply(self, fn, recurse=True):
        # Follow the model to its device, but not to its dtype.
        device = fn(torch.empty(0, device=self.value.device)).device
        if device != self.value.device:
            self.value = self._on(device)
        return self

    def _on(self, device):
        with torch.device("cpu"):
            value = self.compute() if self.value.is_meta else self.value
        # Apple's GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return value.to(dtype).to(device)

    def forward(self, device):
        """The tensor, on a device.

        A model that was built without memory and given its weights since (`load_state_dict` with
        assign=True) has had no other chance to compute it.
        """
        if self.value.is_meta and device.type != "meta":
            self.value = self._on(device)
        return self.value


class ZooPreTrainedModel(PreTrainedModel):
    """Hugging Face's base class with the zoo's conventions."""

    config: ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    # Parameters that learn at another rate: name pattern (fnmatch) -> factor on the learning rate.
    learning_rate_scales: ClassVar[dict[str, float]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, key_mapping=None, **kwargs):
        """As in transformers; the weights of folders of an earlier format version get their names.

        Args:
            pretrained_model_name_or_path: a folder or Hub id, or None, with weights by their
                present names in `state_dict`.
            key_mapping: as in transformers; it comes first.

        Raises:
            ValueError: a folder of a later version, or of a model that this one does not have.
        """
        renamed = cls._renamed_weights(pretrained_model_name_or_path, kwargs)
        if not renamed:
            kwargs["key_mapping"] = key_mapping
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs["key_mapping"] = (key_mapping or {}) | renamed
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        # transformers would give them back their names when it saves the model, with a config.json
        # of the present version.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if c.source_patterns[0] not in renamed]
        return loaded

    @classmethod
    def _renamed_weights(cls, source, options):
        """How weights of a folder or Hub id are renamed; read only if an earlier version's are."""
        model_type = cls.config_class.model_type
        if source is None or not renamed_weights({}, model_type):
            return {}
        options = {name: options[name] for name in _OF_DOWNLOADS if name in options}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(source, **options)
        except OSError:  # no config.json: there is a config given, or transformers says what to do
            return {}
        return renamed_weights(fields, model_type)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        # transformers decides by class name, and some of ours contain names it has excluded.
        return True

    @classmethod
    def _can_set_attn_implementation(cls):
        # transformers decides by the text of the model's file, and only warns where it says no.
        # What a model cannot compute, it refuses when it is asked for it.
        return True

    def post_init(self):
        """What transformers does when all modules are there."""
        super().post_init()
        # Sharding (FSDP) refuses a model without each of the blocks that its class may have.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _initialize_weights(self, module, is_custom_code=False):
        # For code outside of it, transformers skips every module whose own parameters are all
        # loaded, and so each one that has none of its own: a mixer, whose children hold them. It
        # guards against initialisers that ignore what is loaded already; ours do not.
        super()._initialize_weights(module, is_custom_code=False)

    def state_size(self, num_tokens=None):
        """Bytes of state for one sequence.

        Args:
            num_tokens: of the text so far, for a model whose state grows with it; others have one
                size at any length.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        return state_size(self.base_model.state_specs(), dtype, num_tokens)

    def optimizer_groups(self, learning_rate_scales=None):
        """How to train each parameter that is trained, as data for any optimizer.

        Matrices of linear layers and embeddings decay; norms, biases, gains, gates, decays and the
        like do not.

        Args:
            learning_rate_scales: name pattern (fnmatch) -> factor, before the model's own.

        Returns:
            A list of {"params": parameters, "decays": bool, "lr_scale": factor on the rate}.

        Raises:
            ValueError: a pattern that matches none of the parameters that are trained.
        """
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        scales = dict(learning_rate_scales or {})
        for pattern in scales:
            if not fnmatch.filter(named, pattern):
                raise ValueError(
                    f"learning_rate_scales: no trained parameter is called {pattern!r}; patterns "
                    f"are of names such as {', '.join(list(named)[:3])}, with * for any part."
                )
        patterns, groups = scales | self.learning_rate_scales | scales, {}
        for name, parameter in named.items():
            decays = parameter.ndim >= 2 and name.endswith(".weight")
            matching = (x for pattern, x in patterns.items() if fnmatch.fnmatch(name, pattern))
            scale = next(matching, 1.0)
            groups.setdefault((not decays, scale), []).append(parameter)
        return [
            {"params": parameters, "decays": not is_plain, "lr_scale": scale}
            for (is_plain, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # transformers tells norms by the names of their classes.
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            for name, fill in (("weight", init.ones_), ("bias", init.zeros_)):
                if getattr(module, name, None) is not None:
                    fill(getattr(module, name))
        # A module that knows its paper's initialisation says so; children come before parents, so
        # it has the last word on the linear layers it contains.
        if isinstance(module, Constant):
            module.reset()
        elif hasattr(module, "init_weights_of_paper"):
            module.init_weights_of_paper()


def scale_(weight, factor):
    """Multiplies a fresh weight; one that was loaded stays, whatever kind of tensor it is now."""
    if not getattr(weight, "_is_hf_initialized", False):
        with torch.no_grad():
            weight.mul_(factor)


class ZooBlock(GradientCheckpointingLayer):
    """A pre-norm residual block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    mixer_class: type[nn.Module]
    mlp_class: type[nn.Module]

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mixer_norm = self.build_norm(config)
        self.mixer = self.mixer_class(config, layer_idx)
        self.mlp_norm = self.build_norm(config)
        self.mlp = self.mlp_class(config)

    def build_norm(self, config):
        """The norm before mixer and MLP."""
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def exchanges(self):
        """As of `ZooModel`."""
        return getattr(self.mixer, "exchanges", False)

    def state_specs(self):
        """The `StateSpec`s of the block's state by name."""
        return self.mixer.state_specs()

    def flops_per_token(self, length):
        """As of `ZooModel`."""
        return self.mixer.flops_per_token(length) + linear_flops(self.mlp)

    def forward(self, x_BTD, sequence, state, **inputs):
        """Returns (x_BTD, state); the state that came in is left as it was."""
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), sequence, state.copy(), **inputs)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state


class ZooModel(ZooPreTrainedModel):
    """The decoder: embedding, blocks, final norm.

    A block is called as `ZooBlock` is. What it returns beyond (x_BTD, state), the next one gets as
    positional arguments.

    Attributes:
        replay_segment_length: if set, a training step keeps the states after every so many tokens
            instead of all activations, and backward runs each of these segments again
            (zoo/core/replay.py): the same gradients in the memory of one segment. How to run, not
            part of the model: set it on the instance.
        sequence_parallel: if set, a group of processes (torch.distributed), of which each is given
            a slice of every row, in order, and all make the pass together (zoo/core/parallel.py).
            A block with `exchanges` then brings what its mixer needs of the slices before; the
            others take turns. How to run, too: a copy or a saved model has it not.
    """

    block_class: type[nn.Module]
    replay_segment_length: int | None = None
    sequence_parallel: object | None = None
    # Whether it runs its blocks several times in a pass: processes take turns as a whole.
    walks_segments: ClassVar[bool] = False
    # What of `_run_blocks`' output is of tokens, [B, T, ...], beside hidden_states.
    token_outputs: ClassVar[tuple[str, ...]] = ("last_hidden_state",)

    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = self.build_embedding(config)
        self.layers = nn.ModuleList(
            self.block_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = self.build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def __getstate__(self):
        # Of copies and pickles: a group of processes can be neither.
        return {name: x for name, x in vars(self).items() if name != "sequence_parallel"}

    def build_embedding(self, config):
        """The vectors of token ids."""
        return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    def build_norm(self, config):
        """The norm after the last block."""
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed(self, embeds_BTD, sequence):
        """What happens to token embeddings, padding included, before the first block."""
        return embeds_BTD

    def mixer_inputs(self, x_BTD, sequence):
        """Keyword arguments for every block, computed once per forward pass."""
        return {}

    def state_specs(self):
        """The `StateSpec`s of each layer by name."""
        return [layer.state_specs() for layer in self.layers]

    def flops_per_token(self, length):
        """Floating-point operations of a forward pass per token, counted as in zoo/core/flops.py.

        Each mixer declares its own.

        Args:
            length: tokens of a text, over which it is a mean.
        """
        return sum(layer.flops_per_token(length) for layer in self.layers)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder over new tokens, from the state in `past_key_values` if there is one.

        Args:
            input_ids: [B, T]; or inputs_embeds.
            attention_mask: [B, T] or [B, past + T], 0 where there is padding, anywhere in a row.
            position_ids: [B, T]; a document starts wherever they restart. None: they count each
                row's tokens without padding, on from the state.
            past_key_values: the state so far; a new one is made if use_cache.
            inputs_embeds: [B, T, D].
            use_cache: whether to return the state.
            cu_seq_lens_q: [N + 1] document boundaries for B = 1, as in FlashAttention.
            seq_idx: [B, T], index of each token's document.
            cache: another name of past_key_values, which transformers uses from 5.24 on.

        Returns:
            last_hidden_state [B, T, D], zero on padding, and past_key_values.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; no tokens; wrong shapes.
        """
        cache = one_cache(past_key_values, cache)
        wants_weights = kwargs.get("output_attentions") or self.config.output_attentions
        if wants_weights and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{type(self).__name__} never has the weights of its attention as a whole: "
                "output_attentions gives None."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids [B, T] and inputs_embeds [B, T, D].")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = new_cache(self.config)
        if cache is not None:
            self._check_cache(cache, inputs_embeds)
            check_past_columns(attention_mask, cache, inputs_embeds.shape[1])
        replays = self.training and torch.is_grad_enabled() and self.replay_segment_length
        run = self._run
        if replays and inputs_embeds.shape[1] > self.replay_segment_length:
            run = self._run_with_replay
        run = functools.partial(
            run,
            Inputs(inputs_embeds, attention_mask, position_ids),
            cache,
            cu_seq_lens_q,
            seq_idx,
            **kwargs,
        )
        output = run_by_onednn(run, inputs_embeds, self.config.hidden_size)
        output[CACHE] = cache if use_cache else None
        return output

    def _run(self, inputs, cache, cu_seq_lens_q=None, seq_idx=None, **kwargs):
        """Runs tokens, and brings the cache up to date if there is one."""
        num_pending = 0
        if cache is not None:
            inputs, num_pending = _with_pending(inputs, cache.layers[0])
            self._check_checkpointing()
        arguments = (
            tuple(inputs.embeds_BTD.shape[:2]),
            inputs.embeds_BTD.device,
            inputs.attention_mask,
            inputs.position_ids,
        )
        if self.sequence_parallel is not None:
            self._check_checkpointing()
            check_slice(inputs, cache, cu_seq_lens_q, seq_idx)
            sequence = open_slice(self.sequence_parallel, *arguments, is_kept=cache is not None)
        else:
            sequence = Sequence.open(
                *arguments,
                cu_seq_lens_q,
                seq_idx,
                None if cache is None else cache.layers[0].clock,
                None if cache is None else cache.layers[0].position_shift,
            )
        if cache is not None and sequence.starts_anew(cache.layers[0].clock is not None):
            cache.layers[0].is_one_document = False
        x_BTD = self.embed(inputs.embeds_BTD, sequence)
        # Who takes turns as a whole makes no exchange on the way.
        own = sequence
        if sequence.ranks is not None and self.walks_segments:
            own = replace(sequence, ranks=None)
        run = functools.partial(
            self._run_blocks, sequence.pack(x_BTD), own, inputs=inputs, return_dict=True
        )
        if sequence.ranks is None:
            output = run(cache=cache, **kwargs)
        else:
            output = self._run_slice(functools.partial(run, **kwargs), sequence, cache)
        for name in self.token_outputs:
            if name in output:
                output[name] = _unpack(sequence, output[name], num_pending)
        if output.hidden_states is not None:
            first, *rest = output.hidden_states
            rest = [_unpack(sequence, h_BTD, num_pending) for h_BTD in rest]
            # The first is what went into the first block: as it was, so that it keeps its gradient.
            if first is not None:
                first = x_BTD[:, num_pending:] if num_pending else x_BTD
            output["hidden_states"] = (first, *rest)
        return output

    def _run_slice(self, run, sequence, cache):
        """Runs the blocks together with the processes that have the other slices."""
        if self.walks_segments:
            output = run_stack_in_turn(self, run, sequence, cache)
        else:
            sequence.ranks.keeps = self.gradient_checkpointing and self.training
            # Processes may differ in what a layer saves last, and one that stops there would leave
            # out exchanges that others make.
            with set_checkpoint_early_stop(False):
                output = run(cache=cache)
        output["last_hidden_state"] = sequence.ranks.close(output.last_hidden_state)
        if cache is not None:
            sequence.ranks.complete(cache)
        if not torch.is_grad_enabled():
            settle(self.sequence_parallel)  # this process may end now, with what is under way
        return output

    def _run_with_replay(self, inputs, cache, cu_seq_lens_q=None, seq_idx=None, **kwargs):
        """The same in segments, whose activations exist one at a time."""
        self._check_checkpointing()
        if self.sequence_parallel is not None:
            raise ValueError(
                "replay_segment_length cuts a text in time and sequence_parallel over processes, "
                "got both; set one of them to None, and use gradient checkpointing with the other."
            )
        if kwargs.get("output_hidden_states") or self.config.output_hidden_states:
            raise ValueError(
                "segment replay keeps no hidden states, got output_hidden_states; set "
                "replay_segment_length to None, or leave them out."
            )
        first = None if cache is None else cache.layers[0]
        if first is not None and (first.record_past or first.pending_length):
            raise ValueError(
                "segment replay keeps no record of the past, got a cache that records it or has "
                "tokens to run again after crop(); train from a cache without such a record."
            )
        embeds_BTD, mask = inputs.embeds_BTD, inputs.attention_mask
        batch, time = embeds_BTD.shape[:2]
        sizes = [
            min(self.replay_segment_length, time - start)
            for start in range(0, time, self.replay_segment_length)
        ]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        frame, states = take_apart(new_cache(self.config) if cache is None else cache)
        frames, clock, shift = {0: frame}, frame[0].clock, frame[0].position_shift
        positions = inputs.position_ids
        if cu_seq_lens_q is not None or seq_idx is not None:
            positions = restarting_positions(
                (batch, time), mask, positions, cu_seq_lens_q, seq_idx, clock, shift
            )

        def run(index, x_BTD, states):
            columns = slice(starts[index], starts[index] + sizes[index])
            pieces = (None if x is None else x[:, -time:][:, columns] for x in (mask, positions))
            own = put_together(self.config, frames[index], states)
            output = self._run(Inputs(x_BTD, *pieces), own, **kwargs)
            frames[index + 1], states = take_apart(own)
            return output.last_hidden_state, states

        hidden_BTD, states = replay(run, embeds_BTD, sizes, states, list(self.parameters()))
        if cache is not None:
            cache.layers = put_together(self.config, frames[len(sizes)], states).layers
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD)

    @capture_outputs
    def _run_blocks(self, x_BTD, sequence, cache, inputs, **kwargs):
        mixer_inputs = self.mixer_inputs(x_BTD, sequence)
        x_BTD, *_ = self._run_layers(x_BTD, sequence, cache, inputs, mixer_inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD))

    def _run_layers(self, x_BTD, sequence, cache, inputs, mixer_inputs, carried=()):
        """One layer after the other, and brings the cache up to date.

        Args:
            x_BTD, sequence, cache, inputs: as of `_run_blocks`.
            mixer_inputs: for every block.
            carried: what the first is given as others are by the one before.

        Returns:
            (x_BTD, and what the last layer returns beside its state).
        """
        # What is in a state, a step that takes on all of it need not know.
        takes_all = (
            cache is not None
            and sequence.keep is sequence.continues is sequence.last_document is None
            and sequence.ranks is None
        )
        for index, layer in enumerate(self.layers):
            specs = None
            if not (takes_all and cache.layers[index].tensors):
                specs = layer.state_specs()
            if cache is None:
                state = State(dict.fromkeys(specs), is_kept=False)
            else:
                state = cache.layers[index].read(sequence, specs)
            if sequence.ranks is not None and not layer.exchanges:
                held = (new_cache(self.config) if cache is None else cache).layers[index]
                x_BTD, state, *carried = run_in_turn(
                    layer, x_BTD, sequence, held, cache is not None, carried, mixer_inputs
                )
                continue
            if sequence.ranks is not None:
                own = x_BTD, sequence, state, carried, mixer_inputs
                x_BTD, state, *carried = run_together(layer, *own)
            else:
                x_BTD, state, *carried = layer(x_BTD, sequence, state, *carried, **mixer_inputs)
            if cache is not None:
                if sequence.ranks is not None:
                    cache.layers[index].tensors = dict(sequence.ranks.left)
                cache.layers[index].write(sequence, specs, state, inputs if index == 0 else None)
        return x_BTD, *carried

    def _check_checkpointing(self):
        """Raises a ValueError if checkpointing would lose the gradients of states in silence.

        Reentrant checkpointing passes gradients to a block's arguments and from its results where
        these are tensors themselves, and a `State` is none.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return
        options = getattr(self._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant", True):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True would lose the gradients that go "
                "through a state; set use_reentrant=False, or train without past_key_values, "
                "segment replay and feedback."
            )

    def _check_cache(self, cache, embeds_BTD):
        expected = [LAYERS[layer_type] for layer_type in self.config.layer_types]
        types = [type(layer) for layer in cache.layers]
        held = (x.get_seq_length() or getattr(x, "tensors", None) for x in cache.layers)
        if types != expected and not any(held):
            # An empty cache made without a config; or, where several exported folders are loaded,
            # one with the layers of the folder that was imported last.
            names = [getattr(layer, "_layer_type", None) for layer in cache.layers]
            if names in ([], self.config.layer_types):
                recording = any(layer.record_past for layer in cache.layers)
                cache.layers, cache.layer_class_to_replicate = new_cache(self.config).layers, None
                if recording:
                    cache.activate_past_recording()
                types = expected
        if types != expected and any(
            torch.is_tensor(getattr(x, "keys", None)) for x in cache.layers
        ):
            raise ValueError(
                "past_key_values holds keys and values, as those of another model or of prefix "
                f"tuning; {type(self).__name__} goes on from a recurrent state, which these do not "
                "say: make a cache with DynamicCache(config=model.config), and tune with LoRA or "
                "prompt tuning."
            )
        if types != expected:
            raise ValueError(
                f"past_key_values: expected a cache of {len(expected)} recurrent state layers of "
                f"this model, got {len(types)} of type {types[0].__name__}; "
                "make one with DynamicCache(config=model.config)."
            )
        layers = cache.layers
        if layers[0].clock is not None and len(layers[0].clock) != embeds_BTD.shape[0]:
            raise ValueError(
                f"past_key_values holds the state of {len(layers[0].clock)} rows, got a batch of "
                f"{embeds_BTD.shape[0]}; use batch_select_indices or batch_repeat_interleave."
            )


def check_past_columns(attention_mask, cache, num_new):
    """Says, once, if a mask hides other columns of the past than were hidden when they were run.

    A recurrent state has taken them in or left them out by then.

    Args:
        attention_mask: [B, past + T], or None or another shape: then there is nothing to see.
        cache: a cache, or None.
        num_new: T.
    """
    first = (getattr(cache, "layers", None) or [None])[0]
    clock_B = first.clock if getattr(first, "is_one_document", False) else None
    if attention_mask is None or clock_B is None or torch.compiler.is_compiling():
        return
    past = attention_mask.shape[1] - num_new if attention_mask.ndim == 2 else 0
    # A look at the values would stall a GPU at every token of a loop.
    is_loop = num_new == 1 and attention_mask.device.type != "cpu"
    is_other = attention_mask.shape[0] not in (1, len(clock_B)) or first.pending_length
    if past <= 0 or is_loop or is_other or past != first.length:
        return
    count_B = (attention_mask[:, :past] != 0).sum(1)
    if not bool((count_B == clock_B.to(count_B.device)).all()):
        logger.warning_once(
            "attention_mask hides columns of the past that the recurrent state has taken in, or "
            "shows some that it has not: they count as they did when they were run. Mask tokens in "
            "the pass they come in, as generate does for rows that have ended."
        )


def _with_pending(inputs, layer):
    """The inputs after the tokens that `crop` left to be run again, and how many those are."""
    length = layer.pending_length
    if length == 0:
        return inputs, 0
    pending, new = layer.pending, inputs.embeds_BTD.shape[1]
    mask, positions = inputs.attention_mask, inputs.position_ids
    if mask is None:
        mask = pending.attention_mask
        if mask is not None:
            mask = F.pad(mask[:, -length:], (0, new), value=1)
    elif mask.shape[1] < length + new:
        before = pending.attention_mask
        before = mask.new_ones(mask.shape[0], length) if before is None else before[:, -length:]
        mask = torch.cat([before, mask], dim=1)
    if positions is not None and positions.shape[1] < length + new:
        before = positions[:, :1] + torch.arange(-length, 0, device=positions.device)
        if pending.position_ids is not None:
            before = pending.position_ids[:, -length:]
        positions = torch.cat([before, positions], dim=1)
    embeds_BTD = torch.cat([pending.embeds_BTD, inputs.embeds_BTD], dim=1)
    return Inputs(embeds_BTD, mask, positions), length


def _unpack(sequence, x_BTD, num_pending):
    """The hidden states of the new tokens, padded again; None (not recorded) stays None."""
    if x_BTD is None:
        return None
    x_BTD = sequence.unpack(x_BTD)
    return x_BTD[:, num_pending:] if num_pending else x_BTD


def cross_entropy_and_square(logits_TV, target_T):
    """Sums over scored tokens, [2]: cross entropy, and log^2 of Z, the sum of exp(logits).

    Both from one pass over the logits.
    """
    log_z_T = logits_TV.logsumexp(-1)
    logit_T = logits_TV.gather(-1, target_T.clamp(min=0)[:, None])[:, 0]
    sums_2T = torch.stack([log_z_T - logit_T, log_z_T.square()])
    return torch.where(target_T != LOSS_IGNORES, sums_2T, 0.0).sum(-1)


def _fused_linear_cross_entropy(head, hidden_TD, z_loss):
    """Liger's projection and cross entropy in one, where it is installed, else None.

    On a CUDA device only, and only for a plain linear head.
    """
    if not hidden_TD.is_cuda or not is_plain_linear(head):
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(
        ignore_index=LOSS_IGNORES,
        reduction="sum",
        accum_dtype=torch.float32,
        lse_square_scale=z_loss,
        return_z_loss=bool(z_loss),
    )


def in_range(x):
    """The tensor, in float32 if it is float16, whose range is too small for sums over time."""
    return x.float() if x.dtype == torch.float16 else x


@dataclass
class OutputWithZLoss(CausalLMOutputWithPast):
    """What a training step with z-loss returns.

    Attributes:
        z_loss: what of `loss` is not cross entropy, without a gradient.
    """

    z_loss: torch.FloatTensor | None = None


class ZooForCausalLM(ZooPreTrainedModel, StateGeneration):
    """The decoder with a projection onto the vocabulary.

    Attributes:
        z_loss: if above 0, the loss of a training step is cross entropy plus z_loss times the mean
            of log^2 Z over scored tokens, where Z is the sum of exp(logits), which keeps logits
            from drifting (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5). How
            to train, not part of the model: set it on the instance.
        loss_chunk_size: if set, a training step computes its loss over that many tokens at a time
            and returns no logits, so that [B, T, vocab_size] never exists (on CUDA with
            liger-kernel installed, in that library's own chunks). How to run, not part of the
            model: set it on the instance.
    """

    model_class: type[ZooModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    loss_chunk_size: int | None = None
    z_loss: float = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = self.build_lm_head(config)
        self.post_init()

    def build_lm_head(self, config):
        """The projection onto the vocabulary."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: DynamicCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits and, with labels, their cross entropy.

        Args, beside those of `ZooModel.forward`:
            labels: [B, T] token ids; position t is scored on labels[t + 1]; -100 is not scored.
            shift_labels: [B, T], labels already moved by one; instead of labels. By keyword alone:
                a Trainer takes every named argument with "label" in it for one that a batch has.
            logits_to_keep: only the last so many positions, or these indices; 0: all.
            num_items_in_batch: what the summed loss is divided by; None: scored tokens here.

        Returns:
            loss (scalar, nats per token), logits [B, T, vocab_size], past_key_values.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if self.model.sequence_parallel is not None and labels is not None and shift_labels is None:
            raise ValueError(
                "with sequence_parallel, labels are shifted before a text is cut, got labels "
                "without shift_labels; zoo.core.parallel.split_batch makes them."
            )
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = output.last_hidden_state
        has_labels = labels is not None or shift_labels is not None
        logits, loss, z_loss = None, None, None
        is_training = has_labels and self.training
        if not (is_training and self.loss_chunk_size is not None):
            if isinstance(logits_to_keep, int):
                logits_to_keep = slice(-logits_to_keep, None)
            project = functools.partial(self.lm_head, hidden_BTD[:, logits_to_keep])
            logits = run_by_onednn(project, hidden_BTD, self.config.hidden_size)
        if is_training and (logits is None or self.z_loss):
            loss, z_loss = self._training_loss(
                hidden_BTD, logits, labels, shift_labels, num_items_in_batch
            )
        elif has_labels:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
                num_items_in_batch=num_items_in_batch,
            )
        outputs = {
            "loss": loss,
            "logits": logits,
            CACHE: getattr(output, CACHE),
            "hidden_states": output.hidden_states,
        }
        if z_loss is not None:
            return OutputWithZLoss(**outputs, z_loss=z_loss)
        return CausalLMOutputWithPast(**outputs)

    def _training_loss(self, hidden_BTD, logits, labels, shift_labels, num_items_in_batch):
        """The mean loss, in chunks unless there are logits, and what of it is z-loss, or None."""
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=LOSS_IGNORES)
        target_T = shift_labels.flatten().to(hidden_BTD.device)
        hidden_TD = hidden_BTD.flatten(0, 1)
        if num_items_in_batch is None:
            num_items_in_batch = (target_T != LOSS_IGNORES).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(hidden_TD.device)
        if logits is None and can_take_gradient_at_once(self.lm_head, hidden_TD):
            scale, size = 1 / num_items_in_batch, self.loss_chunk_size
            loss, z_loss = chunked_cross_entropy(
                self.lm_head, hidden_TD, target_T, LOSS_IGNORES, size, scale, self.z_loss
            )
            return loss, z_loss if self.z_loss else None
        fused = None
        if logits is None:
            fused = _fused_linear_cross_entropy(self.lm_head, hidden_TD, self.z_loss)
        if logits is not None:
            sums = cross_entropy_and_square(logits.flatten(0, 1).float(), target_T)
        elif fused is not None:
            sums = fused(self.lm_head.weight, hidden_TD, target_T, self.lm_head.bias)
        else:
            sums = hidden_TD.new_zeros((2,) if self.z_loss else (), dtype=torch.float32)
            size = self.loss_chunk_size
            for chunk in zip(hidden_TD.split(size), target_T.split(size), strict=True):
                # Recomputing a chunk's logits in backward is what keeps them from being stored.
                sums = sums + checkpoint(self._summed_loss, *chunk, use_reentrant=False)
        if not self.z_loss:
            return sums / num_items_in_batch, None
        if fused is not None:
            # Its z_loss is in its loss already, and has no gradient of its own.
            return sums.loss / num_items_in_batch, sums.z_loss.detach() / num_items_in_batch
        nats, z_loss = sums / num_items_in_batch
        return nats + self.z_loss * z_loss, self.z_loss * z_loss.detach()

    def _summed_loss(self, hidden_TD, target_T):
        logits = self.lm_head(hidden_TD).float()
        if self.z_loss:
            return cross_entropy_and_square(logits, target_T)
        return F.cross_entropy(logits, target_T, ignore_index=LOSS_IGNORES, reduction="sum")

    def flops_per_token(self, length):
        """As of `ZooModel`, with the projection onto the vocabulary."""
        return self.model.flops_per_token(length) + linear_flops(self.lm_head)

    def join_states(self, caches, **options):
        """One cache from those of several windows of text, as `join_states` of zoo/core/joining.py.

        Args:
            caches: of the windows: one for each, or one whose rows they are.
            options: as there.
        """
        return join_states(caches, self.config, **options)

    @property
    def has_constant_state(self):
        """Whether the state has one size at any length."""
        specs = (spec for specs in self.model.state_specs() for spec in specs.values())
        return all(None not in spec.shape for spec in specs)

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **kwargs
    ):
        """The padding mask of the new tokens, in the same shape at every step; not one in 4D."""
        cache = one_cache(past_key_values, cache)
        if attention_mask is not None:
            check_past_columns(attention_mask, cache, inputs_embeds.shape[1])
        layers = getattr(cache, "layers", ())
        if attention_mask is None or any(getattr(x, "pending_length", 0) for x in layers):
            return attention_mask
        new = attention_mask[:, -inputs_embeds.shape[1] :]
        return new.clone(memory_format=torch.contiguous_format)  # of one stride, too


__all__ = [
    "Constant",
    "ZooBlock",
    "ZooConfig",
    "ZooForCausalLM",
    "ZooModel",
    "ZooPreTrainedModel",
    "check_activation",
    "check_head_dim",
    "in_range",
    "scale_",
]
