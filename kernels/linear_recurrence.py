"""Linear recurrence: a matrix state that decays and takes in one outer product per token.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        S is [K, V] per head, diag acts on K
    o_t = scale * q_t^T S_t                                  without `bonus`
    o_t = scale * q_t^T (S_{t-1} + diag(bonus) k_t v_t^T)    with `bonus`: the state is read first

One operator for many papers, by the form of `log_decay`:

    None            linear attention (Katharopoulos et al. 2020), Infini-attention's memory
    [H]             retention (Sun et al. 2023, eq. 1-3), Lightning Attention-2 (Qin et al. 2024)
    [B, T, H]       scalar gates: Mamba-2 (Dao and Gu 2024), mLSTM
    [B, T, H, K]    vector gates: GLA (Yang et al. 2023); RWKV-5 and RWKV-6 with `bonus`

Call `linear_recurrence`. `linear_recurrence_reference` is the definition, one step at a time;
`linear_recurrence_chunked` gives the same numbers in matrix products over chunks of positions.
Decay only ever appears as exp of a non-positive number, so nothing overflows.
"""

from typing import NamedTuple

import torch

BACKENDS = ("auto", "torch")

# Positions per chunk. The quadratic part costs C (K + V) per token and the state 2 K V, so wide
# chunks only pay where heads are wide; below 64 the Python loop over chunks dominates instead.
CHUNK_LENGTH = 64
# With a decay per channel the scores need exp(c_i - c_j) for each of the K channels: C*C*K numbers.
CHUNK_LENGTH_VECTOR_DECAY = 16


