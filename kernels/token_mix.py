"""Each token mixed with the one before it, in as many ways as there are streams (RWKV-4 to 7).

    y_n,t = x_t + w_n,t (x_t-1 - x_t),    w_n,t = mu_n,  mu_n + c_n,t  or, of the current, 1 - mu_n

One operation of PyTorch after the other, this is 18% (RWKV-7) to 30% (RWKV-4 and 6) of the bytes
that a layer moves in training (kernels/bench/layer_bytes.py). On a GPU it is one kernel for each
direction, which reads the text once for all streams. A program that is compiled or exported
keeps PyTorch's operations: its compiler puts them together by itself.
"""

import functools

import torch

from .known_calls import KnownCalls, can_be_known, form
from .linear_recurrence import check_boundaries, choose_backend

MOST_STREAMS = 6


def token_mix(
    x,
    mu,
    *,
    before=None,
    corrections=(),
    cu_seqlens=None,
    of_current=False,
    backend="auto",
):
    """As above.

    Args:
        x: [B, T, D].
        mu: [N, D], N at most 6: how much each channel of a stream takes of the token before.
        before: what came before each document's first token, [R, D]; None: zeros. R is B, or the
            number of documents with `cu_seqlens`.
        corrections: c, nothing or N tensors [B, T, D].
        cu_seqlens: document boundaries in a packed stream, [R + 1]; B must be 1. Each document has
            a token. None: one document per row.
        of_current: mu is how much it takes of the current one; then without corrections.
        backend: "triton", "torch", or "auto": "triton" for tensors on a GPU where it is installed
            and they are not float64, else "torch".

    Returns:
        N tensors [B, T, D] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, no tokens, an unknown backend.
    """
    corrections = tuple(corrections)
    key, tensors = None, (x, mu, before, cu_seqlens, *corrections)
    if can_be_known(x):
        key = (
            (backend, of_current, torch.is_grad_enabled(), len(corrections), x.device),
            (x.shape, x.dtype, mu.shape, mu.dtype, *(c.dtype for c in corrections)),
            None if before is None else form(before),
            None if cu_seqlens is None else form(cu_seqlens),
        )
        call = _known.prepared.get(key)
        if call is not None:
            return call(*tensors)
    is_fused = takes_kernel(x, backend)
    check_arguments(x, mu, before, corrections, cu_seqlens, of_current)
    if not is_fused:
        before_BTD = tokens_before(x, before, cu_seqlens)
        return mixed(x, before_BTD, mu, corrections, of_current)
    from .token_mix_triton import prepare, token_mix_triton

    if key is not None:
        call = _known.meet(key, functools.partial(prepare, len(mu), of_current))
        if call is not None:
            return call(*tensors)
    return token_mix_triton(*tensors, of_current=of_current)


_known = KnownCalls()


def takes_kernel(x, backend="auto"):
    """Whether a call is a kernel, rather than operations of PyTorch."""
    return choose_backend("token_mix", backend, x) == "triton" and not torch.compiler.is_compiling()


def check_arguments(x, mu, before, corrections, cu_seqlens, of_current):
    """Raises a ValueError that says what was expected and what came. See `token_mix`."""

    def require(condition, message):
        if not condition:
            raise ValueError(f"token_mix: {message}")

    require(x.ndim == 3, f"x is [B, T, D], got shape {list(x.shape)}.")
    batch, time, width = x.shape
    require(time > 0, f"there are no tokens (T = 0, x is {list(x.shape)}); pass at least one.")
    require(
        mu.ndim == 2 and mu.shape[1] == width and 1 <= len(mu) <= MOST_STREAMS,
        f"mu is [N, D] = [1 to {MOST_STREAMS}, {width}], got {list(mu.shape)}.",
    )
    shapes = [list(c.shape) for c in corrections]
    require(
        shapes in ([], len(mu) * [list(x.shape)]),
        f"corrections are {len(mu)} tensors {list(x.shape)} or none, got {shapes}.",
    )
    require(
        not (corrections and of_current),
        "corrections are of the token before, got of_current too; leave one out.",
    )
    documents = check_boundaries("token_mix", cu_seqlens, batch, time)
    require(
        before is None or list(before.shape) == [documents, width],
        f"before is [R, D] = {[documents, width]}, got {None if before is None else before.shape}.",
    )


def tokens_before(x_BTD, before_RD, cu_seqlens):
    """The token before each token of its document, [B, T, D].

    Args: as of `token_mix`.
    """
    if torch.compiler.is_exporting():
        # T - 1 may be 1, which a program that runs at any length must not know.
        before_BD = torch.zeros_like(x_BTD[:, 0]) if before_RD is None else before_RD
        before_BTD = torch.cat([before_BD[:, None].to(x_BTD.dtype), x_BTD], dim=1)
        return before_BTD[:, : x_BTD.shape[1]]
    if cu_seqlens is None:
        # Split, not sliced twice: the gradients of both parts come back in one piece.
        all_but_last_BTD, last_B1D = x_BTD.split([x_BTD.shape[1] - 1, 1], dim=1)
        before_B1D = torch.zeros_like(last_B1D) if before_RD is None else before_RD[:, None]
        return torch.cat([before_B1D.to(x_BTD.dtype), all_but_last_BTD], dim=1)
    starts_R = cu_seqlens[:-1]
    if before_RD is None:
        before_RD = x_BTD.new_zeros(len(starts_R), x_BTD.shape[-1])
    before_BTD = torch.cat([x_BTD[:, :1], x_BTD[:, :-1]], dim=1)
    return before_BTD.index_copy(1, starts_R, before_RD.to(x_BTD.dtype)[None])


def mixed(x_BTD, before_BTD, mu_ND, corrections=(), of_current=False):
    """The streams, where both tokens are at hand; x and the one before also without an axis."""
    if corrections:
        pairs = zip(mu_ND, corrections, strict=True)
        change_BTD = before_BTD - x_BTD
        return tuple(torch.addcmul(x_BTD, change_BTD, mu_D + c_BTD) for mu_D, c_BTD in pairs)
    pair = (before_BTD, x_BTD) if of_current else (x_BTD, before_BTD)
    return tuple(torch.lerp(*pair, mu_D) for mu_D in mu_ND)
