"""Sizes of the delta recurrence that its ways to run have in common."""

# Positions per chunk, a power of two. The work per token inside a chunk grows as C (K + V), that of
# the loop over chunks as K K V / C; for heads of 64 this is the fastest of 16, 32 and 64.
CHUNK_LENGTH = 32
# The widest heads of the Triton kernels: they keep a row of the state in registers.
MAX_KERNEL_DIM = 512