def linear_recurrence(
    q,
    k,
    v,
    log_decay=None,
    *,
    bonus=None,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    backend="auto",
):
    """Runs the linear recurrence of the module docstring over a batch or a packed stream.

    Args:
        q: queries [B, T, H, K], any float dtype.
        k: keys [B, T, H, K].
        v: values [B, T, H, V].
        log_decay: natural log of the decay, <= 0: None (no decay), [H], [B, T, H] or [B, T, H, K].
        bonus: weight of the current token [H, K]; the output then reads the state *before* this
            token (RWKV-5/6, `u`). None: the output reads the state after it.
        scale: factor on the output.
        initial_state: [N, H, K, V], the state before the first token; None is zero. N is B, or the
            number of documents with `cu_seqlens`.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: document boundaries in a packed stream, [N + 1] integers from 0 to T, as in
            FlashAttention; B must be 1. Documents may be empty. None: one document per row.
        backend: "torch" or "auto" (which is "torch": there are no other kernels in this version).

    Returns:
        (o, final_state): o is [B, T, H, V] in v's dtype; final_state is [N, H, K, V], in float32 or
        in float64 if the inputs are, or None unless asked for.

    Raises:
        ValueError: shapes that do not fit, no tokens, a positive log decay, an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"linear_recurrence: backend is one of {', '.join(BACKENDS)}, got {backend!r}; "
            "this version has the PyTorch path only."
        )
    check_arguments(q, k, v, log_decay, bonus, initial_state, cu_seqlens)
    return linear_recurrence_chunked(
        q,
        k,
        v,
        log_decay,
        bonus=bonus,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def check_arguments(q, k, v, log_decay, bonus, initial_state, cu_seqlens):
    """Raises a ValueError that says what was expected and what came. See `linear_recurrence`."""

    def require(condition, message):
        if not condition:
            raise ValueError(f"linear_recurrence: {message}")

    require(q.ndim == 4, f"q is [B, T, H, K], got shape {list(q.shape)}.")
    batch, time, heads, key_dim = q.shape
    require(k.shape == q.shape, f"k has the shape of q {list(q.shape)}, got {list(k.shape)}.")
    require(
        v.ndim == 4 and v.shape[:3] == q.shape[:3],
        f"v is [B, T, H, V] with q's B, T, H {[batch, time, heads]}, got {list(v.shape)}.",
    )
    require(time > 0, f"there are no tokens (T = 0, q is {list(q.shape)}); pass at least one.")
    if log_decay is not None:
        forms = ([heads], [batch, time, heads], [batch, time, heads, key_dim])
        require(
            list(log_decay.shape) in forms,
            f"log_decay is None, [H], [B, T, H] or [B, T, H, K] = {forms[2]}, "
            f"got {list(log_decay.shape)}.",
        )
        check_not_positive(log_decay)
    if bonus is not None:
        require(
            list(bonus.shape) == [heads, key_dim],
            f"bonus is [H, K] = {[heads, key_dim]}, got {list(bonus.shape)}.",
        )
    num_documents = batch
    if cu_seqlens is not None:
        require(batch == 1, f"cu_seqlens goes with one packed row, B = 1, got B = {batch}.")
        require(
            cu_seqlens.ndim == 1 and len(cu_seqlens) >= 2 and not cu_seqlens.is_floating_point(),
            f"cu_seqlens is [N + 1] integers, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}.",
        )
        num_documents = len(cu_seqlens) - 1
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            bounds = cu_seqlens.tolist()
            require(
                bounds[0] == 0 and bounds[-1] == time and bounds == sorted(bounds),
                f"cu_seqlens grows from 0 to T = {time}, got {bounds[:8]}.",
            )
    if initial_state is not None:
        expected = [num_documents, heads, key_dim, v.shape[-1]]
        require(
            list(initial_state.shape) == expected,
            f"initial_state is [N, H, K, V] = {expected}, got {list(initial_state.shape)}.",
        )


def check_not_positive(log_decay):
    """Raises a ValueError for a log decay above 0, where the state would grow without bound.

    On a GPU the check is an asynchronous device assertion: reading the values would stall the host.
    """
    message = (
        "linear_recurrence: log_decay is the log of a factor in (0, 1], so at most 0, "
        "got a positive value; pass log(decay), not the decay itself."
    )
    if torch.compiler.is_compiling():
        return
    if log_decay.device.type == "cpu":
        if bool((log_decay > 0).any()):
            raise ValueError(message)
    elif log_decay.device.type == "cuda":
        torch._assert_async((log_decay <= 0).all(), message)


def linear_recurrence_reference(
    q,
    k,
    v,
    log_decay=None,
    *,
    bonus=None,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
):
    """The definition, one step at a time. Same arguments and results as `linear_recurrence`.

    Runs in float64 if the inputs are, else in float32. Differentiable by autograd; slow.
    """
    q_BTHK, k_BTHK, v_BTHV = (x.to(accumulator_dtype(q)) for x in (q, k, v))
    batch, time, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if log_decay is None:
        log_decay = q_BTHK.new_zeros(heads)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(batch, time, heads)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    decay_BTHK = log_decay.to(q_BTHK.dtype).exp().expand(batch, time, heads, key_dim)

    if cu_seqlens is None:
        documents = [(row, 0, time) for row in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        documents = [(0, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]

    outputs_THV, states_HKV = [], []
    for n, (row, start, end) in enumerate(documents):
        if initial_state is None:
            state_HKV = q_BTHK.new_zeros(heads, key_dim, value_dim)
        else:
            state_HKV = initial_state[n].to(q_BTHK.dtype)
        for t in range(start, end):
            token_HKV = k_BTHK[row, t, :, :, None] * v_BTHV[row, t, :, None, :]
            before_HKV = state_HKV
            state_HKV = decay_BTHK[row, t, :, :, None] * state_HKV + token_HKV
            read_HKV = state_HKV
            if bonus is not None:
                read_HKV = before_HKV + bonus.to(q_BTHK.dtype)[:, :, None] * token_HKV
            outputs_THV.append(scale * (q_BTHK[row, t, :, :, None] * read_HKV).sum(-2))
        states_HKV.append(state_HKV)
    o_BTHV = torch.stack(outputs_THV).unflatten(0, (batch, time)).to(v.dtype)
    return o_BTHV, torch.stack(states_HKV) if output_final_state else None


def linear_recurrence_chunked(
    q,
    k,
    v,
    log_decay=None,
    *,
    bonus=None,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_length=None,
):
    """The recurrence as matrix products over chunks of positions, by autograd, for any device.

    With c the cumulative log decay inside a chunk, position i of the chunk reads
        o_i = sum_{j <= i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) q_i^T S
    where S is the state that enters the chunk; the loop runs over chunks, all documents at once.

    Args: as `linear_recurrence`, and
        chunk_length: positions per chunk; None picks it from the decay's form and the documents'
            mean length.
    """
    dtype = accumulator_dtype(q)
    if chunk_length is None:
        is_vector = log_decay is not None and log_decay.ndim == 4
        chunk_length = CHUNK_LENGTH_VECTOR_DECAY if is_vector else CHUNK_LENGTH
        if cu_seqlens is not None:
            # A chunk belongs to one document: short ones in wide chunks would be mostly padding.
            mean_length = q.shape[1] / (len(cu_seqlens) - 1)
            chunk_length = min(chunk_length, 1 << max(0, int(mean_length - 1)).bit_length())

    # Autocast would round the carried state to 16 bits in the products below.
    with torch.autocast(q.device.type, enabled=False):
        inputs = [q.to(dtype) * scale if scale != 1.0 else q.to(dtype), k.to(dtype), v.to(dtype)]
        if bonus is not None:
            bonus = bonus.to(dtype)
        if log_decay is not None:
            log_decay = log_decay.to(dtype)
        state = None if initial_state is None else initial_state.to(dtype)
        walk = _dense_walk if cu_seqlens is None else _packed_walk
        o, state = walk(inputs, log_decay, bonus, state, cu_seqlens, chunk_length)
    return o.to(v.dtype), state if output_final_state else None


def accumulator_dtype(x):
    """The dtype of states and sums for an input: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class _Decay(NamedTuple):
    """Factors of one chunk, all exp of non-positive numbers; None where there is no decay.

    scores: from key j to query i, [N, H, C, C] or [H, C, C], 0 where j may not be read;
        with a decay per channel [N, H, C, C, K].
    query: from the chunk's start to query i, [N, H, C, 1 or K] or [H, C, 1].
    key: from key j to the chunk's end, same shapes.
    state: over the whole chunk, [N, H, 1 or K, 1] or [H, 1, 1].
    """

    scores: torch.Tensor
    query: torch.Tensor | None
    key: torch.Tensor | None
    state: torch.Tensor | None


