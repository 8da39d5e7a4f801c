"""Points 7 and 8: what a long sequence costs, and training and compiling it."""

import copy
import ctypes
import gc
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from .compare import BOUNDS, gradients, loss_of, relative, relative_gradients
from .compiling import compiled
from .points_sequence import cut
from .report import NotApplicable
from .subject import cache_tensors, held_bytes, state_tensors

BOUND = BOUNDS[torch.float64]
SEGMENT = 4096
# Of what is compiled: beyond a chunk, and several windows and segments of a tiny model. Loops over
# these are unrolled in the graph, and a longer one takes longer and shows nothing else.
COMPILED_LENGTH = 67
# Growth of the peak over a prefill that is noise of the allocator, or 1% of the process.
MEMORY_NOISE = 4 << 20
CURVE_POINTS = 10
# Of a prefill; the peak is measured in each. To begin a measurement gives all free memory back to
# the system, and to take it again costs as much time as a small model computes in a segment.
MEASUREMENTS = 32


def constant_state(subject, checks, num_tokens):
    """Point 7: the state has one size, and memory does not grow with the tokens.

    Args:
        num_tokens: length of the long prefill.
    """
    model = subject.model(torch.float32)
    if not getattr(model, "has_constant_state", True):
        _growing_state(subject, checks, model)
        return
    lengths = (1, 65, 700)
    with checks.case("state"), torch.no_grad():
        # The first piece may be shorter than whatever a state keeps, so all begin with one token.
        cache, sizes, done = None, [], 0
        for length in lengths:
            ids = subject.ids(1, length - done)
            cache = subject.run(model, ids, cache=cache)[1]
            done = length
            sizes.append(held_bytes(cache_tensors(cache).values()))
        growth = max(sizes) - min(sizes)
        checks.below(f"bytes more after {lengths[-1]} tokens than after 1", growth, 0)
        if hasattr(model, "state_size"):
            tensors = cache_tensors(cache)
            states = held_bytes(x for k, x in tensors.items() if not k.endswith(".clock"))
            difference = abs(states - model.state_size())
            checks.below("bytes of the live cache - state_size()", difference, 0)
        else:
            checks.not_run("bytes of the live cache = state_size()", "the model has no state_size")
    with checks.case(f"prefill of {num_tokens:,} tokens"), torch.no_grad():
        _prefill(subject, checks, model, num_tokens)


def _growing_state(subject, checks, model):
    """A model that promises no constant state says how its state grows, and is held to that."""
    with checks.case("state"), torch.no_grad():
        for length in (1, 65, 700):
            tensors = cache_tensors(subject.run(model, subject.ids(1, length))[1])
            size = held_bytes(x for k, x in tensors.items() if not k.endswith(".clock"))
            difference = abs(size - model.state_size(length))
            checks.below(f"{length} tokens: bytes of the live cache - state_size()", difference, 0)
        for name in ("state of one size", "long prefill in constant memory"):
            checks.not_run(name, "full attention: the state grows with the tokens")


