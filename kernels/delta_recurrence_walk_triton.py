"""Triton kernels of the delta recurrence for wide heads: token by token, without matrix products.

The chunk kernels of delta_recurrence_triton.py hold K x K matrices, which beyond K = 128 fit
nowhere. Here nothing is larger than a slice of the state. With u_t = S_{t-1}^T a_t known, and
against the direction of time du_t = dS_t^T b_t, with dS_t the gradient of the state after token t,

    S_t      = d_t S_{t-1} + b_t u_t^T + k_t v_t^T
    dS_{t-1} = d_t dS_t + a_t du_t^T + scale q_{t-1} do_{t-1}^T

act on every entry of the state alone. So a slice of V walks where sums go over K, and a slice of K
where they go over V, and no program adds to another's result:

    `_walk_outputs`  slices of V, forward    u, o, the final state
    `_walk_back`     slices of V, backward   du, dv = dS_t^T k_t, the initial state's gradient
    `_walk_readers`  slices of K, forward    dq = scale S_t do_t, da = S_{t-1} du_t
    `_walk_writers`  slices of K, backward   dk = dS_t v_t, db = dS_t u_t and, for the log decay,
                                             the sum over V of dS_t * d_t S_{t-1}

The last one needs the states in the reverse of the order they are made in: the readers leave one of
every `CHECKPOINT` tokens in memory, and from there each program makes those between again, into
memory of its own. Memory is linear in the number of tokens, K V / `CHECKPOINT` floats for each.

Inputs in any dtype are read as float32, and every state and sum is in float32. A decay is exp of a
log decay: any is right, -inf included.
"""

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

from .delta_recurrence_sizes import MAX_KERNEL_DIM
from .launch_triton import launch, num_processors, padded, rounded
from .operator_triton import nothing
from .segments_triton import overridden, segment_bounds

# Tokens between two states that are kept. Fewer: more memory per token; more: more per program.
CHECKPOINT = 64
# Entries of the state in a slice of K and in one of V, chosen by compiling: 32 and 16 registers of
# each of 128 threads. And the most rows of either.
K_SLICE, V_SLICE, MAX_ROWS = 4096, 2048, 32
NUM_WARPS, NUM_STAGES = 4, 2


@triton.jit
def load_row(x, row, r, SIZE: tl.constexpr):
    """Channels r of one row of x [rows, SIZE], in float32; 0 outside."""
    return tl.load(x + row * SIZE + r, mask=r < SIZE, other=0.0).to(tl.float32)


@triton.jit
def load_decay(log_decay, row, h, r, K: tl.constexpr, DECAY: tl.constexpr):
    """Decays of one token and head for channels r, NaN where the log decay is positive.

    row: that of the token and head. DECAY: axes of log_decay; 1: [H], 2: [rows], 3: [rows, K].
    """
    if DECAY == 1:
        gates = tl.load(log_decay + h + 0 * r, mask=r < K, other=0.0).to(tl.float32)
    elif DECAY == 2:
        gates = tl.load(log_decay + row + 0 * r, mask=r < K, other=0.0).to(tl.float32)
    else:
        gates = load_row(log_decay, row, r, K)
    return tl.where(gates <= 0, tl.exp(tl.minimum(gates, 0.0)), float("nan"))


