"""Cross entropy of a projection onto the vocabulary, some tokens at a time, on a CPU.

With p = softmax(h W^T) for a token's hidden state h, target y and Z, the sum of exp(h W^T),

    loss = log Z - (h W^T)_y + z_loss log^2 Z
    d loss / d(h W^T) = (1 + 2 z_loss log Z) p - onehot(y)

so the gradient is at hand where the logits are: it is taken there, into those of h and W, and no
logits are kept for backward nor computed a second time.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.autograd_rules import by_formula


def is_plain_linear(head):
    """Whether a head is a linear layer with its whole weight at hand.

    What goes around the module goes around adapters, hooks and sharding.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and "forward" not in vars(head)  # accelerate's hooks, which bring an offloaded weight
    )


def can_take_gradient_at_once(head, hidden_TD):
    """Whether `chunked_cross_entropy` can run: on a CPU, in a training step that is not compiled.

    Not in float16, whose range is too small for a gradient that no scaler has seen.
    """
    dtype = _product_dtype(hidden_TD)
    return (
        hidden_TD.device.type == "cpu"
        and is_plain_linear(head)
        and head.bias is None
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
        and not head._backward_pre_hooks
        and torch.is_grad_enabled()
        and (hidden_TD.requires_grad or head.weight.requires_grad)
        and dtype != torch.float16
        and (torch.is_autocast_enabled("cpu") or hidden_TD.dtype == head.weight.dtype)
        and not torch.compiler.is_compiling()
    )


def chunked_cross_entropy(head, hidden_TD, target_T, ignored, size, scale, z_loss=0.0):
    """The loss above, summed over scored tokens.

    Args:
        head: the projection, as of `can_take_gradient_at_once`.
        hidden_TD: what it takes.
        target_T: token ids; `ignored` is not scored.
        size: tokens at a time.
        scale: factor on the sum, a number or a scalar tensor without a gradient.
        z_loss: as above.

    Returns:
        (loss, what of it is z-loss, which has no gradient), scalars in float32.
    """
    return _ChunkedLoss.apply(hidden_TD, head.weight, target_T, ignored, size, scale, z_loss)


def _product_dtype(x):
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_T, ignored, size, scale, z_loss):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = _product_dtype(hidden_TD)
        nats = hidden_TD.new_zeros((), dtype=torch.float32)
        squares, dhidden, dweight_VD = nats.clone(), [], None
        # Weights are converted once, not by autocast: it would keep what it made without gradients.
        with torch.autocast("cpu", enabled=False):
            weight = weight_VD.to(dtype)
            for hidden, target in zip(hidden_TD.split(size), target_T.split(size), strict=True):
                hidden, is_scored = hidden.to(dtype), target != ignored
                index = torch.where(is_scored, target, 0)[:, None]
                logits = F.linear(hidden, weight).float()
                log_p = logits.log_softmax(-1)
                own, log_p_own = logits.gather(-1, index)[:, 0], log_p.gather(-1, index)[:, 0]
                log_z = torch.where(is_scored, own - log_p_own, 0)
                nats -= torch.where(is_scored, log_p_own, 0).sum()
                squares += log_z.square().sum()
                del logits
                factor = torch.where(is_scored, scale, 0.0).to(log_p.dtype)[:, None]
                dlogits = log_p.exp_().mul_(factor * (1 + 2 * z_loss * log_z[:, None]))
                dlogits = dlogits.scatter_add_(-1, index, -factor).to(dtype)
                if needs_hidden:
                    dhidden.append((dlogits @ weight).to(hidden_TD.dtype))
                if needs_weight:
                    dweight = (dlogits.mT @ hidden).to(weight_VD.dtype)
                    dweight_VD = dweight if dweight_VD is None else dweight_VD.add_(dweight)
        ctx.save_for_backward(torch.cat(dhidden) if needs_hidden else None, dweight_VD)
        z_part = squares * z_loss * scale
        ctx.mark_non_differentiable(z_part)
        return nats * scale + z_part, z_part

    @staticmethod
    @by_formula
    def backward(ctx, dloss, _):
        # What is saved stays as it is, for a second pass backward.
        dhidden_TD, dweight_VD = (
            None if x is None else x * dloss.to(x.dtype) for x in ctx.saved_tensors
        )
        return dhidden_TD, dweight_VD, None, None, None, None, None
