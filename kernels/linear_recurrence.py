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

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .autograd_rules import by_formula
from .known_calls import KnownCalls, can_be_known, form
from .linear_recurrence_channels import channel_scan
from .recurrence_steps import is_plain_step, linear_recurrence_step

BACKENDS = ("auto", "torch", "triton", "fla")
_IS_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "fla")}

# Positions per chunk. The quadratic part costs C (K + V) per token and the state 2 K V, so wide
# chunks only pay where heads are wide; below 64 the Python loop over chunks dominates instead.
CHUNK_LENGTH = 64
# With a decay per channel, blocks of this many positions take a factor for each pair and channel.
PAIRWISE_LENGTH = 4


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
        backend: "triton", "fla" (flash-linear-attention, for comparison), "torch", or "auto":
            "triton" for tensors on a GPU where it is installed and they are not float64, else
            "torch". What is asked for is done or refused.

    Returns:
        (o, final_state): o is [B, T, H, V] in v's dtype; final_state is [N, H, K, V], in float32 or
        in float64 if the inputs are, or None unless asked for.

    Raises:
        ValueError: shapes that do not fit, no tokens, a positive log decay, an unknown backend.
    """
    key, tensors = None, (q, k, v, log_decay, bonus, initial_state, cu_seqlens)
    if can_be_known(q, scale):
        key = (
            (backend, scale, output_final_state, torch.is_grad_enabled(), q.device),
            (q.shape, q.dtype, k.shape, k.dtype, v.shape, v.dtype),
            None if log_decay is None else form(log_decay),
            None if bonus is None else form(bonus),
            None if initial_state is None else form(initial_state),
            None if cu_seqlens is None else form(cu_seqlens),
        )
        call = _known.prepared.get(key)
        if call is not None:
            return call(*tensors)
    chosen = choose_backend("linear_recurrence", backend, q)
    check_arguments(
        "linear_recurrence", q, k, v, log_decay, bonus, initial_state, cu_seqlens, chosen
    )
    keyword = {
        "bonus": bonus,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    if chosen == "triton" and key is not None:
        prepare = functools.partial(_prepare_triton, tensors, scale, output_final_state)
        call = _known.meet(key, prepare)
        if call is not None:
            return call(*tensors)
    run = {"torch": _run_torch, "triton": _run_triton, "fla": _run_fla}[chosen]
    return run(q, k, v, log_decay, **keyword)


_known = KnownCalls()


def _run_torch(q, k, v, log_decay, **keyword):
    """Chunks one after the other; in a program that is being exported, in operators alone."""
    if is_plain_step(q, keyword["cu_seqlens"]):
        return linear_recurrence_step(q, k, v, log_decay, **keyword)
    if torch.compiler.is_exporting():
        from .linear_recurrence_export import linear_recurrence_exported

        return linear_recurrence_exported(q, k, v, log_decay, **keyword)
    return linear_recurrence_chunked(q, k, v, log_decay, **keyword)


def _run_triton(q, k, v, log_decay, **keyword):
    """The kernels for this form of decay; a step of its own for one token without gradients."""
    from .linear_recurrence_triton import linear_recurrence_step, linear_recurrence_triton

    inputs = (q, k, v, log_decay, keyword["bonus"], keyword["initial_state"])
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if q.shape[1] == 1 and keyword["cu_seqlens"] is None and not learns:
        o, state = linear_recurrence_step(
            q,
            k,
            v,
            log_decay,
            bonus=keyword["bonus"],
            scale=keyword["scale"],
            state=keyword["initial_state"],
        )
        return o, state if keyword["output_final_state"] else None
    if log_decay is not None and log_decay.ndim == 4:
        from .linear_recurrence_channels_triton import linear_recurrence_channels_triton

        return linear_recurrence_channels_triton(q, k, v, log_decay, **keyword)
    return linear_recurrence_triton(q, k, v, log_decay, **keyword)


def _prepare_triton(tensors, scale, output_final_state):
    """What to keep for calls of this form; None for one token with gradients, or without."""
    from .linear_recurrence_channels_triton import PASSES as PER_CHANNEL
    from .linear_recurrence_triton import PASSES as PER_HEAD
    from .ready_triton import prepared_call

    def run(q, k, v, log_decay, bonus, initial_state, cu_seqlens):
        return _run_triton(
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

    q, _, _, log_decay, *_ = tensors
    if q.shape[1] == 1 and torch.is_grad_enabled():
        return None
    is_per_channel = log_decay is not None and log_decay.ndim == 4
    passes = PER_CHANNEL if is_per_channel else PER_HEAD
    return prepared_call(passes, (float(scale), output_final_state), run)


def _run_fla(q, k, v, log_decay, **keyword):
    from .fla_backend import linear_recurrence_fla

    return linear_recurrence_fla(q, k, v, log_decay, **keyword)


def choose_backend(operator, backend, x):
    """Which code runs an operator: "torch", "triton" or "fla".

    Args:
        operator: its name, for messages.
        backend: what the caller asked for, one of `BACKENDS`. "auto" is "triton" for tensors on a
            GPU, where triton is installed and they are not float64, else "torch".
        x: a tensor of the call.

    Raises:
        ValueError: an unknown backend, or one that cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: backend is one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return "torch"
    runs = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "auto":
        return "triton" if runs and _IS_INSTALLED["triton"] else "torch"
    if not runs:
        raise ValueError(
            f"{operator}: backend {backend!r} takes float32, bfloat16 or float16, got {x.dtype}; "
            'convert the tensors, or use backend="torch".'
        )
    if not _IS_INSTALLED[backend]:
        raise ValueError(
            f'{operator}: backend "{backend}" is not installed; pip install longzoo[gpu], '
            'or use backend="auto".'
        )
    interpreted = backend == "triton" and _triton_is_interpreted()
    if x.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"{operator}: backend {backend!r} needs tensors on a GPU, got {x.device.type}; move "
            'them there, or use backend="auto".'
        )
    return backend


