"""Products of matrices in float32 on a CPU by oneDNN, where MKL takes slower code.

PyTorch asks MKL for them. MKL goes by the maker of a processor: on one of AMD's with AVX-512 it
does with half of the vectors' width, where oneDNN, which PyTorch has as well, asks what a processor
can do: half the time for many rows (kernels/bench/LOG.md). Results differ by rounding. PyTorch has
no public name for oneDNN's product, and this one has no gradient.
`torch.backends.mkldnn.enabled = False` turns it off.
"""

import functools
import platform
from pathlib import Path

import torch


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
        weight: W, [N, K], contiguous, or the transpose of such.
        bias: b, [N], or None.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_what_we_know():
    """Whether the operator is there, and is a linear layer's product."""
    with torch.device("cpu"), torch.no_grad():
        x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
        transposed = torch.arange(12.0).view(3, 4)
        try:
            return torch.equal(product(x, weight, bias), torch.full((2, 4), 4.0)) and torch.equal(
                product(x, transposed.T, None), x @ transposed
            )
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
