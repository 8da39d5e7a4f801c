"""llama.cpp through llama-cpp-python: GGUF files of our RWKV-7 and of a Mistral, and a model of it.

The files are written by the package gguf, with the names that llama.cpp reads and without a
tokenizer. In bfloat16 the large matrices are, as its own converter does it; vectors and RWKV-7's
adapters stay float32.
"""

import numpy as np
import torch

from .peers import Peer, authors_tensors

CONTEXT = 2048  # tokens
# The RWKV authors' names -> llama.cpp's.
OUTSIDE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm"}
OUTSIDE["head"] = "output"
RWKV7 = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
    "ffn.x_k": "channel_mix_lerp_k",
}
# transformers' names -> llama.cpp's.
LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def rwkv7_tensors(model):
    """llama.cpp's name -> tensor of our RWKV-7."""
    found, shifts = {}, {}
    for name, x in authors_tensors(model).items():
        stem, _, kind = name.rpartition(".")
        if stem in OUTSIDE:
            found[f"{OUTSIDE[stem]}.{kind}"] = x
            continue
        _, layer, name = name.split(".", 2)
        there, x = f"blk.{layer}.", x.squeeze()
        part = name.removeprefix("att.")
        if name.startswith("att.x_"):
            shifts.setdefault(layer, {})[name[-1]] = x
        elif part in ("k_k", "k_a", "r_k"):
            found[f"{there}time_mix_{part}.weight"] = x.flatten()
        elif name.startswith("att.") and len(part) == 2:  # w0, w1, w2, ...: a low-rank adapter
            x = x.T if x.ndim == 2 else x
            if layer == "0" and part[0] == "a":
                # It wants a residual of the first layer, unused, and as large as this one.
                found[f"{there}time_mix_v{part[1]}.weight"] = x
            if layer != "0" or part[0] != "v":
                found[f"{there}time_mix_{part}.weight"] = x
        else:
            stem, _, kind = (name, "", "weight") if name in RWKV7 else name.rpartition(".")
            found[f"{there}{RWKV7[stem]}.{kind}"] = x
    for layer, x in shifts.items():
        fused = torch.stack([x[key] for key in "rwkvag"])[:, None, None]
        found[f"blk.{layer}.time_mix_lerp_fused.weight"] = fused
    return found


def mistral_tensors(model):
    """llama.cpp's name -> tensor of transformers' Mistral."""
    heads, found = model.config.num_attention_heads, {}
    for name, x in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        there = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            there = f"blk.{layer}."
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            # It rotates neighbours, transformers the halves of a head.
            x = x.view(heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape)
        found[f"{there}{LLAMA[stem]}.{kind}"] = x
    return found


def write(path, twin, dtype):
    """Writes a GGUF file of a contender: our RWKV-7, or a Mistral."""
    import gguf

    model, size, is_rwkv = twin.model, twin.size, twin.name == "rwkv7"
    writer = gguf.GGUFWriter(path, "rwkv7" if is_rwkv else "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(twin.mlp)
    writer.add_vocab_size(size.vocab)
    writer.add_tokenizer_model("no_vocab")
    config = model.config
    if is_rwkv:
        writer.add_head_count(0)
        writer.add_layer_norm_eps(1e-5)
        writer.add_wkv_head_size(config.head_size)
        writer.add_decay_lora_rank(config.decay_lora_rank)
        writer.add_iclr_lora_rank(config.rate_lora_rank)
        writer.add_value_residual_mix_lora_rank(config.value_lora_rank)
        writer.add_gate_lora_rank(config.gate_lora_rank)
    else:
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, x in (rwkv7_tensors if is_rwkv else mistral_tensors)(model).items():
        is_large = x.ndim == 2 and ("time_mix" not in name or min(x.shape) >= size.width)
        if dtype == torch.bfloat16 and is_large:
            raw = x.detach().to(dtype).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, x.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp(Peer):
    """A model of llama.cpp, which holds one state: a `read` without one begins anew."""

    def load(self, folder, dtype):
        import llama_cpp

        path = folder / "model.gguf"
        write(path, self.twin, dtype)
        kept = llama_cpp.GGML_TYPE_F32 if dtype == torch.float32 else llama_cpp.GGML_TYPE_F16
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=CONTEXT,
            n_batch=1024,
            n_threads=1,
            n_threads_batch=1,
            type_k=kept,
            type_v=kept,
            use_mmap=False,
            verbose=False,
        )
        path.unlink()

    def read(self, ids_1T, state=None):
        if state is None:
            self.llama.reset()
        self.llama.eval(ids_1T[0].tolist())
        return self

    def logits(self, ids_1T):
        import llama_cpp

        self.read(ids_1T)
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.size.vocab,)).copy())