def _triton_is_interpreted():
    """Whether TRITON_INTERPRET=1 lets the kernels run on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_arguments(
    operator, q, k, v, log_decay, bonus, initial_state, cu_seqlens, backend="torch"
):
    """Raises a ValueError that says what was expected and what came.

    Args: the operator's name for the message; the rest as in `linear_recurrence`.
    """

    def require(condition, message):
        if not condition:
            raise ValueError(f"{operator}: {message}")

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
        check_not_positive(operator, log_decay, backend=backend)
    if bonus is not None:
        require(
            list(bonus.shape) == [heads, key_dim],
            f"bonus is [H, K] = {[heads, key_dim]}, got {list(bonus.shape)}.",
        )
    num_documents = check_boundaries(operator, cu_seqlens, batch, time)
    if initial_state is not None:
        expected = [num_documents, heads, key_dim, v.shape[-1]]
        require(
            list(initial_state.shape) == expected,
            f"initial_state is [N, H, K, V] = {expected}, got {list(initial_state.shape)}.",
        )


def check_boundaries(operator, cu_seqlens, batch, time):
    """Checks document boundaries and counts the documents, without them one per row.

    Args: the operator's name for the message; cu_seqlens as in `linear_recurrence`; B; T.

    Raises:
        ValueError: not boundaries of one packed row of T tokens.
    """
    if cu_seqlens is None:
        return batch
    message = None
    if batch != 1:
        message = f"cu_seqlens goes with one packed row, B = 1, got B = {batch}."
    elif cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        message = (
            f"cu_seqlens is [N + 1] integers, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    elif cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != time or bounds != sorted(bounds):
            message = f"cu_seqlens grows from 0 to T = {time}, got {bounds[:8]}."
    if message:
        raise ValueError(f"{operator}: {message}")
    return len(cu_seqlens) - 1


def check_not_positive(
    operator, log_decay, name="log_decay", remedy="log(decay), not the decay", backend="torch"
):
    """Raises a ValueError for a log decay above 0, where the state would grow without bound.

    On a GPU reading the values would stall the host: the PyTorch path checks by an asynchronous
    device assertion, and the kernels answer with NaN.
    """
    message = (
        f"{operator}: {name} is the log of a factor in (0, 1], so at most 0, "
        f"got a positive value; pass {remedy} itself."
    )
    if torch.compiler.is_compiling():
        return
    if log_decay.device.type == "cpu":
        if bool((log_decay > 0).any()):
            raise ValueError(message)
    elif log_decay.device.type == "cuda" and backend != "triton":
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
    hand_written_backward=None,
):
    """The recurrence as matrix products over chunks of positions, for any device.

    With c the cumulative log decay inside a chunk, position i of the chunk reads
        o_i = sum_{j <= i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) q_i^T S
    where S is the state that enters the chunk; the loop runs over chunks, all documents at once.

    Args: as `linear_recurrence`, and
        chunk_length: positions per chunk; None picks it from the documents' mean length.
        hand_written_backward: gradients by formula (`_BlockScan`, `channel_scan`) instead of by
            autograd, faster and with less memory; None: wherever there is a formula, which is for
            any decay per channel, and without bonus for the others.
    """
    dtype = accumulator_dtype(q)
    is_per_channel = log_decay is not None and log_decay.ndim == 4
    if hand_written_backward is None:
        hand_written_backward = is_per_channel or bonus is None
    if chunk_length is None:
        chunk_length = CHUNK_LENGTH
        if cu_seqlens is not None:
            # A chunk belongs to one document: short ones in wide chunks would be mostly padding.
            mean_length = q.shape[1] / (len(cu_seqlens) - 1)
            chunk_length = min(chunk_length, 1 << max(0, int(mean_length - 1)).bit_length())

    def walk(q, k, v, log_decay, state, layout):
        if hand_written_backward and is_per_channel:
            return channel_scan(q, k, v, log_decay, bonus, state, layout.counts)
        if hand_written_backward:
            return _BlockScan.apply(q, k, v, log_decay, state, layout.counts)
        return _autograd_walk(q, k, v, log_decay, bonus, state, layout.counts)

    # Autocast would round the carried state to 16 bits in the products below.
    with torch.autocast(q.device.type, enabled=False):
        inputs = [q.to(dtype) * scale if scale != 1.0 else q.to(dtype), k.to(dtype), v.to(dtype)]
        bonus, log_decay, state = (
            None if x is None else x.to(dtype) for x in (bonus, log_decay, initial_state)
        )
        time = q.shape[1]
        if cu_seqlens is not None:
            o, state = _walk_packed(walk, inputs, log_decay, state, cu_seqlens, chunk_length)
        elif time <= chunk_length or time % chunk_length == 0:
            o, state = _walk_dense(walk, inputs, log_decay, state, min(time, chunk_length))
        else:
            # What is left over is a walk of its own, with a shorter chunk: all chunks are full.
            sizes = time - time % chunk_length, time % chunk_length
            outputs, parts = [], zip(*(x.split(sizes, dim=1) for x in inputs), strict=True)
            gates = [log_decay] * 2
            if log_decay is not None and log_decay.ndim > 1:
                gates = log_decay.split(sizes, dim=1)
            for size, part, gate in zip(sizes, parts, gates, strict=True):
                o, state = _walk_dense(walk, part, gate, state, min(size, chunk_length))
                outputs.append(o)
            o = torch.cat(outputs, dim=1)
    return o.to(v.dtype), state if output_final_state else None


def accumulator_dtype(x):
    """The dtype of states and sums for an input: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class _Layout(NamedTuple):
    """Chunks in the order of the walk: step n takes chunk n of every document that has one.

    Documents are ordered longest first, so the ones still running are always a prefix.

    counts: how many documents take part in each step; N chunks in all.
    split: [B, T, H, X] to [N, H, C, X].
    join: back.
    """

    counts: tuple[int, ...]
    split: Callable[[torch.Tensor], torch.Tensor]
    join: Callable[[torch.Tensor], torch.Tensor]


