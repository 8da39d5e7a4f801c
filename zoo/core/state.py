"""The recurrent state: named tensors per layer, inside a transformers cache.

A mixer declares its tensors (`StateSpec`); the decoder hands it a `State` with them as attributes
and takes the new ones back. Between two forward passes they lie in a `StateLayer`, which
`DynamicCache(config=...)` builds by itself, so that `generate` and beams work through transformers'
own code. A state holds what the model knows of the tokens so far; its size does not depend on how
many there were.
"""

import copy
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

FORMAT = "zoo state 1"
# Of a joined state, whose positions are not its clocks.
JOINED_FORMAT = "zoo state 2"

# What transformers calls a cache, as an argument and in what a model returns: up to 5.23 the one,
# from then on the other. Our models take both, and return the installed library's.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = next(x for x in CACHE_NAMES if x in BaseModelOutputWithPast.__dataclass_fields__)

# While a cache records its past for assisted decoding, at least this many of its last tokens can be
# taken back. Drafts are 5 to 20 tokens long.
ROLLBACK_TOKENS = 128


def one_cache(past_key_values, cache):
    """The cache that was given by either of its names, or None.

    Raises:
        ValueError: two that are not the same.
    """
    if past_key_values is None or cache is past_key_values:
        return cache
    if cache is None:
        return past_key_values
    raise ValueError(
        "past_key_values and cache are two names of one argument, got two caches; pass one."
    )


class StateSpec(NamedTuple):
    """A tensor of a mixer's state: its shape for one sequence, and its value before any token.

    A size of None is as large as the number of tokens so far. dtype None is that of accumulators:
    float32, or float64 in a float64 model.
    """

    shape: tuple[int | None, ...]
    fill: float = 0.0
    dtype: torch.dtype | None = None


def dtype_of(linear):
    """What a projection makes of its input: the dtype of its weight; None if that is quantised."""
    # PyTorch's own quantised layers have a method of that name.
    weight = linear.weight() if callable(linear.weight) else linear.weight
    return weight.dtype if weight.is_floating_point() else None


class State:
    """One layer's state during a forward pass: each declared tensor is an attribute.

    An attribute is [N, *shape], N sequences, or None when all of them start here.
    `is_kept` says whether anybody will read the state afterwards: without that, skip computing it.
    `may_overwrite` says that nobody else looks at the tensors, so that a mixer may write into them.
    """

    def __init__(self, tensors, is_kept, may_overwrite=False):
        vars(self).update(tensors)
        self.is_kept = is_kept
        self.may_overwrite = may_overwrite

    def tensors(self):
        """The tensors by name."""
        tensors = dict(vars(self))
        del tensors["is_kept"], tensors["may_overwrite"]
        return tensors

    def copy(self):
        """A state whose attributes can be set without changing this one's."""
        return State(vars(self), self.is_kept, self.may_overwrite)

    def to(self, device, non_blocking=False):
        """The same state on another device."""
        tensors = {
            name: None if x is None else x.to(device, non_blocking=non_blocking)
            for name, x in self.tensors().items()
        }
        return State(tensors, self.is_kept, self.may_overwrite)


@dataclass
class Inputs:
    """What a forward pass was given, kept so that its first tokens can be run again."""

    embeds_BTD: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None

    def first(self, length):
        """The first `length` tokens; what lies before the pass in a mask stays."""
        dropped = self.embeds_BTD.shape[1] - length
        return Inputs(
            *(None if x is None else x[:, : x.shape[1] - dropped] for x in vars(self).values()),
        )


@dataclass
class Segment:
    """The state before a forward pass and how many tokens that pass took, for taking them back."""

    tensors: dict[str, torch.Tensor]
    clock: torch.Tensor | None
    length_before: int
    length: int
    inputs: Inputs | None
    position_shift: torch.Tensor | None = None


