"""Log decays of the tokens of a chunk, one per head or one per head and token.

Log decays below -30, a factor of 1e-13, count as -30: sums of them would lose the others' digits.
"""

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .launch_triton import log2_of_decay

# Log decays are at least this: see above.
LOWEST = tl.constexpr(-30.0)


@triton.jit
def chunk_decays(
    decay, token, inside, count, h, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr
):
    """Base-2 logs of one chunk: (up to each token [C], each token's own [C], of the whole chunk).

    Rows past the end of the segment decay by nothing.

    Args:
        decay: [H] (DECAY 1) or [tokens, H] (2) natural logs.
        token, inside: [C] the tokens, and whether they are of the segment.
        count: how many are.
        h: the head.
    """
    r = tl.arange(0, C)
    if DECAY == 1:
        own = log2_of_decay(tl.load(decay + h), LOWEST)
        cum = own * tl.minimum(r + 1, count).to(tl.float32)
        total = own * count.to(tl.float32)
        own = tl.where(inside, own, 0.0)
    else:
        own = tl.load(decay + token * H + h, mask=inside, other=0.0)
        own = log2_of_decay(own, LOWEST)
        cum = tl.cumsum(own, 0)
        total = tl.sum(own, 0)
    return cum, own, total