def _walk_dense(walk, inputs, log_decay, state, chunk_length):
    """Every row is one document, of a whole number of chunks."""
    batch, time = inputs[0].shape[:2]
    num_steps = time // chunk_length

    def split(x_BTHX):
        x_BNCHX = x_BTHX.unflatten(1, (num_steps, chunk_length))
        return x_BNCHX.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

    def join(x_NHCX):
        return x_NHCX.unflatten(0, (num_steps, batch)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    layout = _Layout((batch,) * num_steps, split, join)
    o_NHCV, state = walk(*map(split, inputs), _gates(log_decay, split), state, layout)
    return join(o_NHCV), state


def _walk_packed(walk, inputs, log_decay, state, cu_seqlens, chunk_length):
    """A packed stream of documents of any lengths."""
    q, _, v = inputs
    device, time = q.device, q.shape[1]
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.long)
    length_N, order_N = cu_seqlens.diff().sort(descending=True, stable=True)
    start_N = cu_seqlens[:-1][order_N]
    num_chunks_N = (-(-length_N // chunk_length)).tolist()
    counts = tuple(sum(n > step for n in num_chunks_N) for step in range(num_chunks_N[0]))

    # Positions past a document's end read token 0, and are masked.
    first = [start_N[:n] + step * chunk_length for step, n in enumerate(counts)]
    end = [(start_N + length_N)[:n] for n in counts]
    index_NC = torch.cat(first)[:, None] + torch.arange(chunk_length, device=device)
    inside_NC = index_NC < torch.cat(end)[:, None]
    index_NC = torch.where(inside_NC, index_NC, 0)
    place_T = torch.empty(time, dtype=torch.long, device=device)
    place_T[index_NC[inside_NC]] = inside_NC.flatten().nonzero()[:, 0]

    def split(x_BTHX):
        x_NCHX = x_BTHX[0].index_select(0, index_NC.flatten()).unflatten(0, index_NC.shape)
        return torch.where(inside_NC[..., None, None], x_NCHX, 0).transpose(1, 2).contiguous()

    def join(x_NHCX):
        return x_NHCX.transpose(1, 2).flatten(0, 1).index_select(0, place_T)[None]

    if log_decay is not None and log_decay.ndim == 1:
        # A document's last chunk may be short, and decays by its own length: masked gates do that.
        log_decay = log_decay.expand(1, time, -1)
    if state is None:
        state = q.new_zeros(len(length_N), q.shape[2], q.shape[3], v.shape[3])
    else:
        state = state.index_select(0, order_N)
    layout = _Layout(counts, split, join)
    o_NHCV, state = walk(*map(split, inputs), _gates(log_decay, split), state, layout)
    return join(o_NHCV), state.index_select(0, order_N.argsort())


def _gates(log_decay, split):
    """Log decays in the order of the walk: None, [H], or [N, H, C, 1 or K]."""
    if log_decay is None or log_decay.ndim == 1:
        return log_decay
    return split(log_decay[..., None] if log_decay.ndim == 3 else log_decay)


class _Decay(NamedTuple):
    """Factors of one chunk, all exp of non-positive numbers; None where there is no decay.

    scores: from key j to query i, [N, H, C, C] or [H, C, C], 0 where j may not be read; with a
        decay per channel the (read, kept) cumulative log decays instead, for `_read_inside`.
    query: from the chunk's start to query i, [N, H, C, 1 or K] or [H, C, 1].
    key: from key j to the chunk's end, same shapes.
    state: over the whole chunk, [N, H, 1 or K, 1] or [H, 1, 1].
    """

    scores: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    query: torch.Tensor | None
    key: torch.Tensor | None
    state: torch.Tensor | None


def _decays(gates, counts, length, like, strict=False):
    """The `_Decay` of each step, as a list.

    Args:
        gates: None, [H] or [N, H, C, 1 or K] log decays.
        counts: as in `_Layout`.
        length: C.
        like: a tensor of the dtype and on the device of the result.
        strict: query i reads j < i only.
    """
    if gates is None:
        visible_CC = _visible(length, strict, like.device).to(like.dtype)
        return [_Decay(visible_CC, None, None, None)] * len(counts)
    if gates.ndim == 1:
        return [_decay_factors(gates[:, None, None].expand(-1, length, 1), strict)] * len(counts)
    return [_decay_factors(gates_NHCK, strict) for gates_NHCK in gates.split(counts)]


def _decay_factors(log_decay_NHCK, strict):
    """_Decay of a chunk from its log decays [..., H, C, 1 or K]; strict: i reads j < i only."""
    cum_NHCK = log_decay_NHCK.cumsum(-2)
    read_NHCK = cum_NHCK - log_decay_NHCK if strict else cum_NHCK
    last_NH1K = cum_NHCK[..., -1:, :]
    if cum_NHCK.shape[-1] == 1:
        scores = _pair_factors(read_NHCK, cum_NHCK, strict).squeeze(-1)
    else:
        scores = read_NHCK, cum_NHCK
    return _Decay(
        scores,
        read_NHCK.exp(),
        (last_NH1K - cum_NHCK).exp(),
        last_NH1K.transpose(-1, -2).exp(),
    )


def _pair_factors(read_NHCK, cum_NHCK, strict):
    """exp(read_i - cum_j) for every pair of positions, [..., C, C, 1 or K], 0 where j is hidden."""
    visible_CC = _visible(cum_NHCK.shape[-2], strict, cum_NHCK.device)
    # where() before exp(): above the diagonal the exponent is positive and could overflow.
    exponent_NHCCK = read_NHCK[..., :, None, :] - cum_NHCK[..., None, :, :]
    return torch.where(visible_CC[..., None], exponent_NHCCK, -torch.inf).exp()


def _read_inside(q_NHCK, k_NHCK, v_NHCV, read_NHCK, cum_NHCK, strict):
    """What each position reads of its own chunk, with a decay per channel.

    The later half of the chunk reads the earlier one in a single product, as decay splits at the
    boundary r between them: exp(c_i - c_j) = exp(c_i - c_r) exp(c_r - c_j), both at most 1. Inside
    the halves likewise, down to blocks so short that one factor per pair and channel is cheaper.
    """
    length = q_NHCK.shape[-2]
    if length <= PAIRWISE_LENGTH or length % 2:
        factors_NHCCK = _pair_factors(read_NHCK, cum_NHCK, strict)
        scores_NHCC = torch.einsum("...ik,...ijk,...jk->...ij", q_NHCK, factors_NHCCK, k_NHCK)
        return scores_NHCC @ v_NHCV
    halves = [x.unflatten(-2, (2, -1)) for x in (q_NHCK, k_NHCK, v_NHCV, read_NHCK, cum_NHCK)]
    (_, q), (k, _), (v, _), (_, read), (cum, _) = (x.unbind(-3) for x in halves)
    boundary = cum[..., -1:, :]
    scores_NHCC = (q * (read - boundary).exp()) @ (k * (boundary - cum).exp()).mT
    earlier, later = _read_inside(*halves, strict).unbind(-3)
    return torch.cat([earlier, later + scores_NHCC @ v], dim=-2)


def _visible(length, strict, device):
    ones_CC = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones_CC.tril(-1 if strict else 0)


def _autograd_walk(q, k, v, gates, bonus, state, counts):
    """Walks the chunks with operations that autograd differentiates."""
    decays = _decays(gates, counts, q.shape[2], q, strict=bonus is not None)
    # One split and one concatenation: slicing inside the loop would make backward quadratic in T.
    chunks = zip(q.split(counts), k.split(counts), v.split(counts), decays, counts, strict=True)
    outputs, finished = [], []
    for q_NHCK, k_NHCK, v_NHCV, decay, count in chunks:
        if state is not None:
            finished.append(state[count:])
            state = state[:count]
        o_NHCV, state = _chunk(q_NHCK, k_NHCK, v_NHCV, decay, bonus, state)
        outputs.append(o_NHCV)
    # Documents leave the walk shortest first.
    return torch.cat(outputs), torch.cat([state, *finished[::-1]])


def _chunk(q_NHCK, k_NHCK, v_NHCV, decay, bonus, state_NHKV):
    """Outputs of one chunk and the state that leaves it. state None: the sequences start here."""
    if isinstance(decay.scores, tuple):
        o_NHCV = _read_inside(q_NHCK, k_NHCK, v_NHCV, *decay.scores, bonus is not None)
    else:
        o_NHCV = (q_NHCK @ k_NHCK.mT * decay.scores) @ v_NHCV
    if bonus is not None:
        o_NHCV = o_NHCV + (q_NHCK * bonus[:, None, :] * k_NHCK).sum(-1, keepdim=True) * v_NHCV
    update_NHKV = _scaled(k_NHCK, decay.key).mT @ v_NHCV
    if state_NHKV is None:
        return o_NHCV, update_NHKV
    o_NHCV = o_NHCV + _scaled(q_NHCK, decay.query) @ state_NHKV
    return o_NHCV, _scaled(state_NHKV, decay.state) + update_NHKV


def _scaled(x, factor):
    return x if factor is None else x * factor


class _BlockScan(torch.autograd.Function):
    """The walk over chunks with its gradients by formula, for no decay or one decay per head.

    With P_ij = exp(c_i - c_j) q_i . k_j and dP_ij = exp(c_i - c_j) do_i . v_j for j <= i, inside a
    chunk that S enters and that the gradient dS leaves against the direction of time:

        o  = P v      + exp(c) q S
        dq = dP k     + exp(c) do S^T
        dv = P^T do   + exp(c_C - c) k dS
        dk = dP^T q   + exp(c_C - c) v dS^T

    so each is the recurrence once more, with other tensors in the three places. A log decay enters
    through the cumulative sums alone: its gradient is the sum over later positions of
    q . dq - k . dk, with the final state as one more position that reads.
    """

    @staticmethod
    def forward(ctx, q_NHCK, k_NHCK, v_NHCV, gates, state, counts):
        decays = _decays(gates, counts, q_NHCK.shape[2], q_NHCK)
        o_NHCV = torch.empty_like(v_NHCV)
        entering, finished, start = [], [], 0
        for decay, count in zip(decays, counts, strict=True):
            now = slice(start, start + count)
            start += count
            if state is not None:
                finished.append(state[count:])
                state = state[:count]
            entering.append(state)
            q, k, v = q_NHCK[now], k_NHCK[now], v_NHCV[now]
            o_NHCV[now] = (q @ k.mT).mul_(decay.scores) @ v
            update = _scaled(k, decay.key).mT @ v
            if state is not None:
                _add_product(o_NHCV[now], q @ state, decay.query)
                update += _scaled(state, decay.state)
            state = update
        final = torch.cat([state, *finished[::-1]])
        ctx.counts, ctx.num_entering = counts, len(entering)
        ctx.starts_at_zero = entering[0] is None
        saved = entering[1:] if ctx.starts_at_zero else entering
        ctx.save_for_backward(q_NHCK, k_NHCK, v_NHCV, gates, final, *saved)
        return o_NHCV, final

    @staticmethod
    @by_formula
    def backward(ctx, do_NHCV, dfinal):
        q_NHCK, k_NHCK, v_NHCV, gates, final, *entering = ctx.saved_tensors
        if ctx.starts_at_zero:
            entering = [None, *entering]
        counts = ctx.counts
        decays = _decays(gates, counts, q_NHCK.shape[2], q_NHCK)
        dq_NHCK, dk_NHCK, dv_NHCV = map(torch.empty_like, (q_NHCK, k_NHCK, v_NHCV))
        start, dstate = q_NHCK.shape[0], dfinal[: counts[-1]]
        for step in reversed(range(len(counts))):
            decay, count, state = decays[step], counts[step], entering[step]
            now = slice(start - count, start)
            start -= count
            # Documents whose last chunk this is join with the gradient of their final state.
            if count > dstate.shape[0]:
                dstate = torch.cat([dstate, dfinal[dstate.shape[0] : count]])
            q, k, v, do = q_NHCK[now], k_NHCK[now], v_NHCV[now], do_NHCV[now]
            p = (q @ k.mT).mul_(decay.scores)
            dp = (do @ v.mT).mul_(decay.scores)
            dq_NHCK[now] = dp @ k
            dk_NHCK[now] = dp.mT @ q
            dv_NHCV[now] = p.mT @ do
            _add_product(dk_NHCK[now], v @ dstate.mT, decay.key)
            _add_product(dv_NHCV[now], k @ dstate, decay.key)
            if state is not None:
                _add_product(dq_NHCK[now], do @ state.mT, decay.query)
                dstate = _scaled(dstate, decay.state) + _scaled(q, decay.query).mT @ do
        dinitial = None
        if not ctx.starts_at_zero:
            dinitial = torch.cat([dstate, dfinal[dstate.shape[0] :]])
        dgates = None
        if gates is not None and ctx.needs_input_grad[3]:
            dcum_NHC = (q_NHCK * dq_NHCK).sum(-1) - (k_NHCK * dk_NHCK).sum(-1)
            dend_NH = (final * dfinal).sum((-1, -2))
            dgates = _gate_gradient(dcum_NHC, dend_NH, counts)
            dgates = dgates.sum((0, 2)) if gates.ndim == 1 else dgates[..., None]
            dgates = dgates.to(gates.dtype)
        return dq_NHCK, dk_NHCK, dv_NHCV, dgates, dinitial, None


def _add_product(out, x, factor):
    """out += x * factor, in place."""
    if factor is None:
        out += x
    else:
        out.addcmul_(x, factor)


def _gate_gradient(dcum_NHC, dend_NH, counts):
    """Sums over each document's later positions, back through its chunks. In float64: many cancel.

    Args:
        dcum_NHC: gradients of the cumulative log decays in the order of the walk.
        dend_NH: that of each document's whole log decay, through its final state.
        counts: as in `_Layout`.
    """
    dcum_NHC, later_NH = dcum_NHC.double(), dend_NH.double()
    gradients = []
    for chunk_NHC in reversed(dcum_NHC.split(counts)):
        sums_NHC = chunk_NHC.flip(-1).cumsum(-1).flip(-1)
        sums_NHC = sums_NHC + later_NH[: len(chunk_NHC), :, None]
        later_NH = torch.cat([sums_NHC[..., 0], later_NH[len(chunk_NHC) :]])
        gradients.append(sums_NHC)
    return torch.cat(gradients[::-1])
