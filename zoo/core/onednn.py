"""Products with weights in float32 by oneDNN, on processors for which MKL takes slower code.

The product is in kernels/host_products.py: of 1,024 rows it takes half the time of MKL's; of one
row, which is reading the weight, two thirds to three quarters (kernels/bench/LOG.md).

Results differ by rounding. Only passes without gradients are run so, as the product has none:
training takes bfloat16 on such a processor, whose products are oneDNN's anyway.
`torch.backends.mkldnn.enabled = False` turns it off.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.autograd_rules import by_autograd_alone
from ..kernels.host_products import is_faster_here, product

# A call of oneDNN takes 8 microseconds longer to begin than one of MKL.
LEAST_NUMBERS = 1 << 17
# Every other operation of a pass takes the host 0.8 microseconds more; so many rows pay for that.
MANY_ROWS = 64
# Of fewer rows MKL reads the transpose of a weight faster.
FEW_ROWS = 8


def run_by_onednn(run, x, width):
    """run(), in which `F.linear` is oneDNN's product where that is faster and may be.

    Args:
        run: a pass, or a part of one.
        x: what it begins with, [B, T, D].
        width: the smaller side of most weights.
    """
    if not _may_be_faster(x, width):
        return run()
    with _MODE:
        return run()


def _may_be_faster(x, width):
    # Sizes last: a program that is compiled would be one for so many rows.
    return (
        not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and by_autograd_alone()
        and (width * width >= LEAST_NUMBERS or x.shape[0] * x.shape[1] >= MANY_ROWS)
        and is_faster_here()
        and torch.backends.mkldnn.enabled
    )


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and not types and _is_served(*args):
            return product(*args) if len(args) == 3 else product(*args, None)
        return function(*args, **(kwargs or {}))


def _is_served(x, weight, bias=None):
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.numel() * rows >= LEAST_NUMBERS
        and weight.ndim == 2
        and (weight.is_contiguous() or (rows >= FEW_ROWS and weight.T.is_contiguous()))
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and (bias is None or bias.dtype == torch.float32)
    )


_MODE = _OneDNN()