def _decay_factors(log_decay_NHCK, strict):
    """_Decay of a chunk from its log decays [..., H, C, 1 or K]; strict: i reads j < i only."""
    cum_NHCK = log_decay_NHCK.cumsum(-2)
    read_NHCK = cum_NHCK - log_decay_NHCK if strict else cum_NHCK
    last_NH1K = cum_NHCK[..., -1:, :]
    length = cum_NHCK.shape[-2]
    visible_CC = _visible(length, strict, cum_NHCK.device)
    # where() before exp(): above the diagonal the exponent is positive and could overflow.
    exponent_NHCCK = read_NHCK[..., :, None, :] - cum_NHCK[..., None, :, :]
    scores = torch.where(visible_CC[..., None], exponent_NHCCK, -torch.inf).exp()
    return _Decay(
        scores.squeeze(-1) if scores.shape[-1] == 1 else scores,
        read_NHCK.exp(),
        (last_NH1K - cum_NHCK).exp(),
        last_NH1K.transpose(-1, -2).exp(),
    )


def _visible(length, strict, device):
    ones_CC = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones_CC.tril(-1 if strict else 0)


def _chunk(q_NHCK, k_NHCK, v_NHCV, decay, bonus, state_NHKV):
    """Outputs of one chunk and the state that leaves it. state None: the sequences start here."""
    if decay.scores.ndim == 5:
        scores_NHCC = torch.einsum("nhik,nhijk,nhjk->nhij", q_NHCK, decay.scores, k_NHCK)
    else:
        scores_NHCC = (q_NHCK @ k_NHCK.transpose(-1, -2)) * decay.scores
    if bonus is not None:
        diagonal_NHC = (q_NHCK * bonus[:, None, :] * k_NHCK).sum(-1)
        scores_NHCC = scores_NHCC + torch.diag_embed(diagonal_NHC)
    o_NHCV = scores_NHCC @ v_NHCV
    if decay.query is None:
        update_NHKV = k_NHCK.transpose(-1, -2) @ v_NHCV
    else:
        update_NHKV = (k_NHCK * decay.key).transpose(-1, -2) @ v_NHCV
    if state_NHKV is None:
        return o_NHCV, update_NHKV
    if decay.query is None:
        return o_NHCV + q_NHCK @ state_NHKV, state_NHKV + update_NHKV
    o_NHCV = o_NHCV + (q_NHCK * decay.query) @ state_NHKV
    return o_NHCV, decay.state * state_NHKV + update_NHKV


