"""The public calls that resources.py checks, on tensors without memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from zoo.kernels import (
    delta_recurrence_triton,
    dilated_attention_triton,
    linear_recurrence_channels_triton,
    linear_recurrence_triton,
    token_mix_triton,
    wkv4_triton,
)
from zoo.kernels.segments_triton import override


class Case(NamedTuple):
    """A public call to check.

    Attributes:
        run: performs it, forward and backward, on tensors of the "meta" device.
        token_heads: B T H, what bytes are divided by.
        is_wide: whether heads are multiples of 64 and inputs bfloat16: loads are checked.
        max_bytes: the most bytes of memory traffic per token and head; None: only reported.
        must_fit: whether each kernel needs a configuration that fits. Wide heads in float32 have
            none on NVIDIA: a product of float32 is three of tf32, with both parts in registers.
    """

    run: Callable[[], None]
    token_heads: int
    is_wide: bool
    max_bytes: int | None = None
    must_fit: bool = True


def empty(*shape, dtype=torch.bfloat16):
    """A tensor that has no memory, only a shape."""
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(
    form,
    batch,
    time,
    heads,
    key_dim,
    value_dim=None,
    bonus=False,
    dtype=torch.bfloat16,
    chosen=None,
    **limits,
):
    """`linear_recurrence` with a decay of one form: "none", "H", "BTH" or "BTHK".

    The gradients asked for are those of training: of q, k, v, bonus and all decays but [H].
    chosen: what `override` of segments_triton.py takes.
    """
    value_dim = value_dim or key_dim
    operator = linear_recurrence_triton if form != "BTHK" else linear_recurrence_channels_triton

    def run():
        q, k, do = (
            empty(batch, time, heads, d, dtype=dtype) for d in (key_dim, key_dim, value_dim)
        )
        v = torch.empty_like(do)
        decay = gates(form, q)
        u = empty(heads, key_dim, dtype=torch.float32) if bonus else None
        inputs = q, k, v, decay, u, None, None
        with override(**(chosen or {})):
            _, _, entering = operator.forward(*inputs, 1.0, False)
            operator.backward(*inputs, entering, do, None, 1.0, form in ("BTH", "BTHK"), False)

    is_wide = dtype == torch.bfloat16 and key_dim % 64 == value_dim % 64 == 0
    return Case(run, batch * time * heads, is_wide, **limits)


def gates(form, q):
    """Log decays of a form for queries [B, T, H, K], in float32."""
    if form == "none":
        return None
    shape = q.shape[2:3] if form == "H" else q.shape[: len(form)]
    return empty(*shape, dtype=torch.float32)


def delta(batch, time, heads, key_dim, value_dim=None, form="BTHK", dtype=torch.bfloat16):
    """`delta_recurrence` as RWKV-7 trains it, or with a decay of another form."""
    value_dim = value_dim or key_dim

    def run():
        q, k, a, b = (empty(batch, time, heads, key_dim, dtype=dtype) for _ in range(4))
        v, do = (empty(batch, time, heads, value_dim, dtype=dtype) for _ in range(2))
        decay = gates(form, q)
        inputs = q, k, v, decay, a, b, None, None
        delta_recurrence_triton.forward(*inputs, 1.0, False)
        delta_recurrence_triton.backward(*inputs, do, None, 1.0, decay is not None, False)

    is_wide = dtype == torch.bfloat16 and key_dim % 64 == value_dim % 64 == 0
    return Case(run, batch * time * heads, is_wide)


def rwkv4(batch, time, width):
    """`wkv4`; bytes are per token and channel."""

    def run():
        k, v, dy = (empty(batch, time, width) for _ in range(3))
        w, u = (empty(width, dtype=torch.float32) for _ in range(2))
        inputs = w, u, k, v, None, None
        _, final, entering = wkv4_triton.forward(*inputs)
        wkv4_triton.backward(*inputs, final, entering, dy, None)

    return Case(run, batch * time * width, False)


def dilated(batch, time, heads, width, decay=False, packed=False, dtype=torch.bfloat16, **limits):
    """`dilated_attention` with LongNet's five branches, of the first two where documents go on."""
    lengths, rates = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]
    lengths, rates = (x[: 2 if packed else 5] for x in (lengths, rates))

    def run():
        q, k, v, do = (empty(batch, time, heads, width, dtype=dtype) for _ in range(4))
        log_decay = empty(width, dtype=torch.float32) if decay else None
        held = [None] * 4
        if packed:
            slots = sum(-(-w // r) for w, r in zip(lengths, rates))
            held[:2] = (empty(8, heads, slots, width, dtype=dtype) for _ in range(2))
            held[2] = empty(8, dtype=torch.int64)
        bounds = empty(9, dtype=torch.int64) if packed else None
        inputs = q, k, v, *held, log_decay, bounds
        numbers = lengths, rates, width**-0.5, False, not packed
        results = dilated_attention_triton.forward(*inputs, *numbers)
        dilated_attention_triton.backward(*inputs, *results, do, *numbers)

    is_wide = width % 64 == 0 and dtype == torch.bfloat16
    return Case(run, batch * time * heads, is_wide, **limits)


def token_mix(batch, time, width, streams, corrections=False, packed=False, **how):
    """`token_mix` as RWKV trains it; bytes are per token and channel."""

    def run():
        x, *others = (empty(batch, time, width) for _ in range(1 + 2 * streams))
        c = others[:streams] if corrections else []
        cu_seqlens = empty(9, dtype=torch.int64) if packed else None
        inputs = x, empty(streams, width), empty(8, width) if packed else None, cu_seqlens, *c
        of_current = how.get("of_current", False)
        token_mix_triton.forward(*inputs, of_current)
        token_mix_triton.backward(*inputs, *others[streams:], of_current)

    return Case(run, batch * time * width, False, how.get("max_bytes"))


def steps(batch, heads, width):
    """One token of each operator, for decoding."""

    def run():
        q, k, v, a, b = (empty(batch, 1, heads, width) for _ in range(5))
        state = empty(batch, heads, width, width, dtype=torch.float32)
        u = empty(heads, width, dtype=torch.float32)
        keyword = {"state": state, "in_place": True}
        linear_recurrence_triton.linear_recurrence_step(q, k, v, gates("H", q), **keyword)
        linear_recurrence_triton.linear_recurrence_step(
            q, k, v, gates("BTHK", q), bonus=u, **keyword
        )
        delta_recurrence_triton.delta_recurrence_step(q, k, v, gates("BTHK", q), a, b, **keyword)
        wkv4_triton.wkv4_step(
            u[0], u[0], q[:, :, 0], v[:, :, 0], state=state[:, 0, :3].contiguous(), in_place=True
        )

    return Case(run, batch * heads, False)


CASES: dict[str, Case] = {
    "retention 64": linear("H", 8, 8192, 16, 64),
    "retention 128": linear("H", 8, 8192, 16, 128, max_bytes=4100),
    "retention 128, segments": linear("H", 1, 65536, 16, 128, max_bytes=5300),
    "retention 64, few heads": linear("H", 8, 1024, 8, 64),
    "retention 128, few heads": linear("H", 2, 1024, 8, 128),
    "retention 128, slices of 32": linear("H", 1, 1024, 33, 128),
    "retention 64, 128, few heads": linear("H", 2, 1024, 8, 64, 128),
    "linear attention 128, few heads": linear("none", 2, 1024, 8, 128),
    "retention 256": linear("H", 8, 2048, 32, 256),
    "retention 256, 512": linear("H", 8, 2048, 8, 256, 512),
    "retention 256, two passes": linear("H", 8, 2048, 32, 256, chosen={"blocks": True}),
    "retention 256, 512, two passes": linear("H", 8, 2048, 8, 256, 512, chosen={"blocks": True}),
    "retention 256, one block": linear("H", 64, 256, 8, 256, chosen={"blocks": True}),
    "scalar gates 256, two passes": linear("BTH", 8, 2048, 16, 256, chosen={"blocks": True}),
    "linear attention 128": linear("none", 8, 8192, 16, 128),
    "scalar gates 64": linear("BTH", 8, 8192, 32, 64),
    "scalar gates 128": linear("BTH", 8, 8192, 16, 128),
    "scalar gates 60": linear("BTH", 8, 8192, 32, 60),
    "scalar gates 64, float16": linear("BTH", 8, 8192, 32, 64, dtype=torch.float16),
    "scalar gates 256": linear("BTH", 8, 2048, 16, 256),
    "retention with bonus 64": linear("H", 8, 4096, 32, 64, bonus=True),
    "retention 64, float32": linear("H", 8, 8192, 32, 64, dtype=torch.float32),
    "retention 128, float32": linear("H", 8, 8192, 16, 128, dtype=torch.float32, must_fit=False),
    "RWKV-6 64": linear("BTHK", 8, 4096, 32, 64, bonus=True),
    "GLA 128": linear("BTHK", 8, 4096, 16, 128),
    "GLA 128, segments": linear("BTHK", 1, 65536, 4, 128),
    "RWKV-7 64": delta(8, 4096, 32, 64),
    "delta 128": delta(8, 4096, 16, 128),
    "delta 256": delta(4, 2048, 8, 256),
    "delta 200, 60, float32": delta(4, 2048, 8, 200, 60, "BTH", torch.float32),
    "delta 512": delta(4, 2048, 8, 512),
    "delta 512, no decay": delta(4, 2048, 8, 512, form="none"),
    "delta 512, float32": delta(4, 2048, 8, 512, dtype=torch.float32),
    "wkv4": rwkv4(8, 4096, 2048),
    "LongNet 64, xPos": dilated(4, 32768, 12, 64, decay=True),
    "LongNet 64, packed, from a state": dilated(1, 65536, 12, 64, packed=True),
    "LongNet 48": dilated(4, 32768, 16, 48),
    "LongNet 128, xPos": dilated(4, 32768, 12, 128, decay=True),
    "LongNet 256, xPos": dilated(2, 32768, 4, 256, decay=True),
    "LongNet 64, xPos, float32": dilated(
        4, 32768, 12, 64, decay=True, dtype=torch.float32, must_fit=False
    ),
    "RWKV-7 token mix": token_mix(8, 4096, 2048, 6, max_bytes=31),
    "RWKV-6 token mix": token_mix(8, 4096, 2048, 5, corrections=True, max_bytes=57),
    "RWKV-5 token mix, packed": token_mix(1, 32768, 2048, 4, packed=True, of_current=True),
    "steps": steps(64, 16, 128),
    "steps 512": steps(64, 8, 512),
}
