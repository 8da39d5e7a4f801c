"""Faults of models of others, each shown by a program of transformers alone, without the contract.

    python tests/contract/direct_faults.py

Each runs a tiny model with random weights twice in ways that should agree, and once more as a
control: the same where the fault has nothing to do. A fault is shown if the first two differ and
the control does not. The referee's verdicts in recipes/results/contract/ are checked by these.
"""

import sys
from dataclasses import dataclass

import torch
import transformers
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass
class Shown:
    """What a program saw.

    Attributes:
        fault: in a line.
        seen: how far apart what should agree is, relative to the largest value, or what was raised.
        control: the same where the fault has nothing to do.
    """

    fault: str
    seen: float | str
    control: float

    @property
    def is_there(self):
        """Whether the model has the fault: roundings of float32 are a hundred times smaller."""
        differs = self.seen if isinstance(self.seen, str) else self.seen > 10 * self.control + 1e-5
        return bool(differs) and self.control < 1e-5


def built(cls, config):
    """A model of random weights with no part that its initialisation hides."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return model.eval()


def apart(found, expected):
    """The largest difference, relative to the largest expected value."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def raised(function):
    """What a function raises, in a line; "" if nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def ids(*shape):
    """Ids that are not special in any of these configs."""
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(7))


def documents_by(model, with_seq_idx=False):
    """How far a packed document's logits are from its own alone: the second, and the first."""
    one, two = ids(1, 9), ids(1, 19)[:, 10:]
    packed = torch.cat([one, two], dim=1)
    told = {"position_ids": torch.arange(9).repeat(2)[None]}
    if with_seq_idx:
        told["seq_idx"] = torch.tensor([[0] * 9 + [1] * 9], dtype=torch.int32)
    logits = model(packed, use_cache=False, **told).logits
    second = apart(logits[:, 9:], model(two, use_cache=False).logits)
    return second, apart(logits[:, :9], model(one, use_cache=False).logits)


def rwkv():
    """RwkvForCausalLM."""
    config = RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, **NO_TOKENS)
    return built(RwkvForCausalLM, config)


def rwkv_rows():
    """One token each of two rows, after one token each."""
    model, text = rwkv(), ids(2, 2)
    state = model(text[:, :1], use_cache=True).state
    step = model(text[:, 1:], state=state, use_cache=True).logits
    alone = []
    for row in text.split(1):
        state = model(row[:, :1], use_cache=True).state
        alone.append(model(row[:, 1:], state=state, use_cache=True).logits)
    control = apart(torch.cat(alone), model(text, use_cache=False).logits[:, 1:])
    shape = list(step.shape)
    seen = f"logits of shape {shape} for 2 rows of 1 token" if shape[1] != 1 else 0.0
    return Shown("one token of each of several rows: every row is given every row's", seen, control)


def rwkv_padding():
    """A row with one padding token on its left, masked."""
    model, text = rwkv(), ids(1, 6)
    padded = torch.cat([ids(1, 1) + 1, text], dim=1)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    alone = model(text, use_cache=False).logits
    seen = apart(model(padded, attention_mask=mask, use_cache=False).logits[:, 1:], alone)
    control = apart(
        model(text, attention_mask=torch.ones_like(text), use_cache=False).logits, alone
    )
    return Shown("attention_mask is taken and not used: padding is read as text", seen, control)


def minimax():
    """MiniMaxForCausalLM of a linear layer and one of softmax attention."""
    config = MiniMaxConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        block_size=16,
        layer_types=["linear_attention", "full_attention"],
        **NO_TOKENS,
    )
    return built(MiniMaxForCausalLM, config)


def minimax_documents():
    """Two documents in a row, by position_ids."""
    return Shown(
        "the linear layers' state runs on into the next document", *documents_by(minimax())
    )


def minimax_length():
    """A token after a cache, without position_ids; the control gives them."""
    model, text = minimax(), ids(1, 6)
    whole = model(text, use_cache=False).logits[:, 5:]
    cache = model(text[:, :5], use_cache=True).past_key_values
    length = cache.get_seq_length()
    seen = apart(model(text[:, 5:], past_key_values=cache, use_cache=True).logits, whole)
    cache = model(text[:, :5], use_cache=True).past_key_values
    told = {"position_ids": torch.tensor([[5]])}
    step = model(text[:, 5:], past_key_values=cache, use_cache=True, **told).logits
    return Shown(
        f"the cache asks its first layer, a linear one, for its length: {length} after 5 tokens",
        seen,
        apart(step, whole),
    )


def minimax_padding():
    """A token after a cache of a row padded on the left; the control is not padded."""
    model, text = minimax(), ids(1, 6)
    whole = model(text, use_cache=False).logits[:, 5:]
    found = []
    for number in (2, 0):
        prompt = torch.cat([ids(1, number), text[:, :5]], dim=1)
        mask = torch.tensor([[0] * number + [1] * 6])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        told = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
        cache = model(prompt, use_cache=True, **told).past_key_values
        told = {"attention_mask": mask, "position_ids": positions[:, -1:]}
        found.append(
            apart(model(text[:, 5:], past_key_values=cache, use_cache=True, **told).logits, whole)
        )
    return Shown("the mask of a decoding step is made for a cache of that length", *found)