def _dense_walk(inputs, log_decay, bonus, state, cu_seqlens, chunk_length):
    """Every row is one document: a chunk is the same slice of time in all rows."""
    strict = bonus is not None
    # One split and one concatenation: slicing inside the loop would make backward quadratic in T.
    chunks = zip(*(x.transpose(1, 2).split(chunk_length, dim=2) for x in inputs), strict=True)
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
        gates = log_decay.transpose(1, 2).split(chunk_length, dim=2)
    outputs, decay = [], None
    for n, (q_BHCK, k_BHCK, v_BHCV) in enumerate(chunks):
        length = q_BHCK.shape[2]
        if log_decay is None:
            if decay is None or decay.scores.shape[-1] != length:
                visible_CC = _visible(length, strict, q_BHCK.device).to(q_BHCK.dtype)
                decay = _Decay(visible_CC, None, None, None)
        elif log_decay.ndim == 1:
            if decay is None or decay.scores.shape[-1] != length:
                decay = _decay_factors(log_decay[:, None, None].expand(-1, length, 1), strict)
        else:
            decay = _decay_factors(gates[n], strict)
        o_BHCV, state = _chunk(q_BHCK, k_BHCK, v_BHCV, decay, bonus, state)
        outputs.append(o_BHCV)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _packed_walk(inputs, log_decay, bonus, state, cu_seqlens, chunk_length):
    """A packed stream: step n of the walk takes chunk n of every document that is long enough.

    Documents are walked longest first, so the ones still running are always a prefix.
    """
    strict = bonus is not None
    q, _, v = inputs
    device, heads, key_dim, value_dim = q.device, q.shape[2], q.shape[3], v.shape[3]
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.long)
    length_N, order_N = cu_seqlens.diff().sort(descending=True, stable=True)
    start_N = cu_seqlens[:-1][order_N]
    num_chunks_N = (-(-length_N // chunk_length)).tolist()
    num_running = [sum(n > step for n in num_chunks_N) for step in range(num_chunks_N[0])]

    # Gather once, in the order of the walk; positions past a document's end read token 0, masked.
    first = [start_N[:n] + step * chunk_length for step, n in enumerate(num_running)]
    end = [(start_N + length_N)[:n] for n in num_running]
    index_NC = torch.cat(first)[:, None] + torch.arange(chunk_length, device=device)
    inside_NC = index_NC < torch.cat(end)[:, None]
    index_NC = torch.where(inside_NC, index_NC, 0)

    def gather(x_BTHX):
        x_NCHX = x_BTHX[0].index_select(0, index_NC.flatten()).unflatten(0, index_NC.shape)
        x_NCHX = torch.where(inside_NC[..., None, None], x_NCHX, 0)
        return x_NCHX.transpose(1, 2).split(num_running)

    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(1, q.shape[1], heads)
        gates = gather(log_decay[..., None] if log_decay.ndim == 3 else log_decay)
    if state is not None:
        state = state[order_N]
    else:
        state = q.new_zeros(len(length_N), heads, key_dim, value_dim)

    outputs, finished = [], []
    for step, chunk in enumerate(zip(*map(gather, inputs), strict=True)):
        running = num_running[step]
        finished.append(state[running:])
        if log_decay is None:
            visible_CC = _visible(chunk_length, strict, device).to(q.dtype)
            decay = _Decay(visible_CC, None, None, None)
        else:
            decay = _decay_factors(gates[step], strict)
        o_NHCV, state = _chunk(*chunk, decay, bonus, state[:running])
        outputs.append(o_NHCV)
    finished.append(state)

    o_NCHV = torch.cat(outputs).transpose(1, 2)
    place_T = torch.empty(q.shape[1], dtype=torch.long, device=device)
    place_T[index_NC[inside_NC]] = inside_NC.flatten().nonzero()[:, 0]
    o_BTHV = o_NCHV.flatten(0, 1).index_select(0, place_T)[None]
    # Documents left the walk shortest first: put their states back into the stream's order.
    state_NHKV = torch.cat(finished[::-1])[order_N.argsort()]
    return o_BTHV, state_NHKV
