"""What the host knows of the tokens of a step, so that it looks at what they see and no more."""

import torch


def is_known(clock):
    """Whether the host knows the values of clocks, and no gradient is wanted of what it does."""
    return (
        type(clock) is torch.Tensor
        and clock.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


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
    is_step = sequence.shape[1] == 1 and sequence.cu_seqlens is None and sequence.ranks is None
    if not is_step or not is_known(clock_B1):
        return None
    clocks = clock_B1[:, 0].tolist()
    if len(clocks) < sequence.shape[0]:
        clocks = clocks * sequence.shape[0]
    if sequence.keep is not None:
        clocks = [n if kept else None for n, kept in zip(clocks, sequence.keep.tolist())]
    return clocks
