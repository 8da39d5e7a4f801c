"""Small configs for models of other libraries: the fields to set, in general and by model_type."""

from transformers import PretrainedConfig

# Set where a config has the field and uses it: a window of None stays None. Every kind of layer
# must be there, and every length that a sequence is cut at inside (chunks, windows, blocks) be
# shorter than the sequences checked.
GENERAL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 24,
}
# Ids beyond a small vocabulary, and an end that would stop `generate` early.
NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Mamba-2's heads: num_heads * head_dim = expand * hidden_size.
MAMBA2_HEADS = {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1}
MAMBA2_IN_HYBRIDS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
BY_TYPE = {
    "bamba": MAMBA2_IN_HYBRIDS | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "codegen": {"n_ctx": 1024, "rotary_dim": 8, "n_inner": 96},
    "deepseek_v3": {
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "head_dim": 8,
        "v_head_dim": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "falcon_mamba": {"state_size": 16},
    "gemma2": {"num_hidden_layers": 2, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "n_positions": 1024},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 16},
    "mamba2": MAMBA2_HEADS | {"chunk_size": 16},
    "minimax": {"block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 24,
        "lru_width": 64,
        "num_key_value_heads": 1,
    },
    "rwkv": {"context_length": 4096, "rescale_every": 6},
    "xlstm": {
        "num_blocks": 2,
        "num_heads": 4,
        # Its keys are half as wide, and rounded up to a multiple of 64 in the state only.
        "hidden_size": 128,
        "embedding_dim": 128,
        "chunk_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "chunk_size": 16,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
}


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of this class with its fields made small.

    Args:
        config_class: of a causal LM of transformers, or of code like it.

    Raises:
        ValueError: the class does not take the small sizes; it is to be given as a folder then.
    """
    known = BY_TYPE.get(config_class.model_type, {})
    try:
        defaults = config_class()
        fields = {
            name: x
            for name, x in GENERAL.items()
            if getattr(defaults, name, None) is not None
            # What follows from other fields cannot be set.
            and not isinstance(getattr(config_class, name, None), property)
        }
        fields |= {name: x for name, x in NO_SPECIAL_TOKENS.items() if hasattr(defaults, name)}
        fields |= known
        return config_class(**fields)
    except Exception as error:
        raise ValueError(
            f"expected a class whose config can be made small, got {config_class.__name__}, which "
            f"says {str(error).splitlines()[0] if str(error) else type(error).__name__!r}; save a "
            "model of the size you want with save_pretrained and give its folder."
        ) from error
