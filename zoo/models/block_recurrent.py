"""Block-Recurrent Transformer: sliding-window attention, and a layer whose state reads each window.

Hutchins et al. 2022, https://arxiv.org/abs/2203.07852. It is defined here by the authors' code
(google-research/meliad), which differs from the paper in places. Token n of a document, counted
from 0, per head, with q and k of length 1 (x / sqrt(|x|^2 + 1e-6)) and a learned scale a:

    s_d = |a| (q_n . k_{n-d} + b_d)    over the W tokens before it, d = 1 to W, without itself
    o_n = sum_d exp(s_d) v_{n-d} / (exp(-1000) + sum_d exp(s_d))

b is T5's bias by distance (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), added before the
scale. Tokens before the document have k = v = 0 and are not masked: their exp(|a| b_d) stays in the
denominator. Blocks are pre-norm (RMSNorm, eps 1e-6) with a ReLU MLP; logits are divided by sqrt(D)
and the output projection is the embedding.

A recurrent layer (`recurrent_layers`) has M states s as well, learned ones before the first window.
Windows are W tokens long and counted from a document's own start. All tokens of window w read the
states from before it, with queries q2 of their own (of length 1, scale a2), and both results are
projected together; zoo/layers/recurrent_cell.py then takes the keys and values of windows w - 1
and w in:

    y_n = W_o [o_n, softmax(|a2| q2_n . rk) rv],  rk, rv from s_w;   s_{w+1} = cell(s_w, k, v)

With `feedback`, tokens of all other layers read the states of the last recurrent layer from before
their window too, so that the stack runs window by window (1.35 to 1.4 times the time, they say).

`position_embedding_type="alibi"` has ALiBi's bias in the place of T5's, for the slope m of a head
(Press et al. 2021, https://arxiv.org/abs/2108.12409): s_d = |a| q_n . k_{n-d} - m d. As in its
paper it is not learned and not scaled. The authors of this architecture have nothing like it.

`memory_layers` have the external memory of the Memorizing Transformer (Wu et al. 2022,
https://arxiv.org/abs/2203.08913), of the same authors and code: zoo/layers/external_memory.py. Such
a layer has no bias by distance; with `num_states=0` it is that model, with states it has both.

`num_states=0` is the paper's baseline "Slide": a Transformer-XL with a sliding cache, whose
gradients go into the window before. That of Transformer-XL's own authors, with other positions and
blocks, is zoo/models/transformer_xl.py.

Departures: the code has the logit of -1000 in the softmaxes over and of states too; it changes
no digit below scales of 900. Its dropout and its other position encodings are left out. The gate
"full" is in the code, but in no configuration of its authors. Its weights load through
`zoo convert meliad`. What we found of its states is in hub_cards/block_recurrent.md.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..core.base import (
    ZooBlock,
    ZooConfig,
    ZooForCausalLM,
    ZooModel,
    ZooPreTrainedModel,
    check_head_dim,
)
from ..core.heads import (
    ZooForQuestionAnswering,
    ZooForSequenceClassification,
    ZooForTokenClassification,
)
from ..core.segment_passes import Joined, run_by_segment
from ..core.state import SlidingStateLayer
from ..layers.block_attention import WindowAttention
from ..layers.meliad_block import (
    FeedForward,
    FinalNorm,
    check_biases,
    check_memory,
    check_states,
)
from ..layers.window_step import window_step

_SMALL = {"sliding_window": 16, "num_states": 5, "recurrent_layers": [0]}
_MEMORIZING = {"sliding_window": 16, "num_states": 0, "memory_layers": [-1], "memory_size": 64}
_MEMORIZING |= {"memory_neighbors": 8, "memory_segment_length": 32}


@strict
class BlockRecurrentConfig(ZooConfig):
    """The mathematics of meliad's Block-Recurrent Transformer; defaults are those of its code.

    Args:
        intermediate_size: MLP width F; None: four times hidden_size.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        sliding_window: W, how many tokens before its own a token sees, and the length of a window
            of the recurrence.
        num_states: M, state vectors of a recurrent layer; 0: none, the baseline.
        recurrent_layers: which layers have states, counted from 0, or from the top if negative;
            None: the third from the top (of fewer layers the first).
        gate: of a state: bias (the paper's fixed gate), full or lstm.
        configuration: of the states' side: skip (no MLP), dual (a gate after attention and one
            after the MLP) or single (the MLP alone, and its gate).
        feedback: whether all other layers read the states too.
        position_embedding_type: "t5" or "alibi", in all layers.
        num_buckets: of "t5", of distances in the bias.
        max_distance: of "t5", from which on distances share the last bucket.
        alibi_bias_max: of "alibi", b in the slopes 2^(-b (h + 1) / H), as in `SlidingWindowConfig`.
        rms_norm_eps: epsilon of the norms.
        memory_layers: which layers have an external memory, counted as recurrent_layers and none of
            them; None: none. They have no bias by distance. The fields below are theirs.
        memory_size: DB, tokens in the memory of each head.
        memory_neighbors: NB, of which a query takes so many.
        memory_selection: "columns" (the authors' approximate search, one of each of NB columns) or
            "exact" (the NB best).
        memory_segment_length: S, tokens that come into the memory together.
    """

    model_type = "zoo_block_recurrent"
    layer_type = SlidingStateLayer._layer_type
    variants: ClassVar[dict[str, dict]] = {
        "default": _SMALL,
        "bias-dual": _SMALL | {"configuration": "dual"},
        "bias-single": _SMALL | {"configuration": "single"},
        "full-dual": _SMALL | {"gate": "full", "configuration": "dual"},
        "lstm-skip": _SMALL | {"gate": "lstm"},
        "lstm-dual": _SMALL
        | {"gate": "lstm", "configuration": "dual", "sliding_window": 13, "head_dim": 10},
        "lstm-single": _SMALL | {"gate": "lstm", "configuration": "single"},
        "two-recurrent-layers": _SMALL | {"num_hidden_layers": 3, "recurrent_layers": [0, -1]},
        # One window after the other through all layers: fewer of them, for the time it takes.
        "feedback": _SMALL
        | {"num_hidden_layers": 3, "recurrent_layers": [1], "feedback": True, "sliding_window": 32},
        "alibi": _SMALL | {"position_embedding_type": "alibi"},
        "transformer-xl": {"sliding_window": 16, "num_states": 0},
        "memorizing": _MEMORIZING,
        "memorizing-exact": _MEMORIZING | {"memory_selection": "exact", "memory_neighbors": 5},
    }

    head_dim: int | None = None
    sliding_window: int = 512
    num_states: int = 512
    recurrent_layers: list[int] | None = None
    gate: str = "bias"
    configuration: str = "skip"
    feedback: bool = False
    position_embedding_type: Literal["t5", "alibi"] = "t5"
    num_buckets: int = 32
    max_distance: int = 128
    alibi_bias_max: int | float = 8
    rms_norm_eps: float = 1e-6
    memory_layers: list[int] | None = None
    memory_size: int = 8192
    memory_neighbors: int = 128
    memory_selection: Literal["columns", "exact"] = "columns"
    memory_segment_length: int = 512
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        layers = self.num_hidden_layers
        if self.recurrent_layers is None:
            self.recurrent_layers = [max(layers - 3, 0)] if self.num_states else []
        for name in ("recurrent_layers", "memory_layers"):
            chosen = getattr(self, name) or []
            setattr(self, name, [i + layers if -layers <= i < 0 else i for i in chosen])
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks heads, window, states and gates."""
        super().validate_architecture()
        check_head_dim(self)
        if self.sliding_window < 1:
            raise ValueError(f"sliding_window is at least 1 token, got {self.sliding_window}.")
        check_states(self)
        check_biases(self)
        check_memory(self)


class BlockRecurrentBlock(ZooBlock):
    """A block of the Block-Recurrent Transformer, recurrent or not."""

    mixer_class = WindowAttention
    mlp_class = FeedForward


class WindowBlock(ZooBlock):
    """The same with feedback, where it is called once per window."""

    mixer_class = WindowAttention
    mlp_class = FeedForward


class BlockRecurrentPreTrainedModel(ZooPreTrainedModel):
    """Block-Recurrent config, layers and initialisation for transformers."""

    config: BlockRecurrentConfig
    _no_split_modules = ["BlockRecurrentBlock", "WindowBlock"]
    # transformers keeps this by class, so it has to hold with and without feedback.
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(BlockRecurrentBlock, index=0),
            OutputRecorder(Joined, index=0),
        ]
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Where it is not the embedding itself, the output projection begins like one.
        if module is getattr(self, "lm_head", None):
            init.normal_(module.weight)


