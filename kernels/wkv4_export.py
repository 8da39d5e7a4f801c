"""RWKV-4's WKV in a program that torch.export writes; see `export_scan`.

The state is the average so far and the log of the sum of weights, as in `wkv4._TwoLevelScan`. Two
spans of tokens, one after the other, have an average and a log as well, so those from a chunk's
start to each of its positions come by doubling, and only chunks need a scan. Gradients are
autograd's.
"""

import torch
import torch.nn.functional as F

from .export_scan import chunk_length, from_chunks, into_chunks, scan, without_autocast
from .linear_recurrence import accumulator_dtype
from .wkv4 import LOWEST

CHUNK_LENGTH = 32
# The log of no weight: below any, and finite, as -inf - (-inf) is not a number.
NOTHING = -1e35


def wkv4_exported(w, u, k, v, *, initial_state=None, output_final_state=False, cu_seqlens=None):
    """Arguments and results as `wkv4`; there are no packed documents."""
    dtype, (batch, time, width) = accumulator_dtype(k), k.shape
    length = chunk_length(time, CHUNK_LENGTH)
    with without_autocast(k):
        w, u = w.to(dtype).clamp(min=LOWEST), u.to(dtype)
        k_NBCD, v_NBCD = (into_chunks(x.to(dtype), length) for x in (k, v))
        if initial_state is None:
            mean_BD = k_NBCD.new_zeros(batch, width)
            log_BD = k_NBCD.new_full((batch, width), NOTHING)
        else:
            num_BD, den_BD, max_BD = initial_state.to(dtype).unbind(1)
            has_BD = den_BD > 0
            den_BD = torch.where(has_BD, den_BD, 1.0)
            mean_BD = torch.where(has_BD, num_BD / den_BD, 0.0)
            log_BD = torch.where(has_BD, max_BD + den_BD.log(), NOTHING)

        mean_NBCD, log_NBCD, span = v_NBCD, k_NBCD, 1
        while span < length:
            earlier = _moved(mean_NBCD, span), _moved(log_NBCD, span, NOTHING) + span * w
            mean_NBCD, log_NBCD = _together(*earlier, mean_NBCD, log_NBCD)
            span *= 2

        def step(state, mean, log, w_D=w):
            mean_BD, log_BD = state
            after = _together(mean_BD, log_BD + length * w_D, mean, log)
            return after, (mean_BD.clone(), log_BD.clone())

        ends = mean_NBCD[:, :, -1], log_NBCD[:, :, -1]
        _, (mean_NBD, log_NBD) = scan(step, (mean_BD, log_BD), *ends)
        positions_C1 = torch.arange(length, device=k.device)[:, None]
        state = mean_NBD[:, :, None], log_NBD[:, :, None] + positions_C1 * w
        before = _moved(mean_NBCD, 1), _moved(log_NBCD, 1, NOTHING)
        mean_NBCD, log_NBCD = _together(*state, *before)
        y_NBCD = torch.lerp(mean_NBCD, v_NBCD, (u + k_NBCD - log_NBCD).sigmoid())
        y = from_chunks(y_NBCD, time).to(v.dtype)
        if not output_final_state:
            return y, None
        last = (from_chunks(x, time)[:, -1] for x in (mean_NBCD, log_NBCD + w))
        mean_BD, log_BD = _together(*last, v[:, -1].to(dtype), k[:, -1].to(dtype))
    return y, torch.stack([mean_BD, torch.ones_like(mean_BD), log_BD], dim=1)


def _together(mean_1, log_1, mean_2, log_2):
    """(Average, log of the sum of weights) of two spans."""
    return torch.lerp(mean_1, mean_2, (log_2 - log_1).sigmoid()), torch.logaddexp(log_1, log_2)


def _moved(x_NBCD, steps, fill=0.0):
    """Each position gets what lies so many before it, the first ones `fill`."""
    return F.pad(x_NBCD[:, :, : x_NBCD.shape[2] - steps], (0, 0, steps, 0), value=fill)