class StateLayer(CacheLayerMixin):
    """A cache layer that holds one mixer's state, of the same size at every length.

    Taking tokens back (`crop`, which assisted decoding needs) restores the state from before the
    forward pass they came in; the tokens of that pass that stay are run again with the next one.

    Attributes:
        tensors: the state by name, each [B, *shape].
        clock: [B], tokens of the current document that each row has seen, without padding.
        position_shift: [B], how far the position of a row's next token is from its clock, where
            several texts were joined into one state; None: they are the same.
        is_one_document: whether each row has had one document so far, as far as is known: its
            clock then counts all its tokens. Kept by the first layer of a cache.
        length: columns seen, with padding; what an attention mask for this cache has to cover.
    """

    _layer_type = "zoo_linear_attention"
    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self._clear()

    def _clear(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.clock = None
        self.position_shift = None
        self.is_one_document = True
        self.length = 0
        self.pending_length = 0
        self.pending: Inputs | None = None
        self.segments: list[Segment] = []

    @property
    def length(self):
        # A number that grows would have a compiled step compiled again at each length, so compiled
        # passes count in a tensor. Reading it waits for the device: only if there were any.
        never_compiled = self._compiled_length is self._zero
        return self._length + (0 if never_compiled else int(self._compiled_length))

    @length.setter
    def length(self, value):
        self._length, self._compiled_length, self._zero = value, None, None

    def _add_to_length(self, columns, device):
        if self._compiled_length is None:
            self._compiled_length = self._zero = torch.zeros((), dtype=torch.int64, device=device)
        if torch.compiler.is_compiling() and not self.record_past:
            self._compiled_length = self._compiled_length + columns
        else:
            self._length += columns

    @property
    def is_initialized(self):
        return bool(self.tensors)

    @is_initialized.setter
    def is_initialized(self, value):
        # CacheLayerMixin's constructor sets it; whether there are tensors says it.
        pass

    @property
    def is_croppable(self):
        return self.record_past

    def lazy_initialization(self, key_states, value_states):
        """Nothing to do: a state begins with the first forward pass."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Not a key-value cache: the decoder reads and writes the state itself."""
        raise TypeError(
            "this cache layer holds a recurrent state, not keys and values; "
            "use it with a zoo model."
        )

    def read(self, sequence, specs):
        """The state each document of the sequence starts from, as a `State`."""
        if not self.tensors:
            return State(dict.fromkeys(specs), is_kept=True)
        tensors, device = {}, sequence.clock.device
        for name, x in self.tensors.items():
            x = x if x.device == device else x.to(device)
            if sequence.row_of_document is not None:
                x = x.index_select(0, sequence.row_of_document)
            if sequence.continues is not None:
                continues = sequence.continues.view(-1, *[1] * (x.ndim - 1))
                x = torch.where(continues, x, specs[name].fill)
            tensors[name] = x
        return State(tensors, is_kept=True)

    def write(self, sequence, specs, state, inputs):
        """Takes in the state after the sequence.

        Args:
            sequence: the `Sequence` that was run.
            specs: the mixer's `StateSpec` by name.
            state: the `State` that came out of the mixer.
            inputs: the `Inputs` of the forward pass, kept only while the past is recorded.
        """
        if self.record_past:
            self._record(sequence.shape[1], inputs)
        self.tensors = self._rows(sequence, specs, state)
        # A row of its own for each: a compiled step is for one stride.
        self.clock = sequence.clock_after.expand(sequence.shape[0]).contiguous()
        self.position_shift = sequence.shift_after
        self._add_to_length(sequence.shape[1], self.clock.device)
        self.pending, self.pending_length = None, 0

    def _rows(self, sequence, specs, state):
        """The state of each row, from that of each document."""
        tensors = {}
        for name, new in state.tensors().items():
            # Rows without a token in this pass keep what they had.
            untouched = None
            if sequence.last_document is not None:
                device = new.device
                last = sequence.last_document.to(device)
                new = new.index_select(0, last.clamp(min=0))
                untouched = last < 0
            elif sequence.keep is not None:
                untouched = ~sequence.keep.to(new.device)
            if untouched is not None:
                old = self.tensors.get(name)
                old = specs[name].fill if old is None else old.to(new.device)
                new = torch.where(untouched.view(-1, *[1] * (new.ndim - 1)), old, new)
            tensors[name] = new
        return tensors

    def _record(self, length, inputs):
        before = self.tensors, self.clock, self.length
        self.segments.append(Segment(*before, length, inputs, self.position_shift))
        while sum(s.length for s in self.segments[1:]) >= ROLLBACK_TOKENS:
            self.segments.pop(0)

    def activate_past_recording(self):
        """From now on, remember enough to take the last tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove):
        """Takes back the last tokens; a negative number, as in transformers.

        Raises:
            ValueError: the past was not recorded, or not so far back.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ValueError(f"crop takes minus the number of tokens, got {tokens_to_remove}.")
        if remove == 0:
            return
        if remove <= self.pending_length:
            self._set_pending(self.pending, self.pending_length - remove)
            return
        remove -= self.pending_length
        available = sum(s.length for s in self.segments)
        if remove > available:
            raise ValueError(
                f"cannot take back {remove} tokens of a recurrent state that remembers the last "
                f"{available}; call activate_past_recording() before the forward pass, or take a "
                "snapshot with zoo.core.state.fork_state and go back to that."
            )
        while remove > 0:
            segment = self.segments.pop()
            self.tensors, self.clock = segment.tensors, segment.clock
            self.position_shift = segment.position_shift
            self.length = segment.length_before
            kept = max(0, segment.length - remove)
            remove -= segment.length - kept
        self._set_pending(segment.inputs, kept)

    def _set_pending(self, inputs, length):
        self.pending_length = length
        self.pending = None if inputs is None or length == 0 else inputs.first(length)

    def get_seq_length(self):
        """Columns seen so far, padding included: what an attention mask must cover."""
        return self.length + self.pending_length

    def get_max_length(self):
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length):
        """(columns a mask covers, offset of the first)."""
        return self.get_seq_length() + query_length, 0

    def reset(self):
        """Forgets everything."""
        self._clear()

    def offload(self):
        """Moves the state to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        """Nothing to do: `read` brings the state to where it is needed."""

    def reorder_cache(self, beam_idx):
        """Row i becomes what row beam_idx[i] was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        """Every row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        """Only these rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, function):
        if self.pending_length or self.segments:
            # Rows change: what was recorded for the old rows no longer fits.
            if self.pending_length:
                raise ValueError(
                    "this cache has tokens waiting to be run again after crop(); run a forward "
                    "pass before reordering or moving its rows."
                )
            self.segments = []
        self.tensors = {name: function(x) for name, x in self.tensors.items()}
        for name in ("clock", "position_shift"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


class SlidingStateLayer(StateLayer):
    """A `StateLayer` of a mixer whose state is a window of past tokens.

    A window is large, and a stream may hold many short documents. So the mixer is handed the state
    by row, [B, *shape], and hands it back by row, rows without a token included: clocks and
    boundaries in the `Sequence` say what is whose.
    """

    # accelerate refuses to split a text over devices, where a state would begin anew in each, if
    # "linear_attention" is in such a name; transformers knows none of these.
    _layer_type = "zoo_sliding_linear_attention"

    def read(self, sequence, specs):
        """The state of each row, as a `State`."""
        if not self.tensors:
            return State(dict.fromkeys(specs), is_kept=True)
        tensors, device = dict(self.tensors), sequence.clock.device
        for name, x in self.tensors.items():
            if x.device != device:
                tensors[name] = x.to(device)
        if sequence.continues is not None and sequence.row_of_document is None:
            held = sequence.continues
            if sequence.keep is not None:
                # The position of padding says nothing.
                held = held | ~sequence.keep
            for name, x in tensors.items():
                is_held = held.view(-1, *[1] * (x.ndim - 1))
                tensors[name] = torch.where(is_held, x, specs[name].fill)
        may_overwrite = not (
            self.record_past
            or torch.is_grad_enabled()
            # A program's caller still has what went in.
            or torch.compiler.is_exporting()
            or any(_must_stay(x) for x in tensors.values())
        )
        return State(tensors, is_kept=True, may_overwrite=may_overwrite)

    def _rows(self, sequence, specs, state):
        return state.tensors()


class GrowingStateLayer(SlidingStateLayer):
    """A `StateLayer` of a mixer that keeps every token: its tensors grow with the text."""

    # Not transformers' name for it: nobody may take this for a cache that can be cut in pieces.
    _layer_type = "zoo_growing_linear_attention"
    is_compileable = False


def _must_stay(x):
    """Whether a tensor belongs to a graph, or to inference mode while that is off."""
    # Tracing knows nothing of inference mode, and copies what must be copied by itself.
    if torch.compiler.is_compiling():
        return x.requires_grad
    return x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled())


