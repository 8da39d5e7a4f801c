"""What the Triton kernels share: launching, recording launches, the target, dots, contiguity.

Every launch goes through `launch`, by keyword. Under `recording` the same calls are written down,
with or without running: the resource table, the count of launches and the count of bytes come from
what the operators really launch, not from a list kept beside them. Under `taping` a thread's
launches become lines of a program (programs_triton.py).

On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first
import of them.
"""

import functools
import re
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch

try:  # transformers asks for every library that code from the Hub imports, but in a try
    import triton
    import triton.language as tl
except ImportError:
    raise

# What was compiled and checked ahead of time. Other devices take the nearest of these.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)


def operator_namespace(module):
    """The namespace of a module's torch.library operators, from its `__name__`.

    An exported model brings a copy of the file under another name; both may live in one process.
    """
    return re.sub(r"\W", "_", module)


class Config(NamedTuple):
    """How a kernel is cut and compiled.

    Attributes:
        chunk: rows (positions) of a tile, a power of two.
        slice: columns of the output that one program owns, a power of two.
        num_warps, num_stages: as Triton means them.
    """

    chunk: int
    slice: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """One launch as it was asked for.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        arguments: every parameter of the kernel by name: tensors, numbers and compile-time
            constants.
        num_warps, num_stages: as Triton means them.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: dict
    num_warps: int
    num_stages: int

    @property
    def name(self):
        """The kernel's name."""
        return self.kernel.fn.__name__


class _Recorder(NamedTuple):
    launches: list
    run: bool
    target: str | None


# While there are some, every pass runs as it stands.
recorders = []


@contextmanager
def recording(run=True, target=None):
    """Collects the launches of a block of code.

    Args:
        run: whether they also run. Without, outputs stay uninitialised, and tensors may be on the
            "meta" device.
        target: one of `TARGETS`, to choose configurations as for that device; None: the real one.

    Yields:
        A list that receives a `Launch` each.
    """
    launches = []
    recorders.append(_Recorder(launches, run, target))
    try:
        yield launches
    finally:
        recorders.pop()


_tapes = threading.local()


def tape():
    """What writes down what this thread does, or None."""
    return getattr(_tapes, "current", None)


@contextmanager
def taping(writer):
    """Lets `writer` write down a block of code.

    Args:
        writer: has `run_launch`, of the arguments of `launch`, the last ones as a dict; `run_whole`
            of a function and its arguments, and `run_constant` of the same.
    """
    _tapes.current = writer
    try:
        yield writer
    finally:
        _tapes.current = None


def whole(function):
    """Decorates a function of which a program holds the call, as its results hang on values."""

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling() or tape() is None:
            return function(*args)
        return tape().run_whole(function, args)

    return call


def constant(make, *args):
    """make(*args): a tensor that is made once and is part of a program."""
    return make(*args) if tape() is None else tape().run_constant(make, args)


def launch(kernel, grid, num_warps, num_stages, **arguments):
    """Runs a kernel; `arguments` are its parameters by name."""
    if recorders:
        recorder = recorders[-1]
        recorder.launches.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        if not recorder.run:
            return
    if 0 in grid:
        return
    # Triton launches on the current device, whichever it is that the tensors are on.
    with torch.cuda.device_of(next(x for x in arguments.values() if torch.is_tensor(x))):
        if tape() is None:
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
        else:
            tape().run_launch(kernel, grid, num_warps, num_stages, arguments)


def target_of(device):
    """Which of `TARGETS` holds the configurations for a device."""
    if recorders and recorders[-1].target:
        return recorders[-1].target
    if device.type != "cuda":
        return "sm_90"
    return _cuda_target(device.index)


@functools.cache
def _cuda_target(index):
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major == 10 else "sm_80")


@functools.cache
def _num_processors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_processors(device):
    """Streaming multiprocessors (compute units) of a device; an H200's where there is none."""
    if device.type != "cuda":
        return 132
    return _num_processors(device.index)


def dot_precision(dtype, target):
    """How `dot` multiplies inputs that were given in this dtype.

    float32 as exactly as float32 itself; float16 is widened to float32 beforehand, for its range,
    and fits into tf32 whole. bfloat16 takes no notice.
    """
    if dtype == torch.float16 and target != "gfx942":
        return "tf32"
    return "ieee" if target == "gfx942" else "tf32x3"


def padded(size):
    """The block a dimension takes: a power of two that a tensor core accepts."""
    return max(16, 1 << (size - 1).bit_length())


def check_replaceable(step, state):
    """Raises a ValueError for a state that a step cannot replace in place.

    Args: the step's name for the message; the state, or None.
    """
    if state is None or state.dtype != torch.float32 or not state.is_contiguous():
        got = "None" if state is None else f"{state.dtype} with strides {state.stride()}"
        raise ValueError(
            f"{step}: in_place replaces a contiguous float32 state, got {got}; "
            "pass one, or in_place=False."
        )


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. The interpreter would multiply the bit patterns of bfloat16."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, sum, PRECISION: tl.constexpr):
    """sum + a @ b in float32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest. The interpreter would truncate to a bfloat16."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def log2_of_decay(log_decay, LOWEST: tl.constexpr):
    """Base-2 logs of decays from natural ones, raised to LOWEST.

    NaN where it is positive, which is no decay: the host does not look at the values.
    """
    log_decay = log_decay.to(tl.float32)
    return tl.where(log_decay <= 0, tl.maximum(log_decay, LOWEST), float("nan")) * LOG2E