def _prefill(subject, checks, model, num_tokens):
    # A fixed segment, reused: what grows is the model's, not the input's.
    segment = min(SEGMENT, -(-num_tokens // 16))
    measured = segment * max(1, num_tokens // (segment * MEASUREMENTS))
    settings = {"logits_to_keep": 1} if subject.accepts("logits_to_keep") else {}
    gc.collect()
    cache, done, curve, started = None, 0, [], time.perf_counter()
    while done < num_tokens:
        end = min(done + measured, num_tokens)
        start_peak_memory()
        while done < end:
            length = min(segment, end - done)
            ids = subject.ids(1, length, seed=done)
            output = subject.forward(model, ids, cache, use_cache=True, **settings)
            cache = subject.cache_of(output)
            done += length
        curve.append((done, peak_memory()))
    seconds = time.perf_counter() - started
    # The first quarter warms the allocator up.
    warm = max(1, len(curve) // 4)
    early, late = (max(bytes_ for _, bytes_ in part) for part in (curve[:warm], curve[-warm:]))
    noise = max(MEMORY_NOISE, early // 100)
    checks.below("growth of peak memory, MiB", _mib(late - early), _mib(noise))
    finite = torch.isfinite(output.logits).all().item()
    checks.holds("logits at the end are finite", finite)
    shown = [curve[round(i * (len(curve) - 1) / CURVE_POINTS)] for i in range(CURVE_POINTS + 1)]
    checks.note(
        f"prefill in segments of {segment}, {seconds:.1f} s, {num_tokens / seconds:,.0f} tokens/s; "
        f"peak memory of the process in each {measured:,} tokens:\n"
        + "\n".join(f"{tokens:>12,} tokens {_mib(bytes_):>10.1f} MiB" for tokens, bytes_ in shown)
    )


def _mib(num_bytes):
    return num_bytes / 2**20


def start_peak_memory():
    """Starts a new measurement of the peak, where the system allows it (Linux)."""
    # glibc keeps freed memory, in pieces: growth would first fill those and not show, and their
    # scatter would look like growth. Other C libraries have no such call.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Without it the peak is that of the whole process so far, which still shows growth.
        pass


def peak_memory():
    """Bytes of physical memory this process held at most since `start_peak_memory`."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError):
        if resource is None:
            raise NotApplicable("this system does not tell a process its peak memory") from None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def training_and_compiling(subject, checks):
    """Point 8: checkpointing, segment replay and compiling change nothing."""
    ids = subject.ids(2, 131)
    with checks.case("gradient checkpointing"):
        model, other = subject.model(), subject.model()
        other.gradient_checkpointing_enable()
        # Models checkpoint in training mode only, and dropout would hide the comparison.
        for each in (model.train(), other.train()):
            without_dropout(each)
        found, expected = (
            gradients(each, loss_of(subject.forward(each, ids).logits)) for each in (other, model)
        )
        checks.below("gradients", relative_gradients(found, expected), BOUND)
        with checks.case("with a carried state"):
            pieces = cut(131, (7, 64, 1, 59))
            # transformers returns no cache under checkpointing, but continues from a given one.
            cache = subject.empty_cache(other)
            found = gradients(other, loss_of(subject.run(other, ids, pieces, cache)[0]))
            expected = gradients(model, loss_of(subject.run(model, ids, pieces)[0]))
            checks.below("gradients", relative_gradients(found, expected), BOUND)
    with checks.case("segment replay"):
        _replayed(subject, checks)
    model = subject.model()
    with checks.case("torch.compile, full graph"):
        compiled(subject, checks, model, ids[:, :COMPILED_LENGTH])
    with checks.case("torch.compile on a GPU, inductor"), torch.no_grad():
        if not torch.cuda.is_available():
            raise NotApplicable("no GPU")
        model, ids = subject.model().to("cuda"), ids.to("cuda")
        expected = subject.forward(model, ids).logits
        graph = torch.compile(lambda ids: subject.forward(model, ids).logits, fullgraph=True)
        checks.below("logits", relative(graph(ids), expected), BOUND)


def _replayed(subject, checks):
    """Gradients with activations of one segment at a time, however the documents lie."""
    model = subject.model()
    decoder = model.base_model
    if not hasattr(decoder, "replay_segment_length"):
        raise NotApplicable("it has no replay_segment_length")
    without_dropout(model.train())
    ids, packed = subject.ids(2, 131), subject.ids(1, 131)
    mask = torch.ones(2, 131, dtype=torch.long)
    mask[0, :50] = mask[1, 39:43] = mask[1, 100:] = 0
    # Documents that begin inside segments, at their boundaries, and right after one another.
    bounds = torch.tensor([0, 7, 40, 41, 80, 131])
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    documents = torch.arange(5).repeat_interleave(bounds.diff())[None]
    with torch.no_grad():
        state = subject.run(model, subject.ids(2, 33, seed=1))[1]
    cases = {
        "whole": (ids, {}),
        "padded rows": (ids, {"attention_mask": mask}),
        "packed by position_ids": (packed, {"position_ids": positions}),
        "packed by cu_seq_lens_q": (packed, {"cu_seq_lens_q": bounds}),
        "packed by seq_idx": (packed, {"seq_idx": documents}),
        "from a state": (ids, {"past_key_values": state}),
    }
    for name, (ids, inputs) in cases.items():
        results = []
        for length in (None, 40):
            decoder.replay_segment_length = length
            own = {key: copy.deepcopy(value) for key, value in inputs.items()}
            output = model(input_ids=ids, use_cache=True, **own)
            logits = output.logits
            if "attention_mask" in inputs:
                logits = logits * mask[..., None]
            ends = []
            if model.has_constant_state:  # else its size depends on how the text was cut
                # Through the state after the sequence too, as if text followed.
                ends = state_tensors(output.past_key_values).values()
                ends = [x for x in ends if x.requires_grad]
            loss = loss_of(logits) + sum(loss_of(x) for x in ends)
            results.append(gradients(model, loss))
        checks.below(f"{name}: gradients", relative_gradients(*reversed(results)), BOUND)


def without_dropout(model):
    """Turns every dropout of a model in training mode off."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