def minimax_beams():
    """A token after the cache of two rows was reordered; the control reorders to the same order."""
    model, text = minimax(), ids(2, 6)
    found = []
    for order in ([1, 0], [0, 1]):
        order = torch.tensor(order)
        cache = model(text[:, :5], use_cache=True).past_key_values
        cache.reorder_cache(order)
        told = {"position_ids": torch.tensor([[5], [5]])}
        step = model(text[order, 5:], past_key_values=cache, use_cache=True, **told).logits
        found.append(apart(step, model(text[order], use_cache=False).logits[:, 5:]))
    return Shown("reorder_cache leaves the linear layers' states where they were", *found)


def mamba2():
    """Mamba2ForCausalLM."""
    config = Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
        **NO_TOKENS,
    )
    return built(Mamba2ForCausalLM, config)


def mamba2_documents():
    """Two documents in a row, by all that the collator gives."""
    model = mamba2()
    second, first = documents_by(model, with_seq_idx=True)
    told = {"seq_idx": torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)}
    body = raised(lambda: model.backbone(ids(1, 4), use_cache=False, **told))
    return Shown(
        "the head drops seq_idx on the way to its body, which "
        + (f"would refuse it ({body.split(':')[0]})" if body else "takes it"),
        second,
        first,
    )


def recurrent_gemma():
    """RecurrentGemmaForCausalLM of two recurrent layers and one of attention."""
    config = RecurrentGemmaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=32,
        attention_window_size=16,
        **NO_TOKENS,
    )
    return built(RecurrentGemmaForCausalLM, config)


def recurrent_gemma_padding():
    """A row padded on its left, with mask and position_ids."""
    model, text = recurrent_gemma(), ids(1, 6)
    alone = model(text, use_cache=False).logits
    found = []
    for number in (2, 0):
        mask = torch.tensor([[0] * number + [1] * 6])
        told = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        padded = torch.cat([ids(1, number), text], dim=1)
        found.append(apart(model(padded, use_cache=False, **told).logits[:, number:], alone))
    fault = "the convolution before the recurrence is not given the mask: it reads padding"
    return Shown(fault, *found)


def recurrent_gemma_documents():
    """Two documents in a row, by position_ids."""
    return Shown(
        "the convolution before the recurrence, which is reset, reads the document before",
        *documents_by(recurrent_gemma()),
    )


def jamba_documents():
    """Two documents in a row, by all that the collator gives."""
    config = JambaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        **NO_TOKENS,
    )
    model = built(JambaForCausalLM, config)
    fault = "the Mamba layers are told nothing of documents: their state runs on into the next"
    return Shown(fault, *documents_by(model, with_seq_idx=True))


def zamba2_time_step():
    """A token after a cache; the control has no lower bound of the time step."""
    found = []
    for least in (0.001, 0.0):
        config = Zamba2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            layers_block_type=["mamba", "hybrid"],
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_head_dim=32,
            n_mamba_heads=4,
            mamba_headdim=16,
            mamba_d_state=8,
            mamba_ngroups=1,
            num_mem_blocks=1,
            adapter_rank=4,
            chunk_size=8,
            **NO_TOKENS,
        )
        model = built(Zamba2ForCausalLM, config)
        for layer in model.modules():
            if hasattr(layer, "time_step_limit"):
                layer.time_step_limit = (least, float("inf"))
                # Time steps below the bound, as trained models have some.
                layer.dt_bias.data -= 8
                layer.D.data *= 0
        text = ids(1, 24)
        whole = model(text, use_cache=False).logits[:, 23:]
        cache = model(text[:, :1], use_cache=True).past_key_values
        for column in range(1, 24):
            told = {"position_ids": torch.tensor([[column]])}
            step = model(
                text[:, column : column + 1], past_key_values=cache, use_cache=True, **told
            )
        found.append(apart(step.logits, whole))
    fault = "time steps are held above time_step_min in a whole text and not in a decoding step"
    return Shown(fault, *found)


def xlstm():
    """xLSTMForCausalLM."""
    config = xLSTMConfig(
        vocab_size=97, hidden_size=128, num_blocks=1, num_heads=2, chunk_size=16, **NO_TOKENS
    )
    return built(xLSTMForCausalLM, config)


def xlstm_resize():
    """resize_token_embeddings."""
    seen = raised(lambda: xlstm().resize_token_embeddings(100, mean_resizing=False))
    model, text = xlstm(), ids(1, 20)
    return Shown(
        "its initialisation takes any embedding to be its body's own",
        seen,
        apart(model(text).logits, model(text).logits),
    )


def xlstm_bf16():
    """bf16 without a cache; the control has one."""
    model, text = xlstm().bfloat16(), ids(1, 20)
    seen = raised(lambda: model(text, use_cache=False))
    control = 1.0 if raised(lambda: model(text, use_cache=True)) else 0.0
    return Shown("in bf16, a text without a cache multiplies float32 by bf16", seen, control)


PROGRAMS = (
    rwkv_rows,
    rwkv_padding,
    minimax_documents,
    minimax_length,
    minimax_padding,
    minimax_beams,
    mamba2_documents,
    recurrent_gemma_padding,
    recurrent_gemma_documents,
    jamba_documents,
    zamba2_time_step,
    xlstm_resize,
    xlstm_bf16,
)


def main():
    """Runs them all; 1 if one does not show its fault."""
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    missing = 0
    for program in PROGRAMS:
        with torch.no_grad():
            shown = program()
        missing += not shown.is_there
        seen = shown.seen if isinstance(shown.seen, str) else f"apart by {shown.seen:.2g}"
        verdict = "shown" if shown.is_there else "NOT SHOWN"
        print(f"{program.__name__}: {verdict}: {shown.fault}: {seen} (control {shown.control:.1g})")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