LAYERS = {layer._layer_type: layer for layer in (StateLayer, SlidingStateLayer, GrowingStateLayer)}
# Their names in files that were written before.
FORMER_LAYER_TYPES = {
    "zoo_sliding_attention": SlidingStateLayer._layer_type,
    "zoo_growing_sliding_attention": GrowingStateLayer._layer_type,
}
# A static cache holds a state as it is: most have the same shape at every step.
STATIC_LAYER_TYPE_MAPPING.update(LAYERS)


def new_cache(config):
    """An empty cache for a model with this config.

    As `DynamicCache(config=config)`, but with this module's own layers: where several exported
    folders are loaded, each brings its own, and transformers knows the last one.
    """
    cache = DynamicCache(config=config)
    cache.layers = [LAYERS[layer_type]() for layer_type in config.layer_types]
    return cache


class LayerFrame(NamedTuple):
    """What a `StateLayer` holds beside its tensors: their names, and how much it has seen."""

    names: tuple[str, ...]
    clock: torch.Tensor | None
    length: int
    is_one_document: bool
    position_shift: torch.Tensor | None = None


def take_apart(cache):
    """(a `LayerFrame` for each layer, all tensors in one list); `put_together` undoes it."""
    frame = [
        LayerFrame(tuple(x.tensors), x.clock, x.length, x.is_one_document, x.position_shift)
        for x in cache.layers
    ]
    return frame, [x for layer in cache.layers for x in layer.tensors.values()]


