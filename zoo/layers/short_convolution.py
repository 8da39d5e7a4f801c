"""A causal convolution over the last few tokens, each channel by itself.

Mixers whose recurrence has no positions of its own look at the tokens before with it (Fu et al.
2023, https://arxiv.org/abs/2212.14052; Gu and Dao 2023, https://arxiv.org/abs/2312.00752):

    y_t = sum_j weight_j x_{t - (size - 1) + j},  j from 0 to size - 1, per channel

Nothing comes before a document's first token. The state is the last size - 1 inputs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..core.state import StateSpec
from ..core.tails import tail, tails_of_left
from ..kernels.autograd_rules import by_formula
from ..kernels.linear_recurrence import accumulator_dtype
from ..kernels.recurrence_steps import takes_plain_step
from ..kernels.windowed_attention import document_of_token


class ShortConvolution(nn.Module):
    """The convolution of the module docstring.

    Args:
        channels: D, of input and output.
        size: tokens that an output sees, its own included; at least 2.
        initializer_range: standard deviation of the weight at the start.
    """

    def __init__(self, channels, size, initializer_range):
        super().__init__()
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    def init_weights_of_paper(self):
        """As any other matrix."""
        init.normal_(self.weight, std=self.initializer_range)

    def state_spec(self):
        """The last inputs [size - 1, D] of a sequence."""
        channels, _, size = self.weight.shape
        return StateSpec((size - 1, channels))

    def inputs_of_left(self, x_BTD, ranks, name):
        """The inputs before each document of a slice, from the processes before.

        Args:
            x_BTD: the inputs of this one.
            ranks: the `Ranks` of the pass.
            name: of the state in which they are; None: nobody will read it afterwards.
        """
        own_BWD = tail(ranks, x_BTD, self.weight.shape[-1] - 1)
        return ranks.entering(tails_of_left(ranks, own_BWD), name=name)

    def forward(self, x_BTD, sequence, before_NWD, is_kept):
        """Convolves a dense batch or a packed stream.

        Args:
            x_BTD: the inputs.
            sequence: their `Sequence`.
            before_NWD: the inputs before each document, [N, size - 1, D]; None: zeros.
            is_kept: whether anybody will read the state afterwards.

        Returns:
            (outputs [B, T, D], the last inputs [N, size - 1, D]; None unless `is_kept`).
        """
        if takes_plain_step(sequence, x_BTD):
            y_BTD, last_NWD = self._step(x_BTD[:, 0], before_NWD)
            return y_BTD, last_NWD if is_kept else None
        if sequence.cu_seqlens is None:
            y_BTD, last_NWD = self._convolve(x_BTD, before_NWD)
        else:
            y_BTD, last_NWD = self._convolve_packed(x_BTD, sequence.cu_seqlens, before_NWD)
        if not is_kept:
            return y_BTD, None
        # A copy: a view would keep all tokens of the pass in memory.
        last_NWD = last_NWD.to(accumulator_dtype(last_NWD))
        return y_BTD, last_NWD.clone(memory_format=torch.contiguous_format)

    def _convolve(self, x_BTD, before_NWD):
        batch, time, channels = x_BTD.shape
        if before_NWD is None:
            before_NWD = x_BTD.new_zeros(batch, self.weight.shape[-1] - 1, channels)
        x_BLD = torch.cat([before_NWD.to(x_BTD.dtype), x_BTD], dim=1)
        return self._apply_weight(x_BLD), x_BLD[:, time:]

    def _step(self, x_BD, before_BWD):
        if before_BWD is None:
            before_BWD = x_BD.new_zeros(len(x_BD), self.weight.shape[-1] - 1, x_BD.shape[-1])
            before_BWD = before_BWD.to(accumulator_dtype(x_BD))
        # Of the state as it is kept, in float32 at least.
        window_BLD = torch.cat([before_BWD, x_BD[:, None].to(before_BWD.dtype)], dim=1)
        y_B1D = (window_BLD * self.weight[:, 0].mT).sum(1, keepdim=True)
        # A copy: what is contiguous as it is, in one row, would keep the token that is left behind.
        last_BWD = window_BLD[:, 1:].clone(memory_format=torch.contiguous_format)
        return y_B1D.to(x_BD.dtype), last_BWD

    def _convolve_packed(self, x_1TD, cu_seqlens, before_NWD):
        """Lays what came before each document into the stream, and leaves its outputs out again."""
        time, channels = x_1TD.shape[1:]
        documents, width = len(cu_seqlens) - 1, self.weight.shape[-1] - 1
        if before_NWD is None:
            before_NWD = x_1TD.new_zeros(documents, width, channels)
        place_T = torch.arange(time, device=x_1TD.device)
        place_T = place_T + width * (document_of_token(cu_seqlens, time) + 1)
        window_W = torch.arange(width, device=x_1TD.device)
        gaps_N = width * torch.arange(documents, device=x_1TD.device)
        before_L = ((cu_seqlens[:-1] + gaps_N)[:, None] + window_W).flatten()
        last_NW = (cu_seqlens[1:] + gaps_N)[:, None] + window_W

        x_LD = x_1TD.new_zeros(time + documents * width, channels)
        x_LD = x_LD.index_copy(0, place_T, x_1TD[0])
        x_LD = x_LD.index_copy(0, before_L, before_NWD.to(x_1TD.dtype).flatten(0, 1))
        return self._apply_weight(x_LD[None])[:, place_T - width], x_LD[last_NW]

    def _apply_weight(self, x_BLD):
        """The sum over a window that moves along: [B, L, D] to [B, L - size + 1, D].

        On a CPU channels stay where they lie, side by side. PyTorch's convolution wants them apart,
        and its backward there takes as long as the matrix products around it.
        """
        channels, _, size = self.weight.shape
        if x_BLD.device.type != "cpu" or torch.compiler.is_exporting():
            y_BDT = F.conv1d(x_BLD.transpose(1, 2), self.weight, groups=channels)
            return y_BDT.transpose(1, 2)
        # Under autocast a convolution has 16 bits.
        is_autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else x_BLD.dtype
        return _MovingSum.apply(x_BLD.to(dtype), self.weight[:, 0].to(dtype))


class _MovingSum(torch.autograd.Function):
    """y_t = sum_j weight_j x_{t + j}, each channel by itself; in float32 at least, rounded once."""

    @staticmethod
    def forward(ctx, x_BLD, weight_DW):
        ctx.save_for_backward(x_BLD, weight_DW)
        wide = accumulator_dtype(x_BLD)
        x_BLD, weight_WD = x_BLD.to(wide), weight_DW.to(wide).T.contiguous()
        time = x_BLD.shape[1] - len(weight_WD) + 1
        y_BTD = x_BLD[:, :time] * weight_WD[0]
        for j in range(1, len(weight_WD)):
            y_BTD.addcmul_(x_BLD[:, j : j + time], weight_WD[j])
        return y_BTD.to(weight_DW.dtype)

    @staticmethod
    @by_formula
    def backward(ctx, dy_BTD):
        x_BLD, weight_DW = ctx.saved_tensors
        dtype, wide, time = x_BLD.dtype, accumulator_dtype(x_BLD), dy_BTD.shape[1]
        x_BLD, dy_BTD = x_BLD.to(wide), dy_BTD.to(wide)
        weight_WD = weight_DW.to(wide).T.contiguous()
        dx_BLD, dweight_WD = torch.zeros_like(x_BLD), torch.empty_like(weight_WD)
        for j in range(len(weight_WD)):
            dx_BLD[:, j : j + time].addcmul_(dy_BTD, weight_WD[j])
            dweight_WD[j] = (dy_BTD * x_BLD[:, j : j + time]).sum((0, 1))
        return dx_BLD.to(dtype), dweight_WD.T.to(dtype)