class BlockRecurrentModel(BlockRecurrentPreTrainedModel, ZooModel):
    """The Block-Recurrent decoder."""

    block_class = BlockRecurrentBlock

    def __init__(self, config):
        if config.feedback:
            self.block_class = WindowBlock
        self.walks_segments = config.feedback
        super().__init__(config)
        self.joined = Joined()

    def build_norm(self, config):
        """The norm after the last block."""
        return FinalNorm(config.hidden_size, eps=config.rms_norm_eps)

    def init_weights_of_paper(self):
        """Embeddings of variance 1."""
        init.normal_(self.embed_tokens.weight)

    def mixer_inputs(self, x_BTD, sequence):
        """What a token sees, the same in all layers."""
        return {"step": window_step(sequence, self.config.sliding_window)}

    def _run_blocks(self, *args, **kwargs):
        run = self._run_windows if self.config.feedback else super()._run_blocks
        return run(*args, **kwargs)

    @capture_outputs
    def _run_windows(self, x_BTD, sequence, cache, inputs, **kwargs):
        """The stack window by window, for layers that read what the windows before left."""
        self._check_checkpointing()
        layers, source = self.layers, self.config.recurrent_layers[-1]

        def reads(own, states):
            step = window_step(own, self.config.sliding_window)
            read = layers[source].mixer.cell(own, states[source], step=step)
            return {"read": read, "step": step}

        is_recorded = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        window = self.config.sliding_window
        for y_BTD in run_by_segment(
            layers, x_BTD, sequence, cache, inputs, window, reads, keeps_all=is_recorded
        ):
            x_BTD = self.joined(x_BTD, y_BTD)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD))


