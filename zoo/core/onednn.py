"""Products with weights in float32 by oneDNN, on processors for which MKL takes slower code.

PyTorch asks MKL for them. MKL goes by the maker of a processor: on one of AMD's with AVX-512 it
does with half of the vectors' width, where oneDNN, which PyTorch has as well, asks what a processor
can do. Of 1,024 rows a product takes half the time there; of one row, which is reading the weight,
two thirds to three quarters (kernels/bench/LOG.md).

Results differ by rounding. Only passes without gradients are run so: PyTorch has no public name
for oneDNN's product, and this one has no gradient. Training takes bfloat16 on such a processor,
whose products are oneDNN's anyway. `torch.backends.mkldnn.enabled = False` turns it off.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.autograd_rules import by_autograd_alone

# A call of oneDNN takes 8 microseconds longer to begin than one of MKL.
LEAST_NUMBERS = 1 << 17
# Every other operation of a pass takes the host 0.8 microseconds more; so many rows pay for that.
MANY_ROWS = 64


@functools.cache
def is_faster_here():
    """Whether MKL is the slower one on this processor, and PyTorch has oneDNN's product."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
        and _is_what_we_know()
    )


def _processor():
    """What the system says of the processor, its maker among it."""
    try:
        return Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:
        return platform.processor()


def product(x, weight, bias):
    """x W^T + b by oneDNN.

    Args:
        x: [..., K] float32 on a CPU.
        weight: W, [N, K], contiguous.
        bias: b, [N], or None.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_what_we_know():
    """Whether the operator is there, and is a linear layer's product."""
    with torch.device("cpu"), torch.no_grad():
        x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
        try:
            return torch.equal(product(x, weight, bias), torch.full((2, 4), 4.0))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False


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
        and weight.is_contiguous()
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and (bias is None or bias.dtype == torch.float32)
    )


_MODE = _OneDNN()
