"""A memory of each layer that its tokens of memory write and all tokens of later segments read.

The associative memory of ARMT (Rodkin et al. 2024, https://arxiv.org/abs/2407.04841), as in its
authors' code. With DPFP features of order nu (Schlag et al. 2021, https://arxiv.org/abs/2102.11174)

    phi(x) = concat_{j = 1..nu} a * roll(a, j),   a = [relu(x), relu(-x)],

a token of a segment after the first gets, before the layer,

    x = x + phi(W_q x) A / (phi(W_q x) . z + 1e-5),

and of the layer's output h at the m tokens that write, all with A and z from before the segment,

    k = phi(W_k h),  v = W_v h,  beta = sigmoid(w . h + b)
    A += sum_i k_i^T beta_i (v_i - k_i A / (k_i . z + 1e-5))
    z += sum_i gamma_i k_i,   gamma = clip(1 - (k . z + 1e-5) / (|k|^2 + 1e-5), 0, 1), no gradient.

The first segment finds nothing: gamma is 1 there. Nothing bounds the quotient, so that W_v begins
at zero, and all of it is in float32 at least.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init

from ..core.flops import linear_flops
from ..core.state import StateSpec
from ..kernels.export_scan import without_autocast
from .frame_attention import FrameBlock

EPSILON = 1e-5


def dpfp(x, order):
    """The features phi(x), [..., 2 order size] of [..., size]."""
    a = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([a * a.roll(j, dims=-1) for j in range(1, order + 1)], dim=-1)


class AssociativeMemory(nn.Module):
    """The matrices of one layer's memory; the memory itself, A and z, is a state.

    Args:
        config: with hidden_size, memory_size (of a vector before phi), dpfp_order and
            memory_correction (whether gamma is as above, or 1).
    """

    def __init__(self, config):
        super().__init__()
        self.order, self.corrects = config.dpfp_order, config.memory_correction
        width, size = config.hidden_size, config.memory_size
        self.num_features = 2 * self.order * size
        self.q_proj = nn.Linear(width, size, bias=False)
        self.k_proj = nn.Linear(width, size, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.strength_proj = nn.Linear(width, 1)

    def init_weights_of_paper(self):
        """W_v at zero, so that the memory begins silent; the rest as PyTorch's linear layers."""
        init.zeros_(self.v_proj.weight)
        bound = self.q_proj.in_features**-0.5
        for proj in (self.q_proj, self.k_proj, self.strength_proj):
            init.uniform_(proj.weight, -bound, bound)
        init.uniform_(self.strength_proj.bias, -bound, bound)

    def state_specs(self):
        """A and z."""
        width = self.v_proj.out_features
        return {
            "association_BKD": StateSpec((self.num_features, width)),
            "normalizer_BK": StateSpec((self.num_features,)),
        }

    def read(self, x_BTD, sequence, state):
        """What each token finds, [B, T, D].

        Args:
            x_BTD: the tokens of a frame.
            sequence: how they lie; a document is a row of the state.
            state: before the frame.
        """
        association_NKD, normalizer_NK = state.association_BKD, state.normalizer_BK
        features_BTK = dpfp(self.q_proj(x_BTD).to(association_NKD.dtype), self.order)
        with without_autocast(x_BTD):
            if sequence.cu_seqlens is None:
                return found(features_BTK, association_NKD, normalizer_NK).to(x_BTD.dtype)
            # Documents as rows, for one product with each one's own memory.
            rows_N, lengths_N = sequence.row_of_document, sequence.cu_seqlens.diff()
            features = pad_sequence(features_BTK[0].split(lengths_N.tolist()), batch_first=True)
            found_NTD = found(features, association_NKD[rows_N], normalizer_NK[rows_N])
            is_token_NT = torch.arange(features.shape[1], device=x_BTD.device) < lengths_N[:, None]
            return found_NTD[is_token_NT][None].to(x_BTD.dtype)

    def write(self, h_NMD, association_NKD, normalizer_NK):
        """A and z after the outputs h [N, m, D] of the tokens that write."""
        k_NMK, v_NMD, beta_NM1 = (
            proj(h_NMD).to(association_NKD.dtype)
            for proj in (self.k_proj, self.v_proj, self.strength_proj)
        )
        k_NMK, beta_NM1 = dpfp(k_NMK, self.order), beta_NM1.sigmoid()
        with without_autocast(h_NMD):
            # A segment that finds z = 0 is the first.
            is_first_N1 = (normalizer_NK == 0).all(-1, keepdim=True)
            old_NMD = found(k_NMK, association_NKD, normalizer_NK)
            association_NKD = association_NKD + k_NMK.mT @ (beta_NM1 * (v_NMD - old_NMD))
            if self.corrects:
                known_NM = (k_NMK @ normalizer_NK[..., None])[..., 0] + EPSILON
                known_NM = known_NM / (k_NMK.square().sum(-1) + EPSILON)
                gamma_NM = torch.where(is_first_N1, 1.0, (1 - known_NM).clamp(0, 1)).detach()
                k_NMK = gamma_NM[..., None] * k_NMK
            return association_NKD, normalizer_NK + k_NMK.sum(1)

    def unwritten(self, x_BTD):
        """Zero, with a gradient of zero for what writes: processes that train wait for each."""
        return 0 * sum(
            proj(x_BTD[:, -1:]).sum() for proj in (self.k_proj, self.v_proj, self.strength_proj)
        )

    def flops(self, num_read, num_written):
        """Of so many tokens that read and so many that write."""
        product = 2 * self.num_features * (self.v_proj.out_features + 1)
        written = linear_flops(self.k_proj, self.v_proj, self.strength_proj) + 2 * product
        return num_read * (linear_flops(self.q_proj) + product) + num_written * written


def found(features_NTK, association_NKD, normalizer_NK):
    """phi A / (phi . z + 1e-5), [N, T, D]."""
    sum_NT1 = features_NTK @ normalizer_NK[..., None] + EPSILON
    return features_NTK @ association_NKD / sum_NT1


class AssociativeBlock(FrameBlock):
    """A block with such a memory around it."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.memory = AssociativeMemory(config)
        self.memory_specs = self.memory.state_specs()

    def flops_per_token(self, length):
        """As of `FrameBlock`, with the memory; the first segment reads one that is empty."""
        num_written = (length - 1) // self.mixer.sizes.length * self.mixer.sizes.num_writes
        memory = self.memory.flops(length + num_written, num_written) / length
        return super().flops_per_token(length) + memory

    def forward(self, x_BTD, sequence, state, written=None, writers=None, **inputs):
        """As of `ZooBlock`.

        Args, beside its:
            written: where the tokens that write are in the frame; None: there are none.
            writers: [N'], the documents they are of; None: all, in their order.
        """
        x_BTD = x_BTD + self.memory.read(x_BTD, sequence, state)
        if written is None and torch.is_grad_enabled():
            x_BTD = x_BTD + self.memory.unwritten(x_BTD)
        x_BTD, state = super().forward(x_BTD, sequence, state, **inputs)
        if written is not None:
            memory = [state.association_BKD, state.normalizer_BK]
            own = memory if writers is None else [x_N[writers] for x_N in memory]
            h_NMD = x_BTD[:, written].flatten(0, 1).unflatten(0, (own[0].shape[0], -1))
            for name, x_N, new_N in zip(self.memory_specs, memory, self.memory.write(h_NMD, *own)):
                new_N = new_N if writers is None else x_N.index_copy(0, writers, new_N)
                setattr(state, name, new_N)
        return x_BTD, state
