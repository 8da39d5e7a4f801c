"""What the host knows of the tokens of a step, so that it looks at what they see and no more."""

import torch


def host_clocks(sequence):
    """Each row's token's number in its document, None for a row that has none here; or None.

    Of a step of one token per row on a CPU. Elsewhere, and where a program is compiled, clocks are
    tensors alone; and where there are gradients, operators are those that have them.

    Args:
        sequence: the `Sequence`.

    Returns:
        A list of B numbers, or None.
    """
    clock_B1 = sequence.clock
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or sequence.shape[1] > 1
        or sequence.cu_seqlens is not None
        or sequence.ranks is not None
        or type(clock_B1) is not torch.Tensor
        or clock_B1.device.type != "cpu"
    ):
        return None
    clocks = clock_B1[:, 0].tolist()
    if len(clocks) < sequence.shape[0]:
        clocks = clocks * sequence.shape[0]
    if sequence.keep is not None:
        clocks = [n if kept else None for n, kept in zip(clocks, sequence.keep.tolist())]
    return clocks