class BlockRecurrentForCausalLM(BlockRecurrentPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """A Block-Recurrent Transformer as a language model."""

    model_class = BlockRecurrentModel

    def visible_tokens(self, length):
        """Of so many tokens, those the last one's logits depend on, [length] bool.

        What a memory recalls is left out: it depends on the text, and passes no gradient on.
        """
        reach = self.config.num_hidden_layers * self.config.sliding_window + 1
        if self.config.num_states:  # all of them, through the states
            reach = length
        return torch.arange(length) >= length - reach


class BlockRecurrentForSequenceClassification(
    BlockRecurrentPreTrainedModel, ZooForSequenceClassification
):
    """A Block-Recurrent Transformer as a classifier of texts."""

    model_class = BlockRecurrentModel


class BlockRecurrentForTokenClassification(
    BlockRecurrentPreTrainedModel, ZooForTokenClassification
):
    """A Block-Recurrent Transformer as a classifier of tokens."""

    model_class = BlockRecurrentModel


class BlockRecurrentForQuestionAnswering(BlockRecurrentPreTrainedModel, ZooForQuestionAnswering):
    """A Block-Recurrent Transformer as a finder of answers in a text."""

    model_class = BlockRecurrentModel


__all__ = [
    "BlockRecurrentConfig",
    "BlockRecurrentModel",
    "BlockRecurrentForCausalLM",
    "BlockRecurrentForSequenceClassification",
    "BlockRecurrentForTokenClassification",
    "BlockRecurrentForQuestionAnswering",
]