@triton.jit
def _walk_outputs(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    cu_seqlens,
    initial,
    o,
    u,
    final,
    scale,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One document and head, a slice of V. o, u [tokens, H, V] and final: None to leave out."""
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    n = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    h = tl.program_id(1)
    rk, rv = tl.arange(0, BK), (tl.program_id(0) % NUM_SLICES) * BV + tl.arange(0, BV)
    # Transposed, [V, K]: the axis of the sums lies across the threads.
    at_state = (n * H + h) * K * V + rk[None, :] * V + rv[:, None]
    mask = (rk < K)[None, :] & (rv < V)[:, None]
    state = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        state += tl.load(initial + at_state, mask=mask, other=0.0)
    start, end = segment_bounds(cu_seqlens, 1, n, T, T, 1)
    for step in tl.range(0, (end - start).to(tl.int32), num_stages=STAGES):
        row = (start + step) * H + h
        held = tl.sum(state * load_row(a, row, rk, K)[None, :], 1)
        if u is not None:
            tl.store(u + row * V + rv, held, mask=rv < V)
        if DECAY != 0:
            state *= load_decay(log_decay, row, h, rk, K, DECAY)[None, :]
        state += held[:, None] * load_row(b, row, rk, K)[None, :]
        state += load_row(v, row, rv, V)[:, None] * load_row(k, row, rk, K)[None, :]
        if o is not None:
            output = tl.sum(state * load_row(q, row, rk, K)[None, :], 1) * scale
            tl.store(o + row * V + rv, rounded(output, o.dtype.element_ty), mask=rv < V)
    if final is not None:
        tl.store(final + at_state, state, mask=mask)


@triton.jit
def _walk_back(
    q,
    k,
    log_decay,
    a,
    b,
    cu_seqlens,
    do,
    dfinal,
    dv,
    du,
    dinitial,
    scale,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One document and head, a slice of V. dfinal, dinitial [documents, H, K, V] or None."""
    NUM_SLICES: tl.constexpr = (V + BV - 1) // BV
    n = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    h = tl.program_id(1)
    rk, rv = tl.arange(0, BK), (tl.program_id(0) % NUM_SLICES) * BV + tl.arange(0, BV)
    at_state = (n * H + h) * K * V + rk[None, :] * V + rv[:, None]
    mask = (rk < K)[None, :] & (rv < V)[:, None]
    dstate = tl.zeros([BV, BK], tl.float32)
    if dfinal is not None:
        dstate += tl.load(dfinal + at_state, mask=mask, other=0.0)
    start, end = segment_bounds(cu_seqlens, 1, n, T, T, 1)
    for step in tl.range(0, (end - start).to(tl.int32), num_stages=STAGES):
        row = (end - 1 - step) * H + h
        back = load_row(do, row, rv, V) * scale
        dstate += back[:, None] * load_row(q, row, rk, K)[None, :]
        to_v = tl.sum(dstate * load_row(k, row, rk, K)[None, :], 1)
        tl.store(dv + row * V + rv, rounded(to_v, dv.dtype.element_ty), mask=rv < V)
        to_u = tl.sum(dstate * load_row(b, row, rk, K)[None, :], 1)
        tl.store(du + row * V + rv, to_u, mask=rv < V)
        if DECAY != 0:
            dstate *= load_decay(log_decay, row, h, rk, K, DECAY)[None, :]
        dstate += to_u[:, None] * load_row(a, row, rk, K)[None, :]
    if dinitial is not None:
        tl.store(dinitial + at_state, dstate, mask=mask)


@triton.jit
def _walk_readers(
    k,
    v,
    log_decay,
    b,
    cu_seqlens,
    initial,
    u,
    do,
    du,
    dq,
    da,
    checkpoints,
    scale,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One document and head, a slice of K.

    checkpoints: receives the state that enters token j L of a document, j > 0, in the place
    (that token's index in the stream) // L - 1 of [places, H, K, V]; None to leave out.
    """
    NUM_SLICES: tl.constexpr = (K + BK - 1) // BK
    n = (tl.program_id(0) // NUM_SLICES).to(tl.int64)
    h = tl.program_id(1)
    rk, rv = (tl.program_id(0) % NUM_SLICES) * BK + tl.arange(0, BK), tl.arange(0, BV)
    at_kv = rk[:, None] * V + rv[None, :]
    mask = (rk < K)[:, None] & (rv < V)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        state += tl.load(initial + (n * H + h) * K * V + at_kv, mask=mask, other=0.0)
    start, end = segment_bounds(cu_seqlens, 1, n, T, T, 1)
    for step in tl.range(0, (end - start).to(tl.int32), num_stages=STAGES):
        row = (start + step) * H + h
        if checkpoints is not None:
            place = ((start + step) // L - 1) * H + h
            is_kept = (step > 0) & (step % L == 0)
            tl.store(checkpoints + place * K * V + at_kv, state, mask=mask & is_kept)
        to_a = tl.sum(state * load_row(du, row, rv, V)[None, :], 1)
        tl.store(da + row * K + rk, rounded(to_a, da.dtype.element_ty), mask=rk < K)
        if DECAY != 0:
            state *= load_decay(log_decay, row, h, rk, K, DECAY)[:, None]
        state += load_row(b, row, rk, K)[:, None] * load_row(u, row, rv, V)[None, :]
        state += load_row(k, row, rk, K)[:, None] * load_row(v, row, rv, V)[None, :]
        to_q = tl.sum(state * load_row(do, row, rv, V)[None, :], 1) * scale
        tl.store(dq + row * K + rk, rounded(to_q, dq.dtype.element_ty), mask=rk < K)


@triton.jit
def _walk_writers(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    cu_seqlens,
    initial,
    u,
    do,
    du,
    dfinal,
    dk,
    db,
    dlog_decay,
    checkpoints,
    between,
    scale,
    T,
    num_tokens,
    num_tasks,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Documents and heads in turn, so that `between` need not grow with them; a slice of K.

    dlog_decay: [tokens, H, K], or [slices, tokens, H] sums of a slice's channels; None to leave
        out, and with it `checkpoints`, of `_walk_readers`, and
    between: the states inside a stretch of L tokens [programs, L, BK, V].
    """
    NUM_SLICES: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    for round in range(tl.cdiv(num_tasks - program, num_programs)):
        task = program + round * num_programs
        slice = task % NUM_SLICES
        h = (task // NUM_SLICES) % H
        n = (task // (NUM_SLICES * H)).to(tl.int64)
        rk, rv = slice * BK + tl.arange(0, BK), tl.arange(0, BV)
        at_kv = rk[:, None] * V + rv[None, :]
        mask = (rk < K)[:, None] & (rv < V)[None, :]
        at_state = (n * H + h) * K * V + at_kv
        dstate = tl.zeros([BK, BV], tl.float32)
        if dfinal is not None:
            dstate += tl.load(dfinal + at_state, mask=mask, other=0.0)
        start, end = segment_bounds(cu_seqlens, 1, n, T, T, 1)
        length = (end - start).to(tl.int32)
        num_stretches = (length + L - 1) // L
        for turn in range(num_stretches):
            stretch = num_stretches - 1 - turn
            first = start + stretch * L
            count = tl.minimum(length - stretch * L, L)
            if dlog_decay is not None:
                place = (first // L - 1) * H + h
                at_between = program.to(tl.int64) * L * BK * V
                at_between += tl.arange(0, BK)[:, None] * V + rv[None, :]
                state = tl.load(
                    checkpoints + place * K * V + at_kv, mask=mask & (stretch > 0), other=0.0
                )
                if initial is not None:
                    state += tl.load(initial + at_state, mask=mask & (stretch == 0), other=0.0)
                for step in tl.range(0, count, num_stages=STAGES):
                    row = (first + step) * H + h
                    tl.store(between + at_between + step * BK * V, state, mask=mask)
                    if DECAY != 0:
                        state *= load_decay(log_decay, row, h, rk, K, DECAY)[:, None]
                    state += load_row(b, row, rk, K)[:, None] * load_row(u, row, rv, V)[None, :]
                    state += load_row(k, row, rk, K)[:, None] * load_row(v, row, rv, V)[None, :]
                # What one thread wrote another may read.
                tl.debug_barrier()
            for step in tl.range(0, count, num_stages=STAGES):
                token = first + count - 1 - step
                row = token * H + h
                to_state = load_row(do, row, rv, V) * scale
                dstate += load_row(q, row, rk, K)[:, None] * to_state[None, :]
                to_k = tl.sum(dstate * load_row(v, row, rv, V)[None, :], 1)
                tl.store(dk + row * K + rk, rounded(to_k, dk.dtype.element_ty), mask=rk < K)
                to_b = tl.sum(dstate * load_row(u, row, rv, V)[None, :], 1)
                tl.store(db + row * K + rk, rounded(to_b, db.dtype.element_ty), mask=rk < K)
                if DECAY != 0:
                    decay = load_decay(log_decay, row, h, rk, K, DECAY)
                    if dlog_decay is not None:
                        before = tl.load(
                            between + at_between + (count - 1 - step) * BK * V,
                            mask=mask,
                            other=0.0,
                        )
                        to_gates = tl.sum(dstate * before, 1) * decay
                        if DECAY == 3:
                            to_gates = rounded(to_gates, dlog_decay.dtype.element_ty)
                            tl.store(dlog_decay + row * K + rk, to_gates, mask=rk < K)
                        else:
                            at_sum = (slice.to(tl.int64) * num_tokens + token) * H + h
                            tl.store(dlog_decay + at_sum, tl.sum(to_gates, 0))
                    dstate *= decay[:, None]
                dstate += load_row(a, row, rk, K)[:, None] * load_row(du, row, rv, V)[None, :]
            if dlog_decay is not None:
                # And the next stretch takes its place when all have read.
                tl.debug_barrier()


class _Walk:
    """What the launches of one call share."""

    def __init__(self, q, v, log_decay, cu_seqlens, scale):
        batch, time, self.heads, self.key_dim = q.shape
        self.value_dim, self.device = v.shape[-1], q.device
        if max(self.key_dim, self.value_dim) > MAX_KERNEL_DIM:
            raise ValueError(
                f"delta_recurrence: the Triton kernels for wide heads take K and V up to "
                f"{MAX_KERNEL_DIM}, got K = {self.key_dim} and V = {self.value_dim}; "
                'use backend="torch".'
            )
        self.num_tokens = batch * time
        self.num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.block_k, self.block_v = padded(self.key_dim), padded(self.value_dim)
        self.rows_of_k = min(self.block_k, MAX_ROWS, K_SLICE // self.block_v)
        self.rows_of_v = min(self.block_v, MAX_ROWS, V_SLICE // self.block_k)
        self.slices_of_k = -(-self.key_dim // self.rows_of_k)
        stretch = overridden.get("delta_recurrence_checkpoint", CHECKPOINT)
        self.stretch = min(stretch, 1 << (time - 1).bit_length())
        self.shared = {
            "log_decay": log_decay,
            "cu_seqlens": cu_seqlens,
            "scale": scale,
            "T": time,
            "H": self.heads,
            "K": self.key_dim,
            "V": self.value_dim,
            "DECAY": 0 if log_decay is None else {1: 1, 3: 2, 4: 3}[log_decay.ndim],
            "STAGES": NUM_STAGES,
        }

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def state(self, count=None):
        """Uninitialised states [count, H, K, V], one of each document unless said."""
        count = self.num_documents if count is None else count
        return self.empty(count, self.heads, self.key_dim, self.value_dim)

    def over_v(self, kernel, **arguments):
        """Launches a kernel whose programs own slices of V."""
        slices = -(-self.value_dim // self.rows_of_v)
        grid = self.num_documents * slices, self.heads
        blocks = {"BK": self.block_k, "BV": self.rows_of_v}
        launch(kernel, grid, NUM_WARPS, NUM_STAGES, **blocks, **arguments, **self.shared)

    def over_k(self, kernel, grid, **arguments):
        """Launches a kernel whose programs own slices of K."""
        blocks = {"BK": self.rows_of_k, "BV": self.block_v, "L": self.stretch}
        launch(kernel, grid, NUM_WARPS, NUM_STAGES, **blocks, **arguments, **self.shared)


def forward(q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state):
    """Raw forward pass; arguments and results as that of the chunk kernels."""
    walk = _Walk(q, v, log_decay, cu_seqlens, scale)
    o = torch.empty_like(v)
    final = walk.state() if output_final_state else None
    inputs = {"q": q, "k": k, "v": v, "a": a, "b": b, "initial": initial_state}
    walk.over_v(_walk_outputs, o=o, u=None, final=final, **inputs)
    return o, final


def backward(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    initial_state,
    cu_seqlens,
    do,
    dfinal,
    scale,
    decay_gradient,
    initial_gradient,
):
    """Raw backward pass; arguments and results as that of the chunk kernels."""
    walk = _Walk(q, v, log_decay, cu_seqlens, scale)
    dq, dk, dv, da, db = map(torch.empty_like, (q, k, v, a, b))
    u, du = walk.empty(*v.shape), walk.empty(*v.shape)
    dinitial = walk.state() if initial_gradient else None
    shared = {"k": k, "b": b, "do": do, "du": du}
    walk.over_v(
        _walk_outputs, q=q, k=k, v=v, a=a, b=b, initial=initial_state, o=None, u=u, final=None
    )
    walk.over_v(_walk_back, q=q, a=a, dfinal=dfinal, dv=dv, dinitial=dinitial, **shared)

    slices, tasks = walk.slices_of_k, walk.num_documents * walk.slices_of_k * walk.heads
    # As many as run at once: each has memory of its own for a stretch of states.
    programs = min(tasks, 2 * num_processors(q.device))
    dlog_decay = checkpoints = between = None
    if decay_gradient:
        checkpoints = walk.state((walk.num_tokens - 1) // walk.stretch)
        between = walk.empty(programs, walk.stretch, walk.rows_of_k, walk.value_dim)
        if log_decay.ndim == 4:
            dlog_decay = torch.empty_like(log_decay)
        else:
            dlog_decay = walk.empty(slices, *q.shape[:3])
    shared |= {"v": v, "u": u, "initial": initial_state, "checkpoints": checkpoints}
    walk.over_k(_walk_readers, (walk.num_documents * slices, walk.heads), dq=dq, da=da, **shared)
    walk.over_k(
        _walk_writers,
        (programs,),
        q=q,
        a=a,
        dfinal=dfinal,
        dk=dk,
        db=db,
        dlog_decay=dlog_decay,
        between=between,
        num_tokens=walk.num_tokens,
        num_tasks=tasks,
        **shared,
    )
    if decay_gradient and log_decay.ndim < 4:
        axes = (0, 1, 2) if log_decay.ndim == 1 else 0
        dlog_decay = dlog_decay.sum(axes).to(log_decay.dtype)
    results = dq, dk, dv, dlog_decay, da, db, dinitial
    return tuple(nothing(q) if x is None else x for x in results)