def put_together(config, frame, tensors):
    """A cache from what `take_apart` returned, or from other tensors of the same meaning."""
    cache, tensors = new_cache(config), iter(tensors)
    for layer, own in zip(cache.layers, frame, strict=True):
        layer.tensors = {name: next(tensors) for name in own.names}
        layer.clock, layer.length = own.clock, own.length
        layer.is_one_document, layer.position_shift = own.is_one_document, own.position_shift
    return cache


def state_size(specs_by_layer, dtype=torch.float32, num_tokens=None):
    """Bytes of state for one sequence.

    Args:
        specs_by_layer: for each layer its `StateSpec` by name (`ZooModel.state_specs`).
        dtype: dtype of accumulators.
        num_tokens: of the text so far, where the state grows with it.

    Raises:
        ValueError: the state grows, and num_tokens was not given.
    """
    specs = [spec for specs in specs_by_layer for spec in specs.values()]
    if num_tokens is None and any(None in spec.shape for spec in specs):
        raise ValueError("this state grows with the text: pass num_tokens, got None.")
    return sum(
        math.prod(num_tokens if size is None else size for size in spec.shape)
        * (spec.dtype or dtype).itemsize
        for spec in specs
    )


def state_bytes(cache):
    """Bytes the tensors of a live cache take, all rows together."""
    return sum(x.nbytes for layer in cache.layers for x in layer.tensors.values())


def fork_state(cache):
    """An independent copy of a cache: run either on, the other stays as it is."""
    memo = {}
    for layer in cache.layers:
        for x in _all_tensors(layer):
            # A state under autograd is not a leaf, which deepcopy refuses; the graph is shared.
            memo[id(x)] = x.clone()
    return copy.deepcopy(cache, memo)


def _all_tensors(layer):
    held = [layer.pending, *(s.inputs for s in layer.segments)]
    for owner in (layer, *layer.segments):
        yield from owner.tensors.values()
        yield from (x for x in (owner.clock, owner.position_shift) if x is not None)
    for inputs in held:
        if inputs is not None:
            yield from (x for x in vars(inputs).values() if x is not None)


def save_state(cache, path):
    """Writes a cache to a safetensors file.

    Raises:
        ValueError: the cache has no state yet, or tokens taken back that must be run again first.
    """
    tensors, lengths = {}, []
    for index, layer in enumerate(cache.layers):
        if not layer.tensors or layer.pending_length:
            raise ValueError(
                "expected a cache after a forward pass, got one "
                + ("with tokens to run again after crop()" if layer.tensors else "without state")
                + "; run the model on at least one token first."
            )
        tensors |= {f"layers.{index}.{name}": x.contiguous() for name, x in layer.tensors.items()}
        for name in ("clock", "position_shift"):
            if getattr(layer, name) is not None:
                tensors[f"layers.{index}.{name}"] = getattr(layer, name).contiguous()
        lengths.append(layer.length)
    is_one_document = json.dumps(cache.layers[0].is_one_document)
    metadata = {
        "format": FORMAT if cache.layers[0].position_shift is None else JOINED_FORMAT,
        "lengths": json.dumps(lengths),
        "is_one_document": is_one_document,
    }
    save_file({name: x.detach().clone() for name, x in tensors.items()}, path, metadata)


def load_state(path, config, device="cpu"):
    """Reads a cache that `save_state` wrote.

    Args:
        path: the safetensors file.
        config: the model's config.
        device: where the state goes.

    Raises:
        ValueError: not such a file, or one of a model with another number of layers.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in (FORMAT, JOINED_FORMAT):
            raise ValueError(
                f"{path}: expected a state written by zoo ({FORMAT!r}), got format "
                f"{metadata.get('format')!r}; write it with zoo.core.state.save_state."
            )
        cache = new_cache(config)
        lengths = json.loads(metadata["lengths"])
        if len(lengths) != len(cache.layers):
            raise ValueError(
                f"{path}: expected the state of {len(cache.layers)} layers, got {len(lengths)}; "
                "load it with the config of the model that wrote it."
            )
        for name in file.keys():
            _, index, key = name.split(".", 2)
            layer = cache.layers[int(index)]
            if key in ("clock", "position_shift"):
                setattr(layer, key, file.get_tensor(name))
            else:
                layer.tensors[key] = file.get_tensor(name)
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.length = length
            layer.is_one_document = metadata.get("is_one_document") == "true"
    return cache
