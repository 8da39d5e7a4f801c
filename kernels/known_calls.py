"""Calls that an operator has seen: what was checked and decided for them is not again.

On a GPU nothing that an operator checks or decides hangs on values: shapes, dtypes and the numbers
of a call tell all of it. The second call with the same ones is prepared, and from then on found.
"""

import torch

# The kind of device whose calls are kept; there the kernels run. What measures the host without
# one says another.
KIND = "cuda"
# Texts of ever different lengths would fill the memory: beyond this, all are forgotten.
MOST = 1024


class KnownCalls:
    """What to run for each kind of call, by whatever describes it.

    Attributes:
        prepared: callables of the call's tensors, to be looked up directly.
    """

    def __init__(self):
        self.prepared = {}
        self._seen = set()

    def meet(self, key, prepare):
        """What `prepare()` makes, from the second time on; None the first time: it may be the last.

        Args:
            key: describes the call, or None for one that is not to be kept.
            prepare: makes a callable of the call's tensors, or None where there is none.
        """
        if key is None:
            return None
        if key not in self._seen:
            if len(self._seen) >= MOST:
                self._seen.clear()
                self.prepared.clear()
            self._seen.add(key)
            return None
        call = prepare()
        if call is not None:
            self.prepared[key] = call
        return call


def can_be_known(x, number=1.0):
    """Whether such calls are kept: not while a graph is made, nor of subclasses of tensors.

    Args: a tensor of the call; a number of it, which may also be given as a tensor.
    """
    return (
        x.device.type == KIND
        and type(x) is torch.Tensor
        and type(number) in (float, int)
        and not torch.compiler.is_compiling()
    )


def form(x):
    """What a key says about a tensor."""
    return x.shape, x.dtype, x.device
